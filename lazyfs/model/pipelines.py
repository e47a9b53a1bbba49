"""The pipelines of a listing: directories with `model_index.json` above models (diffusers). Pure.

`layout.py` has the rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from posixpath import basename, dirname, join

from lazyfs.model.directory import Directory
from lazyfs.model.filenames import COPY_DIRECTORIES
from lazyfs.model.indexes import (
    MAX_INDEX_BYTES,
    PIPELINE_INDEX,
    BrokenIndexError,
    MalformedIndexError,
    parse_pipeline,
    shown,
)
from lazyfs.model.weight_sets import CORE

# Further directories of one component have numbers.
_NUMBER = re.compile(r"_\d+$")


class Pipelines:
    """All pipelines of a listing.

    Args:
        directories: the directories that have files, by path.
        indexes: contents of the indexes fetched so far, by path.
    """

    def __init__(self, directories: Mapping[str, Directory], indexes: Mapping[str, bytes]) -> None:
        self._directories = directories
        self._indexes = indexes
        # The components that each pipeline names; None: they are not known.
        self._named: dict[str, frozenset[str] | None] = {}
        # The variant that a loader reads in each pipeline; empty: none.
        self._variants: dict[str, str] = {}
        # All directories, including those that only have directories.
        self._places: set[str] = set()
        for directory in directories:
            path = directory
            while path and path not in self._places:
                self._places.add(path)
                path = dirname(path)
        self._find()

    def __contains__(self, path: str) -> bool:
        return path in self._named

    def variant(self, pipeline: str) -> str:
        """The variant that a loader reads in a pipeline; empty: none."""
        return self._variants.get(pipeline, "")

    def _find(self) -> None:
        below: dict[str, list[Directory]] = {}
        for path, directory in self._directories.items():
            if path and directory.weights:
                below.setdefault(dirname(path), []).append(directory)
        for path, directory in self._directories.items():
            if not directory.has_pipeline_index or path not in below:
                continue
            named = self._named_by(directory)
            if named is not None:
                there = any(basename(each.path) in named for each in below[path])
            else:
                there = any(
                    each.formats & CORE and basename(each.path) not in COPY_DIRECTORIES
                    for each in below[path]
                )
            if there:
                self._named[path] = named

    def _named_by(self, directory: Directory) -> frozenset[str] | None:
        """The components that a `model_index.json` names; None if it is not known."""
        path = join(directory.path, PIPELINE_INDEX)
        size = next(file.size_bytes for file in directory.others if file.path == path)
        try:
            if size > MAX_INDEX_BYTES:
                raise MalformedIndexError(f"it has {size} bytes, the limit is {MAX_INDEX_BYTES}")
            named = parse_pipeline(self._indexes[path]) if path in self._indexes else None
        except BrokenIndexError as error:
            directory.problems.append(f"{path} is broken: {error}; upload it again")
            return None
        except MalformedIndexError as error:
            directory.warnings.append(f"{path} is ignored: {error}; all components are read")
            return None
        absent = [
            name
            for name in named or ()
            if join(directory.path, name) not in self._places and not name.endswith("_*")
        ]
        if absent:
            directory.problems.append(
                f"{path} names components that do not exist: {shown(sorted(absent))}; upload them"
            )
        return named

    def of(self, path: str) -> str | None:
        """The pipeline that a directory is in, or is itself; None: none."""
        while True:
            if path in self._named:
                return path
            if not path:
                return None
            path = dirname(path)

    def is_foreign(self, pipeline: str, path: str) -> bool:
        """Whether a directory in a pipeline is no component that a loader reads."""
        directory, named = self._directories[path], self._named[pipeline]
        if directory.is_seen or not directory.weights:
            return False
        component = path[len(pipeline) :].lstrip("/").partition("/")[0]
        if named is not None:
            return named.isdisjoint((component, _NUMBER.sub("_*", component)))
        return dirname(path) == pipeline and not directory.formats & {*CORE, "gguf"}

    def is_below(self, path: str, pipeline: str) -> bool:
        """Whether a directory is below a pipeline, and in no other one."""
        return path != pipeline and self.of(path) == pipeline

    def find_variants(self, models: Mapping[str, Directory]) -> None:
        """Find out which variant a loader reads in each pipeline.

        Args:
            models: the directories of which weights are read, by path.
        """
        below: dict[str, list[Directory]] = {}
        for path, directory in models.items():
            pipeline = self.of(path)
            if pipeline is not None and path != pipeline:
                below.setdefault(pipeline, []).append(directory)
        for pipeline, found in below.items():
            self._variants[pipeline] = _the_one(each.variants for each in found)


def _the_one(variants: Iterable[tuple[set[str], set[str]]]) -> str:
    """The variant that a loader reads, of those that it has read and opened; empty: none."""
    read: set[str] = set()
    opened: set[str] = set()
    for one, other in variants:
        read |= one
        opened |= other
    for found in (opened, read):
        if len(found) == 1:
            return found.pop()
    return ""
