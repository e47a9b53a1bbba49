"""Describes the models of a source: shards, tensors, and what is prefetched in which order.

Reads only the listing, the indexes and the headers of shards.
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
from lazyfs.model.directory import ModelFile
from lazyfs.model.indexes import MAX_INDEX_BYTES
from lazyfs.model.layout import ModelLayout, layouts
from lazyfs.model.safetensors import (
    HEAD_BYTES,
    LENGTH_BYTES,
    LONGEST_HEADER,
    MalformedHeaderError,
    Tensor,
    header_size,
    parse_header,
)
from lazyfs.model.selection import wanted_models
from lazyfs.options.mount_options import PLANNED

# Reads a range of a file: path, offset and length in bytes.
Reader: TypeAlias = Callable[[str, int, int], bytes]

READERS = 16
_LAYER = re.compile(r"(?P<before>.*?\.)(?P<number>\d+)(\..*)?$")


@dataclass(slots=True)
class Layer:
    """The tensors of one layer of a model, or of one module outside the layers.

    Attributes:
        name: common prefix of the names of its tensors.
        tensors, parameters: how many there are.
        size_bytes: of all its tensors.
        dtypes: bytes by dtype.
    """

    name: str
    tensors: int = 0
    parameters: int = 0
    size_bytes: int = 0
    dtypes: Counter[str] = field(default_factory=Counter)

    def add(self, tensor: Tensor) -> None:
        """Add a tensor to the counts."""
        size = tensor.end - tensor.begin
        self.tensors += 1
        self.parameters += math.prod(tensor.shape)
        self.size_bytes += size
        self.dtypes[tensor.dtype] += size


@dataclass(frozen=True, slots=True)
class Shard:
    """A weights file that a loader reads.

    Attributes:
        tensors: number of tensors; None if unknown.
        wanted_bytes: bytes of the tensors that may be prefetched (`--tensors`).
        cached_bytes: bytes in the cache of this machine; None if unknown.
        trouble: why its header could not be used; None if it could.
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
        layout: what a loader reads of it, in order, and what is excluded.
        prefetched: when prefetching starts: `mount`, `open`, or `never`.
        shards: in loading order.
        layers: in the order of their numbers, after the modules outside the layers.
        sizes: sizes in bytes by path.
    """

    layout: ModelLayout
    prefetched: str
    shards: Sequence[Shard]
    layers: Sequence[Layer]
    sizes: Mapping[str, int]

    @property
    def total(self) -> Layer:
        """The sum of all layers."""
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
    """Describe the models in a listing.

    Args:
        files: sizes in bytes by path.
        read: reads a range of a file; raises SourceError.
        prefetch, prefetch_on, include: as in `MountOptions`.
        wanted: whether a tensor matches `--tensors`; None if that is not given.
        cached: returns how many bytes of a file are in the cache of this machine.

    Raises:
        SourceError: an index cannot be read. A header that cannot be read shows as the `trouble`
            of its shard.
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
    """The layer or module that a tensor belongs to.

    >>> layer_of("model.layers.7.mlp.up_proj.weight"), layer_of("lm_head.weight")
    ('model.layers.7', 'lm_head')
    """
    found = _LAYER.match(name)
    return found["before"] + found["number"] if found else name.rpartition(".")[0] or name


def group_similar(layers: Iterable[Layer]) -> list[tuple[str, Layer, int]]:
    """Group consecutive layers that differ only in their numbers.

    Returns:
        For each group its name, such as `model.layers.0-31`, its first layer, and its length.
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
    # int() of a long number is slow, and Python refuses more than 4,300 digits.
    return (found["before"], int(found["number"][:18])) if found else ("", 0)


def _tensors(path: str, size: int, read: Reader) -> tuple[Sequence[Tensor] | None, str | None]:
    """The tensors of a shard, or the reason why they are unknown."""
    if not path.endswith(".safetensors"):
        return None, None
    try:
        first = read(path, 0, min(size, HEAD_BYTES)) if size else b""
        length = header_size(first[:LENGTH_BYTES], size)
        if length > LONGEST_HEADER:
            return None, f"its header is too long ({length} bytes), so it is prefetched by offset"
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
