"""Writes a safetensors model of any size: layers of a Llama, in shards, with its small files."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np

# (name, rows, columns) of one layer; as recorded from a 1 B Llama.
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
    """Write a model of about that size; the bytes really written in shards.

    The content does not compress: windows of one random pool, each from another offset.
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
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(directory / name, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            position = shard * 7919
            left = end
            while left:
                start = position % (_POOL // 2)
                piece = min(left, _POOL // 2)
                file.write(memoryview(pool)[start : start + piece])
                left -= piece
                position += 1_000_003
            written += 8 + len(text) + end
    index = {"metadata": {"total_size": written}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (directory / "tokenizer.json").write_text(json.dumps({"vocab": list(range(50_000))}))
    return written
