"""One directory of a listing: its weights, its small files, and what its indexes say. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from posixpath import basename, dirname, join

from lazyfs.model.filenames import (
    IMATRIX,
    MODEL,
    OLLAMA_BLOB,
    TRAINING_STATE,
    Format,
    format_of,
    is_configuration,
    is_consolidated,
    is_projector,
    is_small,
    is_tokenizer,
    may_be_weights,
    split_variant,
    stem_of,
)
from lazyfs.model.indexes import (
    MAX_INDEX_BYTES,
    PIPELINE_INDEX,
    SHARD_INDEX,
    named_shards,
    shown,
)
from lazyfs.model.loading_order import natural_order, small_file_order
from lazyfs.model.weight_choice import Choice, choose
from lazyfs.model.weight_sets import group
from lazyfs.options.option_types import matches

# Limits on the small files of one model that are fetched ahead.
SMALL_TOTAL_BYTES = 64 << 20
SMALL_COUNT = 512


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A listed file. `path` is relative to the mount, with `/` as separator."""

    path: str
    size_bytes: int


class Directory:
    """One directory.

    Args:
        path: relative to the mount; empty for its root.

    Attributes:
        read: names of weights that a loader has read, the latest last.
        opened: names of weights that were opened.
        weights: sizes in bytes of weights, by name.
        others: all small files, later also those of subdirectories without weights.
        has_pipeline_index: there is a `model_index.json`.
        indexes: those of shards, by path.
        excluded: why weights here or below are not read, by path.
        choice: what is read; see `decide`.
        warnings: what is odd, one sentence each.
        problems: why no loader can load this model, one sentence each.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.read: list[str] = []
        self.opened: list[str] = []
        self.weights: dict[str, int] = {}
        self.others: list[ModelFile] = []
        self.has_pipeline_index = False
        self.indexes: dict[str, int] = {}
        self.excluded: dict[str, str] = {}
        self.choice = Choice([])
        self.warnings: list[str] = []
        self.problems: list[str] = []
        self._configuration: list[str] = []
        # What would be read if no loader had read anything.
        self._expected: list[str] = []
        # Sizes of files that may be weights, though their format is not known.
        self._unknown: dict[str, int] = {}

    def add(self, name: str, file: ModelFile) -> None:
        """Add a file of this directory."""
        if TRAINING_STATE.fullmatch(name):
            self.excluded[file.path] = "training state, which only a trainer reads"
        elif IMATRIX.fullmatch(name):
            self.excluded[file.path] = "an importance matrix, which only quantisers read"
        elif format_of(name) and not (
            OLLAMA_BLOB.fullmatch(name) and is_small(name, file.size_bytes)
        ):
            self.weights[name] = file.size_bytes
        elif may_be_weights(name, file.size_bytes):
            self._unknown[name] = file.size_bytes
        else:
            self.others.append(file)
            self.has_pipeline_index |= name == PIPELINE_INDEX
            if SHARD_INDEX.fullmatch(name):
                self.indexes[file.path] = file.size_bytes
            if is_configuration(name):
                self._configuration.append(name)

    @property
    def is_configured(self) -> bool:
        """Whether something here configures one model, and not one file of many."""
        stems = {stem_of(name) for name in self.weights}
        return any(stem_of(name) not in stems for name in self._configuration)

    def take_unknown(self, above: Directory | None) -> None:
        """Count large files of unknown formats as weights, if they can be those of a model.

        They can if this directory or the one above is configured, or if there is one ONNX model,
        whose external data may have any name.
        """
        models = sum(name.endswith(".onnx") for name in self.weights)
        if self._unknown and (
            self.is_configured or models == 1 or (above is not None and above.is_configured)
        ):
            self.weights.update(self._unknown)

    @property
    def formats(self) -> set[Format]:
        """Of all weights."""
        return {format_of(name) or "other" for name in self.weights}

    @property
    def has_language_model(self) -> bool:
        """Whether what is read is the model of a tokenizer that is here too."""
        has_model = any(each.identity == MODEL for each in self.choice.sets)
        return has_model and any(is_tokenizer(basename(file.path)) for file in self.others)

    @property
    def is_seen(self) -> bool:
        """Whether weights were read or opened."""
        return bool(self.read or self.opened)

    @property
    def variants(self) -> tuple[set[str], set[str]]:
        """Of what was read, and of what was opened; an empty one is none."""
        read = {each.variant for each in group(self.read, {})}
        return read, read | {each.variant for each in group(self.opened, {})}

    def exclude(self, directory: Directory, reason: str) -> None:
        """Exclude all weights of this directory, or of one below."""
        for name in directory.weights:
            self.excluded[join(directory.path, name)] = reason
        if directory is self:
            self.weights, self.indexes = {}, {}

    def decide(
        self,
        contents: Mapping[str, bytes],
        *,
        exists: Callable[[str], bool],
        is_one_model: bool,
        variant: str = "",
    ) -> None:
        """Decide which weights are read.

        Args:
            contents: of the indexes that were fetched so far, by path.
            exists: whether there are weights at a path.
            is_one_model: it is configured as one.
            variant: that a loader reads elsewhere in this pipeline; empty: none.
        """
        files = self.weights
        is_one_model = is_one_model or bool(self.indexes)
        first = choose(files, indexed={}, is_one_model=is_one_model, variant=variant)
        self._expected = first.names
        self._choose_indexes(first)
        indexed = {}
        missing = {}
        for path in self.indexes:
            if path in contents:
                named = named_shards(path, contents[path], files.keys(), exists)
                stem = SHARD_INDEX.sub(r"\g<stem>", basename(path))
                self.warnings += named.warnings
                # Loaders look for one file of that name first.
                single = SHARD_INDEX.sub(r"\g<stem>\g<suffix>", basename(path))
                if named.broken and single not in files:
                    self.problems.append(named.broken)
                missing[stem] = f"{path} names shards that do not exist", named.missing
                if named.found:
                    indexed[stem] = named.found
        self.choice = first
        if indexed or self.is_seen:
            self.choice = choose(
                files,
                indexed=indexed,
                is_one_model=is_one_model,
                read=self.read,
                opened=self.opened,
                variant=variant,
            )
        read = {each.stem for each in self.choice.sets if each.indexed}
        for each in (*self.choice.sets, *self.choice.alternatives):
            where = f"{self.path or 'the root'}: of {each.parts} parts some are missing"
            missing[each.names[0]] = where, each.missing()
        for stem, (what, names) in missing.items():
            if names and (stem in files or not indexed or split_variant(stem, "other")[0] in read):
                self.problems.append(f"{what}: {shown(names)}; upload them")
        for name, reason in self.choice.excluded.items():
            self.excluded[join(self.path, name)] = reason

    def _choose_indexes(self, choice: Choice) -> None:
        """Keep the indexes of what is read, without that of Mistral's second copy.

        A file that is too large for an index is never fetched whole.
        """
        read = {(each.format, each.is_consolidated) for each in choice.sets}
        kept = {}
        for path, size in sorted(self.indexes.items()):
            name = basename(path)
            form: Format = "pytorch" if name.endswith(".bin.index.json") else "safetensors"
            if self.weights and (form, is_consolidated(name)) not in read:
                continue
            if size <= MAX_INDEX_BYTES:
                kept[path] = size
            else:
                self.warnings.append(
                    f"{path} is ignored: it has {size} bytes, the limit is {MAX_INDEX_BYTES}; "
                    "shards are read in the order of their names"
                )
        self.indexes = kept

    def included(self, patterns: Iterable[str]) -> list[str]:
        """Excluded files that `--include` asks for by a pattern of their own, in loading order."""
        chosen = [join(self.path, name) for name in (*self._expected, *self.choice.names)]
        found: set[str] = set()
        for pattern in patterns:
            if any(matches(path, [pattern]) for path in chosen):
                continue
            meant = [path for path in self.excluded if matches(path, [pattern])]
            if self._models_in(meant) <= 1:
                found.update(meant)
        return sorted(found, key=natural_order)

    def _models_in(self, paths: Iterable[str]) -> int:
        """How many models of which one is read are among some files."""
        sets = group([basename(path) for path in paths if dirname(path) == self.path], {})
        alternatives = {name for each in self.choice.alternatives for name in each.names}
        return sum(
            (each.format == "gguf" or not alternatives.isdisjoint(each.names))
            and not is_projector(each.stem)
            for each in sets
        )

    def small(self) -> Sequence[str]:
        """Small files in the order in which they are read, within the limits."""

        def order(file: ModelFile) -> tuple[int, bool, str]:
            return small_file_order(file.path, self.path)

        chosen: list[str] = []
        total = 0
        small = [file for file in self.others if is_small(basename(file.path), file.size_bytes)]
        if len(small) > SMALL_COUNT and not self.weights and not self.has_pipeline_index:
            return ()
        for file in sorted(small, key=order):
            if len(chosen) == SMALL_COUNT:
                break
            if total + file.size_bytes <= SMALL_TOTAL_BYTES:
                chosen.append(file.path)
                total += file.size_bytes
        return chosen
