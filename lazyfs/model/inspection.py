"""What is in a source, without mounting it: models, tensors, and what would be prefetched.

Reads the listing, the indexes and the headers of shards, nothing else.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeAlias

from lazyfs.errors import SourceError
from lazyfs.model.layout import MAX_INDEX_BYTES, ModelFile, ModelLayout, layouts, wanted_models
from lazyfs.model.safetensors import (
    HEAD_BYTES,
    LENGTH_BYTES,
    LONGEST_HEADER,
    MalformedHeaderError,
    Tensor,
    header_size,
    parse_header,
)
from lazyfs.options.mount_options import PLANNED

# Reads bytes of a file: its path, the offset and the length.
Reader: TypeAlias = Callable[[str, int, int], bytes]

READERS = 16
_LAYER = re.compile(r"(?P<before>.*?\.)(?P<number>\d+)(\..*)?$")


@dataclass(slots=True)
class Layer:
    """Tensors that belong together: of one layer of a model, or of one thing outside of them.

    Attributes:
        name: what the names of its tensors begin with.
        tensors, parameters, size_bytes: how many, and how large.
        dtypes: bytes by dtype.
    """

    name: str
    tensors: int = 0
    parameters: int = 0
    size_bytes: int = 0
    dtypes: Counter[str] = field(default_factory=Counter)

    def add(self, tensor: Tensor) -> None:
        """Count a tensor."""
        size = tensor.end - tensor.begin
        self.tensors += 1
        self.parameters += math.prod(tensor.shape)
        self.size_bytes += size
        self.dtypes[tensor.dtype] += size


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of weights that a loader reads.

    Attributes:
        tensors: how many; None: not known.
        wanted_bytes: of tensors that may be fetched ahead (`--tensors`).
        cached_bytes: on this machine's disk; None: not known.
        trouble: why its header says nothing.
    """

    path: str
    size_bytes: int
    tensors: int | None
    wanted_bytes: int
    cached_bytes: int | None
    trouble: str | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """One model.

    Attributes:
        layout: what a loader reads of it, in order, and what is left out.
        prefetched: when it is fetched ahead: `mount`, `open`, or `never`.
        shards: in loading order.
        layers: in the order of their numbers, what is in no layer first.
        sizes: bytes by path, of all files that are named.
    """

    layout: ModelLayout
    prefetched: str
    shards: Sequence[Shard]
    layers: Sequence[Layer]
    sizes: Mapping[str, int]

    @property
    def total(self) -> Layer:
        """All layers together."""
        total = Layer("all")
        for layer in self.layers:
            total.tensors += layer.tensors
            total.parameters += layer.parameters
            total.size_bytes += layer.size_bytes
            total.dtypes.update(layer.dtypes)
        return total


def inspect_files(
    files: Mapping[str, int],
    read: Reader,
    *,
    prefetch: str = "model",
    prefetch_on: str = "mount",
    wanted: Callable[[str], bool] | None = None,
    include: Sequence[str] = (),
    cached: Callable[[str], int | None] = lambda path: None,
) -> list[Model]:
    """The models among some files.

    Args:
        files: sizes by path.
        read: gives bytes of a file; raises SourceError.
        prefetch, prefetch_on, wanted, include: as in `MountOptions`; `wanted` is `tensors`,
            compiled.
        cached: how much of a file is on this machine's disk.

    Raises:
        SourceError: an index cannot be had. A header that cannot be had is told of its shard.
    """
    listed = [ModelFile(path, size) for path, size in files.items()]
    indexes = {
        path: read(path, 0, files[path])
        for layout in layouts(listed, include=include)
        for path in layout.index_paths
        if 0 < files[path] <= MAX_INDEX_BYTES
    }
    found = layouts(listed, indexes=indexes, include=include)
    at_mount = wanted_models(found, on_mount=prefetch_on == "mount")
    models = []
    for layout in found:
        with ThreadPoolExecutor(READERS) as pool:
            headers = pool.map(lambda path: _tensors(path, files[path], read), layout.shards)
        layers: dict[str, Layer] = {}
        shards = []
        for path, (tensors, trouble) in zip(layout.shards, headers, strict=True):
            for tensor in tensors or ():
                name = layer_of(tensor.name)
                layers.setdefault(name, Layer(name)).add(tensor)
            shards.append(
                Shard(
                    path,
                    files[path],
                    None if tensors is None else len(tensors),
                    _wanted_bytes(files[path], tensors, wanted),
                    cached(path),
                    trouble,
                )
            )
        when = "never" if prefetch not in PLANNED else "mount" if layout in at_mount else "open"
        ordered = sorted(layers.values(), key=_layer_order)
        models.append(Model(layout, when, shards, ordered, files))
    return models


def layer_of(name: str) -> str:
    """What a tensor belongs to.

    >>> layer_of("model.layers.7.mlp.up_proj.weight"), layer_of("lm_head.weight")
    ('model.layers.7', 'lm_head')
    """
    found = _LAYER.match(name)
    return found["before"] + found["number"] if found else name.rpartition(".")[0] or name


def group_similar(layers: Iterable[Layer]) -> list[tuple[str, Layer, int]]:
    """Layers that follow one another and differ in their numbers only, taken together.

    Returns:
        A name for all of them, such as `model.layers.0-31`; one of them; how many they are.
    """
    groups: list[list[Layer]] = []
    for layer in layers:
        if groups and _follows(groups[-1][-1], layer):
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return [
        (
            first.name if first is last else f"{first.name}-{last.name.rpartition('.')[2]}",
            first,
            len(group),
        )
        for group in groups
        for first, last in [(group[0], group[-1])]
    ]


def _follows(former: Layer, layer: Layer) -> bool:
    before, after = _LAYER.match(former.name), _LAYER.match(layer.name)
    return (
        before is not None
        and after is not None
        and before["before"] == after["before"]
        and int(before["number"]) + 1 == int(after["number"])
        and (former.tensors, former.parameters, former.dtypes)
        == (layer.tensors, layer.parameters, layer.dtypes)
    )


def _layer_order(layer: Layer) -> tuple[str, int]:
    found = _LAYER.match(layer.name)
    # int() of a long number would be slow, and is refused from 4,300 digits on.
    return (found["before"], int(found["number"][:18])) if found else ("", 0)


def _tensors(path: str, size: int, read: Reader) -> tuple[Sequence[Tensor] | None, str | None]:
    """The tensors of a shard, or why they are not known."""
    if not path.endswith(".safetensors"):
        return None, None
    try:
        first = read(path, 0, min(size, HEAD_BYTES)) if size else b""
        length = header_size(first[:LENGTH_BYTES], size)
        if length > LONGEST_HEADER:
            return None, f"its header has {length} bytes: prefetched by offset"
        rest = read(path, len(first), length - len(first)) if length > len(first) else b""
        return parse_header(first + rest, size).tensors, None
    except MalformedHeaderError as error:
        return None, f"its header is not valid, so it is prefetched by offset: {error}"
    except SourceError as error:
        return None, str(error)


def _wanted_bytes(
    size: int, tensors: Sequence[Tensor] | None, wanted: Callable[[str], bool] | None
) -> int:
    if tensors is None or wanted is None:
        return size
    return sum(tensor.end - tensor.begin for tensor in tensors if wanted(tensor.name))
