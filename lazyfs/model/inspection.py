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

from lazyfs.errors import SourceError
from lazyfs.model.directory import ModelFile
from lazyfs.model.indexes import MAX_INDEX_BYTES
from lazyfs.model.layout import ModelLayout, layouts
from lazyfs.model.safetensors import Tensor
from lazyfs.model.selection import wanted_models
from lazyfs.model.soundness import LONGEST_POINTER, Reader, is_pointer, look_at
from lazyfs.options.mount_options import PLANNED

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
        broken: why no loader can load it, one sentence each.
    """

    layout: ModelLayout
    prefetched: str
    shards: Sequence[Shard]
    layers: Sequence[Layer]
    sizes: Mapping[str, int]
    broken: Sequence[str] = ()

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
    look_at_alternatives: bool = True,
) -> list[Model]:
    """Describe the models in a listing.

    Args:
        files: sizes in bytes by path.
        read: reads a range of a file; raises SourceError.
        prefetch, prefetch_on, include: as in `MountOptions`.
        wanted: whether a tensor matches `--tensors`; None if that is not given.
        cached: returns how many bytes of a file are in the cache of this machine.
        look_at_alternatives: look at each of many models in a directory, not only at those that
            are so small that they may be pointers.

    What cannot be read makes a model `broken`, and shows as the `trouble` of its shard.
    """
    listed = [ModelFile(path, size) for path, size in files.items()]
    indexes = {}
    unreadable = []
    for path in (path for each in layouts(listed, include=include) for path in each.index_paths):
        try:
            indexes[path] = read(path, 0, files[path]) if files[path] <= MAX_INDEX_BYTES else b""
        except SourceError as error:
            unreadable.append((path, str(error)))
    found = layouts(listed, indexes=indexes, include=include)
    at_mount = wanted_models(found, on_mount=prefetch_on == "mount")
    models = []
    for layout in found:
        broken = [*layout.problems]
        broken += (why for path, why in unreadable if path in layout.index_paths)
        with ThreadPoolExecutor(READERS) as pool:
            looks = pool.map(lambda path: look_at(path, files[path], read), layout.shards)
            pointers = pool.map(lambda path: is_pointer(path, files[path], read), layout.small)
            broken += filter(None, pointers)
            # Nobody knows which of them is read, but one that is broken can be by nobody.
            others = [
                path
                for path in layout.alternatives
                if look_at_alternatives or files[path] <= LONGEST_POINTER
            ]
            broken += (
                look.broken
                for look in pool.map(lambda path: look_at(path, files[path], read), others)
                if look.broken
            )
        layers: dict[str, Layer] = {}
        shards = []
        for path, look in zip(layout.shards, looks, strict=True):
            for tensor in look.tensors or ():
                name = layer_of(tensor.name)
                layers.setdefault(name, Layer(name)).add(tensor)
            broken += filter(None, [look.broken])
            shards.append(
                Shard(
                    path,
                    files[path],
                    None if look.tensors is None else len(look.tensors),
                    _wanted_bytes(files[path], look.tensors, wanted),
                    cached(path),
                    look.odd,
                )
            )
        when = "never" if prefetch not in PLANNED else "mount" if layout in at_mount else "open"
        ordered = sorted(layers.values(), key=_layer_order)
        models.append(Model(layout, when, shards, ordered, files, [*dict.fromkeys(broken)]))
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


def _wanted_bytes(
    size: int, tensors: Sequence[Tensor] | None, wanted: Callable[[str], bool] | None
) -> int:
    if tensors is None or wanted is None:
        return size
    return sum(tensor.end - tensor.begin for tensor in tensors if wanted(tensor.name))
