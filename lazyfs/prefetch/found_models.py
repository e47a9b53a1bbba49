"""What a listing has: its files, and the models that they make. Pure.

Both take a while for thousands of files, so the planner makes them in a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from posixpath import basename

from lazyfs.listed_object import File
from lazyfs.model.directory import ModelFile
from lazyfs.model.filenames import format_of, may_be_weights
from lazyfs.model.layout import ModelLayout, layouts


@dataclass(frozen=True, slots=True, eq=False)
class ListedFiles:
    """The files in a listing.

    Attributes:
        extent: number and bytes of files.
        files: by path.
        model_files: the same files, as `layouts` takes them.
        weights: paths of files that may be weights.
    """

    extent: tuple[int, int]
    files: Mapping[str, File]
    model_files: Sequence[ModelFile]
    weights: Set[str]

    @classmethod
    def of(
        cls, extent: tuple[int, int], nodes: Iterable[File], path_of: Callable[[File], str]
    ) -> ListedFiles:
        """Make one from the nodes of the tree."""
        files = {path_of(file): file for file in nodes}
        model_files = [ModelFile(path, file.size_bytes) for path, file in files.items()]
        weights = {
            file.path
            for file in model_files
            if format_of(name := basename(file.path)) or may_be_weights(name, file.size_bytes)
        }
        return cls(extent, files, model_files, weights)


@dataclass(frozen=True, slots=True, eq=False)
class FoundModels:
    """The models in a listing.

    Attributes:
        read: paths of the weights that were read, and of those that were opened, at that time.
        every: their layouts.
        weights: inodes of all weights.
        rivals: inodes of weights that may replace others as soon as they are opened.
        useless: inodes of files that belong to no model.
    """

    read: tuple[Sequence[str], Sequence[str]]
    every: tuple[ModelLayout, ...]
    weights: set[int]
    rivals: set[int]
    useless: set[int]

    @classmethod
    def of(
        cls,
        listed: ListedFiles,
        read: tuple[Sequence[str], Sequence[str]],
        indexes: Mapping[str, bytes],
        include: Sequence[str],
    ) -> FoundModels:
        """Find the models; `include` has the patterns of `--include`."""
        every = layouts(
            listed.model_files, indexes=indexes, read=read[0], opened=read[1], include=include
        )
        rivals = {out.path for layout in every for out in layout.excluded}
        rivals.difference_update(*(layout.alternatives for layout in every))
        weights = {out.path for layout in every for out in layout.excluded}
        weights.update(*(layout.shards for layout in every))
        useless = listed.files.keys() - weights
        useless.difference_update(*(layout.small for layout in every))
        inodes = [
            {listed.files[path].inode for path in paths} for paths in (weights, rivals, useless)
        ]
        return cls(read, every, *inodes)
