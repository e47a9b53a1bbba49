"""Which files of a listing a model loader will read, and in which order. Pure.

Each directory with weights is a model and gets a `ModelLayout`. The rules, most important first:

- **One format is read.** Loaders take safetensors if there are any, otherwise PyTorch pickles
  (`*.bin`, otherwise `*.pt`, `*.pth`, `*.ckpt`; vLLM's `DefaultModelLoader._prepare_weights`),
  otherwise GGUF, otherwise anything else. Weights in other formats are copies: excluded.
- **Shards** of safetensors are those that `*.safetensors.index.json` names. Without a usable index
  they are all except `consolidated*`, which is Mistral's second copy of its models (vLLM's
  `filter_duplicate_safetensors_files`). Shards are read in the natural order of their names
  (`shard-2` before `shard-10`; vLLM's `safetensors_weights_iterator`). The newest loader of vLLM
  prefers the second copy unless `--load-format` is given; a listing cannot show which one it reads.
- **Variants** (`model.fp16.safetensors`, `*.non_ema.*`) are read only when a user asks for them.
  They are excluded if the plain file exists, and read otherwise.
- **Copies in directories** (`original/`, `onnx/`, `openvino/`, ...) below a model are excluded.
- **`--include`**: a file that these rules exclude is still fetched, after the shards, if a pattern
  of `--include` matches it and none of the shards. If a pattern matches several GGUF models, it
  does not say which of them is read, and has no effect here.
- **Pipelines** (diffusers): a directory with `model_index.json` above models. Its layout has its
  small files and comes first. The components follow in the order of their names, in which diffusers
  loads them (`sorted` in `DiffusionPipeline.from_pretrained`). Weights next to `model_index.json`
  are single-file copies of the pipeline: excluded. So are directories that hold only ONNX or the
  like, which another kind of pipeline reads.
- **GGUF**: one model, in one file or in parts (`-00001-of-00003.gguf`), with its projector
  (`mmproj*`). If a directory has several models, only the reader knows which one it reads: all are
  excluded.
- **Small files** (configuration, tokenizer, code) come first. Those in a directory without weights
  belong to the nearest model above, or to the root. A directory with very many small files and no
  weights is not a model, and none of its files is fetched ahead.

The caller has to fetch an index before it can be used. So it calls twice: `layouts(files)` says
where the indexes are (`index_paths`), and `layouts(files, indexes=...)` uses them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from posixpath import basename, dirname, join, split
from types import MappingProxyType

from lazyfs.model.filenames import (
    COPY_DIRECTORIES,
    FORMAT_ORDER,
    PART,
    PYTORCH_ORDER,
    TRAINING_STATE,
    VARIANT,
    Format,
    family_of,
    format_of,
    is_consolidated,
    is_small,
    natural_order,
    small_rank,
    stem_of,
    suffix_of,
)
from lazyfs.model.shard_index import INDEX_SUFFIX, MAX_INDEX_BYTES, named_shards
from lazyfs.options.option_types import matches

PIPELINE_INDEX = "model_index.json"
# Limits on the small files of one model that are fetched ahead.
SMALL_TOTAL_BYTES = 64 << 20
SMALL_COUNT = 512

NO_INDEXES: Mapping[str, bytes] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A listed file. `path` is relative to the mount, with `/` as separator."""

    path: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Excluded:
    """A weights file that no loader is expected to read. `reason` is a phrase that says why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """What a loader reads of one directory. Paths are relative to the mount.

    Attributes:
        directory: the directory of the model; empty for the root of the mount.
        format: of the weights that are read; `other` also if there are none.
        small: small files in the order in which they are read, within `SMALL_TOTAL_BYTES` and
            `SMALL_COUNT`.
        shards: the weights, in the order in which a loader reads them.
        included: the files at the end of `shards` that are there only because of `--include`.
        excluded: weights that are not prefetched.
        index_paths: the indexes of the shards, for a second call of `layouts`.
        warnings: what is wrong with this model, one sentence each, for the log.
    """

    directory: str
    format: Format
    small: tuple[str, ...] = ()
    shards: tuple[str, ...] = ()
    included: tuple[str, ...] = ()
    excluded: tuple[Excluded, ...] = ()
    index_paths: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """All files to fetch, in order."""
        return self.small + self.shards


def layouts(
    files: Iterable[ModelFile],
    *,
    indexes: Mapping[str, bytes] = NO_INDEXES,
    read: Iterable[str] = (),
    include: Sequence[str] = (),
) -> tuple[ModelLayout, ...]:
    """Find the models of a listing, in the order of their directories, parents first.

    Args:
        files: all files of the mount, in any order.
        indexes: contents of the indexes fetched so far, by path. An index that is malformed or
            names no existing file is ignored, with a warning.
        read: paths of weights that a loader has read. If the rules expected it to read others, the
            loader is followed: files like those are chosen. What the rules chose is kept only if
            the loader has read some of it.
        include: the patterns of `--include` (`MountOptions.include`).

    >>> layouts([ModelFile("a.safetensors", 9), ModelFile("b.bin", 9)])[0].shards
    ('a.safetensors',)
    """
    directories = _directories(files)
    for path in read:
        directories[dirname(path)].read.append(basename(path))
    for path, directory in directories.items():
        above = directories.get(dirname(path)) if path else None
        if above and directory.format != "other" and basename(path) not in COPY_DIRECTORIES:
            above.is_pipeline = above.has_pipeline_index
    models: dict[str, _Directory] = {}
    for path, directory in directories.items():
        owner = _owner_of_copy(directory, directories)
        while owner and (above := _owner_of_copy(owner, directories)):
            owner = above  # a copy of a copy
        if owner:
            place = owner.path or "the root"
            reason = f"a copy of the model in {place}, which loaders read instead"
            owner.exclude(directory.weights, reason, directory=path)
        elif directory.weights or directory.is_pipeline:
            models[path] = directory
    root = directories.setdefault("", _Directory(""))
    for path, directory in directories.items():
        # A directory that has weights but is not a model is a copy. Its small files are not read.
        if path and path not in models and not directory.weights:
            (_nearest(path, models) or root).others += directory.others
    if root.others:
        models.setdefault("", root)
    return tuple(
        models[path].layout(indexes, include)
        for path in sorted(models, key=lambda path: path.split("/"))
    )


def _directories(files: Iterable[ModelFile]) -> dict[str, _Directory]:
    directories: dict[str, _Directory] = {}
    for file in files:
        path, name = split(file.path)
        if path not in directories:
            directories[path] = _Directory(path)
        directories[path].add(name, file)
    return directories


class _Directory:
    """One directory of the listing, for which `layout` applies the rules."""

    def __init__(self, path: str) -> None:
        self.path = path
        # Names of weights that a loader has read, latest last.
        self.read: list[str] = []
        # Names of weights; and all other files, including those of subdirectories without weights.
        self.weights: list[str] = []
        self.others: list[ModelFile] = []
        self.has_pipeline_index = False
        self.is_pipeline = False
        self._excluded: list[Excluded] = []
        self._warnings: list[str] = []

    def add(self, name: str, file: ModelFile) -> None:
        if TRAINING_STATE.fullmatch(name):
            self.exclude([name], "training state, which only a trainer reads")
        elif format_of(name):
            self.weights.append(name)
        else:
            self.others.append(file)
            self.has_pipeline_index |= name == PIPELINE_INDEX

    @property
    def format(self) -> Format:
        """The format that loaders read here."""
        there = {format_of(name) for name in self.weights}
        return next((candidate for candidate in FORMAT_ORDER if candidate in there), "other")

    def exclude(self, names: Iterable[str], reason: str, *, directory: str | None = None) -> None:
        """Exclude weights of this directory, or of a subdirectory."""
        path = self.path if directory is None else directory
        self._excluded += (Excluded(join(path, name), reason) for name in names)

    def layout(self, indexes: Mapping[str, bytes], include: Sequence[str]) -> ModelLayout:
        """Apply the rules. Call this once, after all files were added."""
        index_paths: tuple[str, ...] = ()
        copies = self.weights if self.is_pipeline and not self.read else []
        self.exclude(copies, "a single-file copy of the pipeline in this directory")
        self.weights = [name for name in self.weights if name not in copies]
        chosen = self.format
        names = [name for name in self.weights if format_of(name) == chosen]
        self.exclude(
            (name for name in self.weights if format_of(name) != chosen),
            f"a copy in another format than {chosen}, which loaders read instead",
        )
        if chosen == "safetensors":
            index_paths = self._index_paths(names)
            names = self._safetensors(names, index_paths, indexes)
        elif chosen == "pytorch":
            names = self._pytorch(names)
        elif chosen == "gguf":
            names = self._gguf(names)
        included = self._included(names, include)
        names = self._follow(names)
        in_order = sorted((join(self.path, name) for name in names), key=natural_order)
        after = [path for path in included if path not in in_order]
        self._excluded = [item for item in self._excluded if item.path not in after]
        return ModelLayout(
            directory=self.path,
            format=chosen,
            small=self._small(),
            shards=(*in_order, *after),
            included=tuple(after),
            excluded=tuple(sorted(self._excluded, key=lambda excluded: excluded.path)),
            index_paths=index_paths,
            warnings=tuple(self._warnings),
        )

    def _included(self, names: Iterable[str], include: Iterable[str]) -> list[str]:
        """Excluded files for which a pattern of `--include` was given, in loading order."""
        chosen = [join(self.path, name) for name in names]
        left_out = [item.path for item in self._excluded]
        found: set[str] = set()
        for pattern in include:
            if any(matches(path, [pattern]) for path in chosen):
                continue
            meant = [path for path in left_out if matches(path, [pattern])]
            if len(_gguf_models(meant)) <= 1:
                found.update(meant)
        return sorted(found, key=natural_order)

    def _follow(self, names: list[str]) -> list[str]:
        """The chosen weights, adjusted to what a loader has read."""
        strays = [name for name in self.read if name in self.weights and name not in names]
        if not strays:
            return names
        families = {family_of(name) for name in strays}
        like = [name for name in self.weights if family_of(name) in families]
        kept = names if set(names).intersection(self.read) else []
        self._excluded = [item for item in self._excluded if basename(item.path) not in like]
        self.exclude(
            (name for name in names if name not in kept),
            f"the loader reads {strays[-1]} and similar files instead",
        )
        return sorted({*kept, *like})

    def _index_paths(self, shards: list[str]) -> tuple[str, ...]:
        """The indexes of the shards that are read, without that of Mistral's second copy.

        A file that is too large for an index is never fetched whole.
        """
        second = all(is_consolidated(name) for name in shards)
        found = [
            file
            for file in self.others
            if file.path.endswith(INDEX_SUFFIX)
            and dirname(file.path) == self.path
            and is_consolidated(basename(file.path)) == second
        ]
        self._warnings += (
            f"{file.path} is ignored: it has {file.size_bytes} bytes, the limit is "
            f"{MAX_INDEX_BYTES}; shards are read in the order of their names"
            for file in found
            if file.size_bytes > MAX_INDEX_BYTES
        )
        return tuple(sorted(file.path for file in found if file.size_bytes <= MAX_INDEX_BYTES))

    def _safetensors(
        self, names: list[str], index_paths: Iterable[str], indexes: Mapping[str, bytes]
    ) -> list[str]:
        named: set[str] = set()
        for path in index_paths:
            if path in indexes:
                found, warnings = named_shards(path, indexes[path], set(names))
                named |= found
                self._warnings += warnings
        if named:
            self.exclude(
                (name for name in names if name not in named),
                "not named in the index of the shards",
            )
            return [name for name in names if name in named]
        consolidated = [name for name in names if is_consolidated(name)]
        if 0 < len(consolidated) < len(names):
            self.exclude(consolidated, "Mistral's second copy of the shards in this directory")
            names = [name for name in names if not is_consolidated(name)]
        return self._without_variants(names)

    def _without_variants(self, names: list[str]) -> list[str]:
        plain = {
            PART.sub("", stem_of(name)) for name in names if not VARIANT.fullmatch(stem_of(name))
        }
        kept = []
        for name in names:
            variant = VARIANT.fullmatch(stem_of(name))
            if variant and PART.sub("", variant["stem"]) in plain:
                self.exclude([name], "a variant, read only if a user asks for it")
            else:
                kept.append(name)
        return kept

    def _pytorch(self, names: list[str]) -> list[str]:
        there = {suffix_of(name) for name in names}
        chosen = next(suffix for suffix in PYTORCH_ORDER if suffix in there)
        self.exclude(
            (name for name in names if suffix_of(name) != chosen),
            f"a copy with another suffix than {chosen}, which loaders read instead",
        )
        return self._without_variants([name for name in names if suffix_of(name) == chosen])

    def _gguf(self, names: list[str]) -> list[str]:
        models = _gguf_models(names)
        if len(models) <= 1:
            return names
        self.exclude(names, f"one of {len(models)} GGUF models; one is fetched when it is opened")
        return []

    def _small(self) -> tuple[str, ...]:
        def order(file: ModelFile) -> tuple[int, bool, str]:
            return small_rank(basename(file.path)), dirname(file.path) != self.path, file.path

        chosen: list[str] = []
        total = 0
        small = [file for file in self.others if is_small(basename(file.path), file.size_bytes)]
        if len(small) > SMALL_COUNT and not self.weights and not self.is_pipeline:
            return ()
        for file in sorted(small, key=order):
            if len(chosen) == SMALL_COUNT:
                break
            if total + file.size_bytes <= SMALL_TOTAL_BYTES:
                chosen.append(file.path)
                total += file.size_bytes
        return tuple(chosen)


def _gguf_models(paths: Iterable[str]) -> set[str]:
    """Names of the GGUF models in some files. A projector belongs to all of them."""
    return {
        PART.sub("", stem_of(path))
        for path in paths
        if format_of(path) == "gguf" and "mmproj" not in basename(path)
    }


def _owner_of_copy(
    directory: _Directory, directories: Mapping[str, _Directory]
) -> _Directory | None:
    """The model of which this directory is a copy: `m` for `m/original/x`. None: it is no copy."""
    if directory.read:
        return None
    parts = directory.path.split("/")
    for depth, part in enumerate(parts):
        above = directories.get("/".join(parts[:depth])) if part in COPY_DIRECTORIES else None
        if above and (above.weights or above.is_pipeline):
            return above
    above = directories.get(dirname(directory.path)) if directory.path else None
    return above if above and above.is_pipeline and directory.format == "other" else None


def _nearest(path: str, models: Mapping[str, _Directory]) -> _Directory | None:
    """The model of the closest directory above `path`."""
    while path:
        path = path.rpartition("/")[0]
        if path in models:
            return models[path]
    return None
