"""From a listing to what a loader of models will read, and in which order. Pure.

A directory that holds weights is a model and gets a `ModelLayout`. The rules, most important first:

- **One format is read.** The loaders take safetensors if there are any, then PyTorch's pickles
  (`*.bin`, else `*.pt`, `*.pth`, `*.ckpt`), as vLLM's `DefaultModelLoader._prepare_weights` does;
  then GGUF, then anything else. Weights of another format beside them are copies: excluded.
- **Shards**, of safetensors: those that `*.safetensors.index.json` names; without a usable index
  all but `consolidated*`, which is Mistral's own second copy (vLLM's
  `filter_duplicate_safetensors_files`). Shards are read in the natural order of their names
  (`shard-2` before `shard-10`; vLLM's `safetensors_weights_iterator`). vLLM's newest loader prefers
  the second copy when nobody says `--load-format`; nothing in the listing shows which it will be.
- **Variants** (`model.fp16.safetensors`, `*.non_ema.*`) are read only when someone asks for them
  by name, so they are excluded where the plain file is there, and used where it is not.
- **Copies in directories** (`original/`, `onnx/`, `openvino/`, ...) below a model are excluded.
- **Included by name**: what these rules leave out is wanted all the same, after the shards, if a
  pattern of `--include` was given for it: one that matches it and none of the shards. Where one
  matches several GGUF models it does not say which of them is read.
- **Pipelines** (diffusers): a directory with `model_index.json` above models. It gets a layout of
  its own for its small files, first; the components follow by name, which is the order in which
  diffusers loads them (`sorted` in `DiffusionPipeline.from_pretrained`). Weights beside
  `model_index.json` are single-file copies of the pipeline: excluded; so are directories with
  ONNX or the like alone, which another kind of pipeline reads.
- **GGUF**: one model, split (`-00001-of-00003.gguf`) or not, with its projector (`mmproj*`). Of
  several models in one directory one is read, and only the reader knows which: all are excluded.
- **Small files** (configuration, tokenizer, code) are wanted first. Those of a directory without
  weights belong to the nearest model above, or to the root. Very many without any weights are no
  model, and which of them somebody will read nobody knows: none is wanted before.

An index has to be fetched before it can be read. So ask twice: `layouts(files)` says where the
indexes are (`index_paths`), `layouts(files, indexes=...)` uses them.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
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
from lazyfs.options.option_types import matches

INDEX_SUFFIX = ".safetensors.index.json"
PIPELINE_INDEX = "model_index.json"
# The index of DeepSeek-V3, 90,000 tensors, has 9 MB; a parsed one takes up to 25 times its size.
MAX_INDEX_BYTES = 32 << 20

# Small files are wanted as long as those of a model fit into these limits together.
SMALL_TOTAL_BYTES = 64 << 20
SMALL_COUNT = 512

NAMES_SHOWN = 3
NO_INDEXES: Mapping[str, bytes] = MappingProxyType({})


class MalformedIndexError(ValueError):
    """A `*.safetensors.index.json` is not what its name says. The message is one line."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A listed file; `path` is relative to the mount, with `/` between its parts."""

    path: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Excluded:
    """A file of weights that no loader is expected to read, and a phrase that says why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """What a loader wants of one directory. Paths are relative to the mount.

    Attributes:
        directory: where the model is; empty for the root of the mount.
        format: of the weights that are read; `other` as well where there are none.
        small: files to have right after mounting, the one that is read first at the front; within
            `SMALL_TOTAL_BYTES` and `SMALL_COUNT`.
        shards: the weights, in the order in which a loader reads them.
        included: those at the end of `shards` that are there only because `--include` names them.
        excluded: weights that are not worth prefetching.
        index_paths: the indexes of the shards, for a second call of `layouts`.
        warnings: what is odd with this model, each a sentence for the log.
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
        """All that is wanted, in order."""
        return self.small + self.shards


