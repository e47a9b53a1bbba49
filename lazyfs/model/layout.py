"""Which files of a listing a model loader will read, and in which order. Pure.

Each directory with weights gets a `ModelLayout`. Which of its weights are read is decided in
`weight_choice.py`. This module decides about directories; `docs/MODELS.md` shows what comes of
it for published models:

- **Copies in directories** (`original/`, `onnx/`, `openvino/`, ...) below a model are excluded. A
  loader that reads one of them, and nothing of the model, replaces the model.
- **Pipelines** (diffusers): a directory with `model_index.json` above models. Its layout has its
  small files and comes first. The components follow in the order of their names, in which diffusers
  loads them (`sorted` in `DiffusionPipeline.from_pretrained`). Directories that it does not name
  are excluded; if it cannot be used, those that hold only ONNX or exports. Weights next to it
  are single-file copies of the pipeline: excluded, until a loader reads one and no component.
- **One model in several directories** is one *group*: a pipeline; the numbered modules of
  sentence-transformers (`2_Dense/`), below their model or beside `modules.json`; the ranks of one
  model (`rank_0/`, `mp_rank_00_000/`); data of Orbax and arrays of Zarr; a repository of Triton
  (`config.pbtxt`), of which the newest versions are read; and below a configured model,
  safetensors or PyTorch files with other names than its own, which are its components. A language
  model with its tokenizer comes first if what lies above it is no model by itself: text-to-speech
  models load it first.
- **`--include`**: a file that these rules exclude is still fetched, after the shards, if a pattern
  of `--include` matches it and none of the shards. If a pattern matches several models of which one
  is read, it does not say which, and has no effect here.
- **Small files** (configuration, tokenizer, code) come first. Those in a directory without weights
  belong to the nearest model above, or to the root. A directory with very many small files and no
  weights is not a model, and none of its files is fetched ahead.
- **Leftovers** of `hf download` and the blobs of a Hugging Face cache belong to no model.

The caller has to fetch an index before it can be used. So it calls twice: `layouts(files)` says
where the indexes are (`index_paths`), and `layouts(files, indexes=...)` uses them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from posixpath import basename, dirname, join, normpath, split
from types import MappingProxyType

from lazyfs.model.directory import Directory, ModelFile
from lazyfs.model.filenames import (
    BLOB,
    COPY_DIRECTORIES,
    LEFTOVER,
    LEFTOVER_DIRECTORY,
    MODEL,
    Format,
)
from lazyfs.model.indexes import PIPELINE_INDEX
from lazyfs.model.pipelines import Pipelines
from lazyfs.model.weight_sets import CORE

NO_INDEXES: Mapping[str, bytes] = MappingProxyType({})
TRITON_CONFIGURATION = "config.pbtxt"
_NUMBERED_MODULE = re.compile(r"\d+_[A-Z]\w*")
# Names of directories that are parts of the model above, and the file that says so; empty: none is
# needed. Ranks of ServerlessLLM and Megatron, modules of sentence-transformers, the data of Orbax,
# and arrays of Zarr (NeMo 1).
_PARTS = (
    (re.compile(r"rank_?\d+|mp_rank_\d+(_\d+)?"), ""),
    (_NUMBERED_MODULE, "../modules.json"),
    (re.compile(r"ocdbt\.process_\d+"), "manifest.ocdbt"),
    (re.compile(r"d"), "../manifest.ocdbt"),
    (re.compile(r".+"), ".zarray"),
)
# What trainers save beside the model that they train.
_CHECKPOINT = re.compile(r"(checkpoint|global_step|epoch|step|iter)[-_]?\d+")


@dataclass(frozen=True, slots=True)
class Excluded:
    """A weights file that no loader is expected to read. `reason` is a phrase that says why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """What a loader reads of one directory. Paths are relative to the mount.

    Attributes:
        directory: the directory of the weights; empty for the root of the mount.
        format: of the model that is read; `other` also if there is none.
        group: the topmost directory of the model that this is a part of.
        small: small files in the order in which they are read, within `SMALL_TOTAL_BYTES` and
            `SMALL_COUNT`.
        shards: the weights, in the order in which a loader reads them.
        included: the files at the end of `shards` that are there only because of `--include`.
        excluded: weights that are not prefetched.
        alternatives: the excluded files of models of which a loader reads one, and has read none.
        index_paths: the indexes, for a second call of `layouts`.
        warnings: what is odd with this model, one sentence each, for the log.
        problems: why no loader can load it, one sentence each.
    """

    directory: str
    format: Format
    group: str = ""
    small: tuple[str, ...] = ()
    shards: tuple[str, ...] = ()
    included: tuple[str, ...] = ()
    excluded: tuple[Excluded, ...] = ()
    alternatives: tuple[str, ...] = ()
    index_paths: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """All files to fetch, in order."""
        return self.small + self.shards


