"""Writes the data for the origin: a model of any size, a recorded layout, or many small files."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np

# (name, rows, columns) of one layer, recorded from a 1 B Llama.
_LAYER = (
    ("mlp.down_proj", 2048, 5632),
    ("mlp.gate_proj", 5632, 2048),
    ("mlp.up_proj", 5632, 2048),
    ("self_attn.k_proj", 512, 2048),
    ("self_attn.o_proj", 2048, 2048),
    ("self_attn.q_proj", 2048, 2048),
    ("self_attn.v_proj", 512, 2048),
    ("input_layernorm", 2048, 1),
    ("post_attention_layernorm", 2048, 1),
)
_WIDTH = 2  # bytes of F16, which numpy can hold; BF16 moves the same bytes
_LAYER_BYTES = sum(rows * columns * _WIDTH for _, rows, columns in _LAYER)
_POOL = 64 << 20


def write_model(directory: Path, total_bytes: int, shards: int) -> int:
    """Write a model of about the given size. Returns the size of its shards in bytes.

    The content cannot be compressed: each tensor is another window of a pool of random bytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    pool = np.random.default_rng(1).bytes(_POOL)
    layers = max(shards, math.ceil(total_bytes / _LAYER_BYTES))
    weight_map: dict[str, str] = {}
    written = 0
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for layer in range(layers * shard // shards, layers * (shard + 1) // shards):
            for part, rows, columns in _LAYER:
                key = f"model.layers.{layer}.{part}.weight"
                shape = [rows, columns] if columns > 1 else [rows]
                begin, end = end, end + rows * columns * _WIDTH
                header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
                weight_map[key] = name
        written += _write_shard(directory / name, header, end, pool, shard)
    index = {"metadata": {"total_size": written}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    _write_small(directory, 0)
    return written


def write_recorded(directory: Path, layout: Path) -> int:
    """Write a model with the layout of a trace. Returns the size of its shards in bytes.

    Args:
        layout: a file as described in traces/README.md.
    """
    directory.mkdir(parents=True)
    pool = np.random.default_rng(2).bytes(_POOL)
    weight_map: dict[str, str] = {}
    files = json.loads(layout.read_text())
    written = 0
    for number, (name, file) in enumerate(files.items()):
        if "tensors" not in file:
            continue
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for key, (dtype, shape, begin, end) in file["tensors"].items():
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
            weight_map[key] = name
        length = file["size"] - 8 - file["header_length"]
        path = directory / name
        written += _write_shard(path, header, length, pool, number, file["header_length"])
        if path.stat().st_size != file["size"]:
            raise ValueError(f"{name}: its layout does not fit its size")
    for name, file in files.items():
        if name.endswith(".index.json"):
            text = json.dumps({"metadata": {}, "weight_map": weight_map})
        elif "tensors" not in file:
            text = json.dumps({"model_type": "llama"})
        else:
            continue
        (directory / name).write_text(text.ljust(file["size"]))
    return written


# Small files of one model repository and their sizes in bytes.
_SMALL = {
    "README.md": 5000, "config.json": 700, "generation_config.json": 200, "merges.txt": 20000,
    "special_tokens_map.json": 500, "tokenizer.json": 60000, "tokenizer_config.json": 3000,
    "chat_template.jinja": 4000, "vocab.json": 30000, "LICENSE": 11000,
}  # fmt: skip


def write_small_files(directory: Path, count: int) -> int:
    """Write the small files of several models, at most `count` files. Returns their number."""
    written = 0
    for model in range(count // len(_SMALL)):
        folder = directory / f"model-{model:04d}"
        folder.mkdir(parents=True)
        written += _write_small(folder, model)
    return written


def _write_small(directory: Path, model: int) -> int:
    for name, size in _SMALL.items():
        text = json.dumps({"model_type": "llama", "number": model, "name": name})
        (directory / name).write_text(text.ljust(size))
    return len(_SMALL)


def _write_shard(
    path: Path, header: dict[str, object], length: int, pool: bytes, number: int,
    header_length: int = 0,
) -> int:  # fmt: skip
    """Write one file with tensors of `length` bytes. Returns its size."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * max(-len(text) % 8, header_length - len(text))
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        position, left = number * 7919, length
        while left:
            start = position % (_POOL // 2)
            piece = min(left, _POOL // 2)
            file.write(memoryview(pool)[start : start + piece])
            left -= piece
            position += 1_000_003
    return 8 + len(text) + length
