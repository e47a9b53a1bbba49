"""Models to load: names, sizes and headers, without the bytes of tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from lazyfs.model.safetensors import TensorTable, parse_header

TRACES = Path(__file__).parents[2] / "bench" / "traces"
MIB = 1 << 20
INDEX = "model.safetensors.index.json"
ITEM_BYTES = 2

# Of a tensor: its name and the number of its bytes.
Sized = tuple[str, int]


@dataclass(slots=True)
class Model:
    """Files by path.

    Attributes:
        sizes: of all files, in bytes.
        contents: the first bytes of files, as far as anyone looks at them.
        tables: what is in which shard, in loading order.
        headers: how long their headers are.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    tables: dict[str, TensorTable] = field(default_factory=dict)
    headers: dict[str, int] = field(default_factory=dict)

    def add(self, path: str, content: bytes, size: int | None = None) -> None:
        """A file that begins with `content`."""
        self.contents[path] = content
        self.sizes[path] = len(content) if size is None else size

    def add_shard(self, path: str, tensors: Iterable[Sized], header_bytes: int = 0) -> None:
        """A shard; its tensors are in the order of their names, as safetensors writes them."""
        header: dict[str, object] = {}
        end = 0
        for name, size in sorted(tensors):
            begin, end = end, end + size
            shape = [size // ITEM_BYTES]
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (max(header_bytes - 8, len(text)) - len(text))
        start = len(text).to_bytes(8, "little") + text
        self.add(path, start, len(start) + end)
        self.tables[path] = parse_header(start, len(start) + end)
        self.headers[path] = len(start)

    def add_index(self) -> None:
        """The index of all shards, and a config."""
        weight_map = {
            tensor.name: path for path, table in self.tables.items() for tensor in table.tensors
        }
        self.add(INDEX, json.dumps({"weight_map": weight_map}).encode())
        self.add("config.json", b"{}")

    @property
    def shards(self) -> list[str]:
        return self.named("model")

    def named(self, beginning: str) -> list[str]:
        """The shards whose names begin so, in order."""
        return [path for path in self.tables if path.startswith(beginning)]


def recorded() -> Model:
    """The model of the recorded traces."""
    model = Model()
    for path, entry in json.loads((TRACES / "layout.json").read_text()).items():
        if "tensors" not in entry:
            model.add(path, bytes(entry["size"]))
            continue
        header = {
            name: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
            for name, (dtype, shape, begin, end) in entry["tensors"].items()
        }
        text = json.dumps(header).encode()
        padding = entry["header_length"] - len(text)
        text = json.dumps(header, separators=(",", ":")).encode() if padding < 0 else text
        text = text.ljust(entry["header_length"])
        start = len(text).to_bytes(8, "little") + text
        model.add(path, start, entry["size"])
        model.tables[path] = parse_header(start, entry["size"])
        model.headers[path] = len(start)
    model.add_index()
    return model


def llama(total_bytes: int, shards: int, layers: int = 32) -> Model:
    """A dense model: embeddings, equal layers, head; shards of equal size."""
    layer_bytes = int(total_bytes * 0.96 / layers)
    parts = {
        "mlp.gate_proj": 0.26, "mlp.up_proj": 0.26, "mlp.down_proj": 0.26, "self_attn.q_proj": 0.09,
        "self_attn.o_proj": 0.09, "self_attn.k_proj": 0.02, "self_attn.v_proj": 0.02,
    }  # fmt: skip
    tensors = [("model.embed_tokens.weight", _even(total_bytes * 0.02))]
    for layer in range(layers):
        tensors += (
            (f"model.layers.{layer}.{part}.weight", _even(layer_bytes * share))
            for part, share in parts.items()
        )
        tensors.append((f"model.layers.{layer}.input_layernorm.weight", 8192))
    tensors.append(("lm_head.weight", _even(total_bytes * 0.02)))
    return _sharded(tensors, shards)


def experts(total_bytes: int, shards: int, layers: int = 16, count: int = 64) -> Model:
    """A mixture of experts, which have nine tenths of the bytes."""
    expert_bytes = total_bytes * 0.9 / layers / count / 3
    tensors = []
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors.append((f"{prefix}.self_attn.qkv.weight", _even(total_bytes * 0.1 / layers)))
        for expert in range(count):
            tensors += (
                (f"{prefix}.mlp.experts.{expert}.{part}.weight", _even(expert_bytes))
                for part in ("down_proj", "gate_proj", "up_proj")
            )
    return _sharded(tensors, shards)


def quantised(total_bytes: int, shards: int, layers: int = 32) -> Model:
    """Each weight in 16 bits and, half as large, in 8, of which a loader reads one."""
    tensors = []
    for layer in range(layers):
        for part in ("down_proj", "gate_proj", "up_proj", "qkv"):
            size = total_bytes / layers / 4
            tensors.append((f"model.layers.{layer}.{part}.weight", _even(size * 0.66)))
            tensors.append((f"model.layers.{layer}.{part}.weight_q8", _even(size * 0.33)))
    return _sharded(tensors, shards)


def with_consolidated(total_bytes: int, shards: int) -> Model:
    """A model with Mistral's second copy beside it."""
    model = llama(total_bytes, shards)
    second = llama(total_bytes, shards)
    for path, table in second.tables.items():
        copy = path.replace("model-", "consolidated-")
        model.add_shard(copy, [(t.name, t.end - t.begin) for t in table.tensors])
    return model


def _sharded(tensors: list[Sized], shards: int) -> Model:
    """Cut where a shard is full, in the order of the list, as `save_pretrained` does."""
    model = Model()
    total = sum(size for _, size in tensors)
    ends = [0]
    passed = 0
    for at, (_, size) in enumerate(tensors, start=1):
        passed += size
        if passed >= total * len(ends) / shards:
            ends.append(at)
    for number, (start, stop) in enumerate(pairwise(ends), start=1):
        name = f"model-{number:05d}-of-{len(ends) - 1:05d}.safetensors"
        model.add_shard(name, tensors[start:stop])
    model.add_index()
    return model


def _even(size: float) -> int:
    return math.ceil(size / ITEM_BYTES) * ITEM_BYTES


def spans(model: Model, path: str) -> Iterator[tuple[str, int, int]]:
    """Name, begin and end of the tensors of a shard, in the order of their bytes."""
    return ((t.name, t.begin, t.end) for t in model.tables[path].tensors)