def layouts(
    files: Iterable[ModelFile],
    *,
    indexes: Mapping[str, bytes] = NO_INDEXES,
    read: Iterable[str] = (),
    opened: Iterable[str] = (),
    include: Sequence[str] = (),
) -> tuple[ModelLayout, ...]:
    """Find the models of a listing, in the order of their directories, and those of one group in
    that in which a loader reads them.

    Args:
        files: all files of the mount, in any order.
        indexes: contents of the indexes fetched so far, by path. An index that is malformed or
            names no existing file is ignored, with a warning; one that is not JSON is a problem.
        read: paths of weights that a loader has read, the latest last.
        opened: paths of weights that were opened.
        include: the patterns of `--include` (`MountOptions.include`).

    >>> layouts([ModelFile("model.safetensors", 9), ModelFile("model.gguf", 9)])[0].shards
    ('model.safetensors',)
    """
    return _Listing(files, read, opened, indexes).layouts(include)


class _Listing:
    """All directories of a listing, and what is known of them."""

    def __init__(
        self,
        files: Iterable[ModelFile],
        read: Iterable[str],
        opened: Iterable[str],
        indexes: Mapping[str, bytes],
    ) -> None:
        self._indexes = indexes
        self._directories: dict[str, Directory] = {}
        self._models: dict[str, Directory] = {}
        self._groups: dict[str, str] = {}
        self._triton: set[str] = set()
        for file in files:
            self._add(file)
        for path, directory in self._directories.items():
            directory.take_unknown(self._directories.get(dirname(path)) if path else None)
        self._pipelines = Pipelines(self._directories, indexes)
        for path in read:
            if found := self._weights_at(path):
                found.read.append(basename(path))
        for path in opened:
            if found := self._weights_at(path):
                found.opened.append(basename(path))

    def _exists(self, path: str) -> bool:
        """Whether there are weights at a path."""
        return self._weights_at(path) is not None

    def _weights_at(self, path: str) -> Directory | None:
        """The directory of a weights file; None: it is none."""
        found = self._directories.get(dirname(path))
        return found if found is not None and basename(path) in found.weights else None

    def _add(self, file: ModelFile) -> None:
        path, name = split(file.path)
        if LEFTOVER.fullmatch(name) or LEFTOVER_DIRECTORY.search(path):
            return
        if basename(path) == "blobs" and BLOB.fullmatch(name):
            return
        if path not in self._directories:
            self._directories[path] = Directory(path)
        self._directories[path].add(name, file)
        if name == TRITON_CONFIGURATION:
            self._triton.add(path)

    def layouts(self, include: Sequence[str]) -> tuple[ModelLayout, ...]:
        """Apply all rules. Call this once."""
        self._find_models()
        root = self._directories.setdefault("", Directory(""))
        for path, directory in self._directories.items():
            # A directory that has weights but is not a model is a copy; its small files are not
            # read.
            if path and path not in self._models and not directory.weights:
                (self._nearest(path) or root).others += directory.others
        self._pipelines.find_variants(self._models)
        for path in sorted(self._models, key=lambda path: path.split("/")):
            self._decide(self._models[path])
        if root.others:
            self._models.setdefault("", root)
        return tuple(
            self._layout(self._models[path], include)
            for path in sorted(self._models, key=self._loading_order)
        )

    def _loading_order(self, path: str) -> tuple[list[str], bool, list[str]]:
        group = self._groups.get(path, path)
        above = self._models.get(group)
        is_first = bool(
            above is not None
            and above.choice.sets
            and path != group
            and self._models[path].has_language_model
            and all(each.identity != MODEL for each in above.choice.sets)
        )
        return group.split("/"), not is_first, path.split("/")

    def _layout(self, directory: Directory, include: Sequence[str]) -> ModelLayout:
        names = set(directory.choice.names)
        chosen = [join(directory.path, name) for name in directory.choice.names]
        expected = set(chosen)
        after = [path for path in directory.included(include) if path not in expected]
        added = set(after)
        excluded = {path: why for path, why in directory.excluded.items() if path not in added}
        indexes = list(directory.indexes)
        if directory.path in self._pipelines:
            indexes.append(join(directory.path, PIPELINE_INDEX))
        return ModelLayout(
            directory=directory.path,
            format=directory.choice.format,
            group=self._groups.get(directory.path, directory.path),
            small=tuple(directory.small()),
            shards=(*chosen, *after),
            included=tuple(after),
            excluded=tuple(Excluded(*item) for item in sorted(excluded.items())),
            alternatives=tuple(
                join(directory.path, name)
                for each in directory.choice.alternatives
                for name in each.names
                if name not in names
            ),
            index_paths=tuple(indexes),
            warnings=tuple(directory.warnings),
            problems=tuple(directory.problems),
        )

    def _find_models(self) -> None:
        """Find the directories of which weights are read, and exclude the others."""
        for path, directory in self._directories.items():
            pipeline = self._pipelines.of(path)
            if owner := self._owner_of_copy(directory):
                place = owner.path or "the root"
                reason = f"a copy of the model in {place}, which loaders read instead"
                owner.exclude(directory, reason)
            elif (
                pipeline is not None
                and path != pipeline
                and self._pipelines.is_foreign(pipeline, path)
            ):
                reason = f"in a directory that {PIPELINE_INDEX} does not name"
                self._directories[pipeline].exclude(directory, reason)
            elif directory.weights or directory.indexes or path == pipeline:
                self._models[path] = directory
        for path, directory in self._directories.items():
            if path in self._models:
                self._replace(directory)
            elif (above := self._nearest(path)) is not None:
                above.excluded |= directory.excluded

    def _owner_of_copy(self, directory: Directory) -> Directory | None:
        """The model of which this directory is a copy: `m` for `m/original/x`. None: no copy.

        Also None if a loader has read it.
        """
        owner = None
        parts = directory.path.split("/")
        for depth in range(len(parts) - 1, -1, -1):  # a copy of a copy is one of the topmost
            above = self._directories.get("/".join(parts[:depth]))
            if parts[depth] not in COPY_DIRECTORIES or above is None:
                continue
            if above.weights or above.path in self._pipelines:
                owner = above
        return None if directory.is_seen else owner

    def _replace(self, directory: Directory) -> None:
        """Exclude what a loader does not read because it reads a copy of it."""
        if not directory.is_seen:
            return
        parts = directory.path.split("/")
        owners = ("/".join(parts[:at]) for at, part in enumerate(parts) if part in COPY_DIRECTORIES)
        replaced = [self._models[owner] for owner in owners if owner in self._models]
        if directory.path in self._pipelines:
            replaced += [
                each
                for path, each in self._models.items()
                if self._pipelines.is_below(path, directory.path)
            ]
        if any(each.is_seen for each in replaced):
            return
        name = (directory.read or directory.opened)[-1]
        for each in replaced:
            each.exclude(each, f"the loader reads {join(directory.path, name)} instead")

    def _decide(self, directory: Directory) -> None:
        """Decide what is read of a model, after all models above it."""
        path = directory.path
        above = self._directories.get(dirname(path)) if path else None
        pipeline = self._pipelines.of(path)
        if path == pipeline and not directory.is_seen:
            directory.exclude(directory, "a single-file copy of the pipeline in this directory")
            directory.decide(self._indexes, exists=self._exists, is_one_model=True)
            return
        is_copy = basename(path) in COPY_DIRECTORIES
        is_one_model = directory.is_configured or (
            is_copy and above is not None and above.is_configured
        )
        variant = ""
        if pipeline is not None:
            is_one_model = path != pipeline  # beside its index lie single files: many models
            variant = self._pipelines.variant(pipeline)
        directory.decide(
            self._indexes,
            exists=self._exists,
            is_one_model=is_one_model,
            variant=variant,
        )
        self._groups[path] = self._group_of(directory)

    def _group_of(self, directory: Directory) -> str:
        """The topmost directory of the model that a directory is a part of."""
        path, name = directory.path, basename(directory.path)
        if (pipeline := self._pipelines.of(path)) is not None:
            return pipeline
        if not path:
            return path
        if (repository := self._triton_repository(path)) is not None:
            return repository
        whole = path
        while whole and self._is_part(whole):
            whole = dirname(whole)
        if whole != path:
            return self._groups.get(whole, whole)
        above = self._nearest(path)
        if above is None or not above.choice.sets or not above.is_configured:
            return path
        names = {each.identity for each in directory.choice.sets}
        is_component = (
            names.isdisjoint(each.identity for each in above.choice.sets)
            and directory.choice.format in CORE
            and "adapter_model" not in names
            and not _CHECKPOINT.search(path)
            and not COPY_DIRECTORIES.intersection(path.split("/"))
        )
        if is_component or _NUMBERED_MODULE.fullmatch(name):
            return self._groups.get(above.path, above.path)
        return path

    def _is_part(self, path: str) -> bool:
        """Whether a directory is a part of the model above, even if no weights lie there."""
        if self._has(join(path, "adapter_config.json")):
            return False  # LoRA adapters of different ranks
        return any(
            name.fullmatch(basename(path)) and (not sign or self._has(normpath(join(path, sign))))
            for name, sign in _PARTS
        )

    def _has(self, path: str) -> bool:
        """Whether there is a small file at a path."""
        directory = self._directories.get(dirname(path))
        return directory is not None and any(each.path == path for each in directory.others)

    def _triton_repository(self, path: str) -> str | None:
        """The repository of Triton that a version of a model is in."""
        parts = path.split("/")
        for depth in range(len(parts), 0, -1):
            model = "/".join(parts[:depth])
            if model in self._triton:
                return dirname(model)
        return None

    def _nearest(self, path: str) -> Directory | None:
        """The model of the closest directory above `path`."""
        while path:
            path = dirname(path)
            if path in self._models:
                return self._models[path]
        return None