def parse_index(data: bytes) -> tuple[str, ...]:
    """The distinct file names in an index, in the order in which they first appear.

    The names are as they are written; nothing says that such files exist or what they contain.

    Args:
        data: the whole `*.safetensors.index.json`.

    Raises:
        MalformedIndexError: too long, no JSON, or without a `weight_map` of strings.

    >>> parse_index(b'{"weight_map": {"a": "1.safetensors", "b": "1.safetensors"}}')
    ('1.safetensors',)
    """
    if len(data) > MAX_INDEX_BYTES:
        raise MalformedIndexError(f"it has {len(data)} bytes, the limit is {MAX_INDEX_BYTES}")
    try:
        parsed = json.loads(data.decode("utf-8"))
    except RecursionError:
        raise MalformedIndexError("it is nested too deeply") from None
    except ValueError as error:
        raise MalformedIndexError(f"it is not valid JSON: {error}") from None
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict):
        raise MalformedIndexError("it has no object 'weight_map'")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise MalformedIndexError("its 'weight_map' names something that is no string as a file")
    return tuple(dict.fromkeys(weight_map.values()))


def layouts(
    files: Iterable[ModelFile],
    *,
    indexes: Mapping[str, bytes] = NO_INDEXES,
    read: Iterable[str] = (),
    include: Sequence[str] = (),
) -> tuple[ModelLayout, ...]:
    """The models of a listing, in the order of their directories, parents first.

    Args:
        files: all files of the mount, in any order.
        indexes: the contents of indexes by their path, as far as they were fetched. One that is
            malformed or names nothing that exists leaves a warning and the order of the names.
        read: paths of weights that a loader has read. Where these rules would have it read others,
            it is followed: their like is wanted, and what the rules choose only if read as well.
        include: the patterns of what is to be shown (`MountOptions.include`).

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
        # A directory that has weights and is no model is a copy; nobody reads its small files.
        if path and path not in models and not directory.weights:
            (_nearest(path, models) or root).others += directory.others
    if root.others:
        models.setdefault("", root)
    return tuple(
        models[path].layout(indexes, include)
        for path in sorted(models, key=lambda path: path.split("/"))
    )


def wanted_models(
    found: Sequence[ModelLayout],
    *,
    on_mount: bool,
    opened: Container[str] = (),
    whole: bool = True,
) -> tuple[ModelLayout, ...]:
    """Which of the models are to be fetched now.

    The only one there is, or one at the root, from the moment of mount; of several, and otherwise,
    each from when one of its files is opened. A pipeline is one with its components.

    Args:
        on_mount: the moment of mount counts (`--prefetch-on`).
        opened: paths of the files that were opened.
        whole: there are no others than those that were found.
    """
    models = [layout for layout in found if layout.shards]
    root = next((layout for layout in found if not layout.directory), None)
    as_one = (whole and len(models) == 1) or (root is not None and PIPELINE_INDEX in root.small)
    touched = [layout for layout in found if any(path in opened for path in layout.paths)]
    if as_one:
        return tuple(found) if on_mount or touched else ()
    return tuple(
        layout
        for layout in found
        if layout in touched or (on_mount and layout is root and layout.shards)
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
    """What is known of one directory while the listing is sorted out."""

    def __init__(self, path: str) -> None:
        self.path = path
        # Weights that a loader has read, the latest at the end.
        self.read: list[str] = []
        # Names of weights, and all that is not weights, which others may add to.
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
        """Of the weights that loaders read."""
        there = {format_of(name) for name in self.weights}
        return next((candidate for candidate in FORMAT_ORDER if candidate in there), "other")

    def exclude(self, names: Iterable[str], reason: str, *, directory: str | None = None) -> None:
        """Leave out weights of this directory or of one below."""
        path = self.path if directory is None else directory
        self._excluded += (Excluded(join(path, name), reason) for name in names)

    def layout(self, indexes: Mapping[str, bytes], include: Sequence[str]) -> ModelLayout:
        """Decide; to be called once, when all directories were added."""
        index_paths: tuple[str, ...] = ()
        copies = self.weights if self.is_pipeline and not self.read else []
        self.exclude(copies, "a single-file copy of the pipeline in the directories here")
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
        """Paths of what is left out though a pattern was given for it, in loading order."""
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
        """The chosen weights, or what a loader has read instead of them or beside them."""
        strays = [name for name in self.read if name in self.weights and name not in names]
        if not strays:
            return names
        families = {family_of(name) for name in strays}
        like = [name for name in self.weights if family_of(name) in families]
        kept = names if set(names).intersection(self.read) else []
        self._excluded = [item for item in self._excluded if basename(item.path) not in like]
        self.exclude(
            (name for name in names if name not in kept),
            f"the loader reads {strays[-1]} and its like instead",
        )
        return sorted({*kept, *like})

    def _index_paths(self, shards: list[str]) -> tuple[str, ...]:
        """The indexes of the shards that are read, not of Mistral's second copy of them."""
        second = all(is_consolidated(name) for name in shards)
        return tuple(
            sorted(
                file.path
                for file in self.others
                if file.path.endswith(INDEX_SUFFIX)
                and dirname(file.path) == self.path
                and is_consolidated(basename(file.path)) == second
            )
        )

    def _safetensors(
        self, names: list[str], index_paths: Iterable[str], indexes: Mapping[str, bytes]
    ) -> list[str]:
        named: set[str] = set()
        for path in index_paths:
            if path in indexes:
                named |= self._named(path, indexes[path], set(names))
        if named:
            self.exclude(
                (name for name in names if name not in named),
                "not named in the index of the shards",
            )
            return [name for name in names if name in named]
        consolidated = [name for name in names if is_consolidated(name)]
        if 0 < len(consolidated) < len(names):
            self.exclude(consolidated, "Mistral's second copy of the shards beside it")
            names = [name for name in names if not is_consolidated(name)]
        return self._without_variants(names)

    def _named(self, path: str, index: bytes, listed: set[str]) -> set[str]:
        """The shards that an index names and that exist; for anything else a warning."""
        try:
            names = parse_index(index)
        except MalformedIndexError as error:
            self._warnings.append(f"{path} is ignored: {error}; shards are read by their names")
            return set()
        foreign = [name for name in names if _is_foreign(name)]
        missing = [name for name in names if name not in listed and not _is_foreign(name)]
        if foreign:
            self._warnings.append(f"{path} names files outside its directory: {_some(foreign)}")
        if missing:
            self._warnings.append(f"{path} names shards that do not exist: {_some(missing)}")
        found = listed.intersection(names)
        if not found:
            self._warnings.append(f"{path} is ignored: it names none of the shards beside it")
        return found

    def _without_variants(self, names: list[str]) -> list[str]:
        plain = {
            PART.sub("", stem_of(name)) for name in names if not VARIANT.fullmatch(stem_of(name))
        }
        kept = []
        for name in names:
            variant = VARIANT.fullmatch(stem_of(name))
            if variant and PART.sub("", variant["stem"]) in plain:
                self.exclude([name], "a variant, read only where its name is asked for")
            else:
                kept.append(name)
        return kept

    def _pytorch(self, names: list[str]) -> list[str]:
        there = {suffix_of(name) for name in names}
        chosen = next(suffix for suffix in PYTORCH_ORDER if suffix in there)
        self.exclude(
            (name for name in names if suffix_of(name) != chosen),
            f"a copy under another suffix than {chosen}, which loaders read instead",
        )
        return self._without_variants([name for name in names if suffix_of(name) == chosen])

    def _gguf(self, names: list[str]) -> list[str]:
        models = _gguf_models(names)
        if len(models) <= 1:
            return names
        self.exclude(names, f"one of {len(models)} GGUF models; the one that is opened is read")
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
    """Of which GGUF models some files are; a projector is of any of them."""
    return {
        PART.sub("", stem_of(path))
        for path in paths
        if format_of(path) == "gguf" and "mmproj" not in basename(path)
    }


def _owner_of_copy(
    directory: _Directory, directories: Mapping[str, _Directory]
) -> _Directory | None:
    """The model of which this is a copy, as `m` for `m/original/x`; None if it is none."""
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


def _is_foreign(name: str) -> bool:
    return "/" in name or name in ("", ".", "..")


def _some(names: Sequence[str]) -> str:
    """The first of many names, for a warning."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(ascii(name) for name in names[:NAMES_SHOWN]) + more
