"""Which weights of one directory a loader reads. Pure.

Files that are read together are a set (`weight_sets.py`). The rules, in the order in which they
apply:

1. **Other formats.** GGUF, exports to other frameworks, and ONNX files that are named like a model
   are whole models: copies beside safetensors or PyTorch files. Of a format that is only
   known by its engine, or not at all (`other`), the set is read if it has most of the bytes. So
   is data of ONNX models in `.bin` files, which are larger than these.
2. **Copies.** Of the sets of one identity one is read: the first in the order of formats
   (safetensors, PyTorch: `.bin`, `.pt`, `.pth`, `.ckpt`; GGUF; ONNX), in which Mistral's
   `consolidated*` comes last and a set with an index first. vLLM's `_prepare_weights` and
   `filter_duplicate_safetensors_files` choose so.
3. **Variants** (`model.fp16.safetensors`) are read if a loader has read one in this pipeline, or if
   there is no plain file. It is not known which of several ONNX variants a loader reads, so none
   is fetched until it reads one.
4. **Many models.** Several GGUF models are alternatives. So are several sets of a directory that
   nothing configures (`config.json`, an index, a tokenizer, YAML; not one with the name of a
   single file): checkpoints, LoRA adapters. None of them is fetched before it is loaded, and none
   of several projectors.
5. **Components.** Everything that is left is read: a text encoder beside the shards, the parts of a
   text-to-speech model. Text encoders come first, then the model itself, then other components.
6. **The loader is followed.** A set that a loader has read is read. It replaces the sets that hold
   the same model, unless something of them was read as well. It never replaces components. To
   open a file counts as much, if nothing of what it would replace was opened, and does not choose
   one of many models: programs look at the headers of all files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lazyfs.model.filenames import FORMAT_ORDER, MODEL, PYTORCH_ORDER, Format, is_projector
from lazyfs.model.loading_order import weight_set_order
from lazyfs.model.weight_sets import CORE, WeightSet, data_of_graphs, group


@dataclass(slots=True)
class Choice:
    """What is read of a directory.

    Attributes:
        sets: those that are read, in the order in which a loader reads them.
        excluded: why others are not, by name.
        alternatives: models of which a loader reads one, and has read none yet.
    """

    sets: list[WeightSet]
    excluded: dict[str, str] = field(default_factory=dict)
    alternatives: list[WeightSet] = field(default_factory=list)

    @property
    def format(self) -> Format:
        """The format of the model, or of the first thing that is read."""
        if not self.sets:
            return "other"
        models = (each for each in self.sets if each.indexed or each.identity == MODEL)
        return next(models, self.sets[0]).format

    @property
    def names(self) -> list[str]:
        """All files that are read, in order."""
        return [name for each in self.sets for name in each.names]

    def drop(self, reasons: Mapping[WeightSet, str]) -> None:
        """Exclude sets, all at once: there may be 100,000."""
        self.sets = [each for each in self.sets if each not in reasons]
        for each, reason in reasons.items():
            self.excluded.update(dict.fromkeys(each.names, reason))


def choose(
    files: Mapping[str, int],
    *,
    indexed: Mapping[str, Iterable[str]],
    is_one_model: bool,
    read: Sequence[str] = (),
    opened: Sequence[str] = (),
    variant: str = "",
) -> Choice:
    """Apply the rules.

    Args:
        files: sizes of all weights of a directory, by name.
        indexed: for the stem of each usable index the existing files that it names.
        is_one_model: the directory is configured as one model.
        read: names of weights that a loader has read, the latest last.
        opened: names of weights that were opened.
        variant: that a loader has read elsewhere in this pipeline; empty: none.
    """
    every = group(files, indexed, data_of_graphs(files))
    choice = Choice(list(every))
    is_one_model = is_one_model or any(
        each.format in CORE and (each.indexed or len(each.names) > 1) for each in every
    )
    _leave_out_formats(choice, files)
    _leave_out_copies(choice)
    _leave_out_variants(choice, variant)
    _leave_out_alternatives(choice, is_one_model)
    _follow(choice, every, read, opened)
    choice.sets.sort(key=_order)
    return choice


def _leave_out_formats(choice: Choice, files: Mapping[str, int]) -> None:
    """Rule 1."""
    core = [each for each in choice.sets if each.format in CORE]
    others = [each for each in choice.sets if each.format == "other"]
    known = [each for each in choice.sets if each.format not in ("other", "export")]
    has_most = _bytes(others, files) > _bytes(known, files)
    present = {each.format for each in choice.sets}
    first = next((form for form in FORMAT_ORDER if form in present), "other")
    reason = f"a copy in another format than {first}, which loaders read instead"
    copies = {}
    for each in choice.sets:
        if each.format == "other":
            is_copy = bool(known) and not has_most
        else:
            is_copy = each.is_whole and (bool(core) or each.format != first)
        if is_copy:
            copies[each] = reason
    choice.drop(copies)


def _bytes(sets: Iterable[WeightSet], files: Mapping[str, int]) -> int:
    return sum(files[name] for each in sets for name in each.names)


def _leave_out_copies(choice: Choice) -> None:
    """Rule 2."""
    best: dict[str, WeightSet] = {}
    for each in sorted(choice.sets, key=_preference):
        best.setdefault(each.identity, each)
    models = [each for each in choice.sets if each.format in CORE and each.stem != "adapter_model"]
    # Any better set makes Mistral's a second copy, so the best one decides.
    first = min(
        (each for each in models if not each.is_consolidated), key=_preference, default=None
    )
    copies = {}
    for each in choice.sets:
        chosen = best[each.identity]
        if each.format != chosen.format:
            reason = f"a copy in another format than {chosen.format}, which loaders read instead"
        elif each.is_consolidated and first and _preference(first) < _preference(each):
            reason = "Mistral's second copy of the shards in this directory"
        elif each is chosen or each.variant != chosen.variant:
            continue  # see rule 3
        elif each.indexed != chosen.indexed:
            reason = "not named in the index of the shards"
        elif each.suffix != chosen.suffix:
            reason = f"a copy with another suffix than {chosen.suffix}, which loaders read instead"
        else:
            reason = f"a copy of {chosen.names[0]}, which loaders read instead"
        copies[each] = reason
    choice.drop(copies)


def _preference(each: WeightSet) -> tuple[int, bool, bool, int, int, str]:
    """Of sets with the same identity the least is read."""
    suffix = PYTORCH_ORDER.index(each.suffix) if each.suffix in PYTORCH_ORDER else 0
    form = FORMAT_ORDER.index(each.format)
    return (
        form,
        each.is_consolidated,
        not each.indexed,
        suffix,
        bool(each.variant) * 2 + (len(each.names) == 1),
        each.stem,
    )


def _leave_out_variants(choice: Choice, preferred: str) -> None:
    """Rule 3."""
    found: defaultdict[str, list[WeightSet]] = defaultdict(list)
    for each in choice.sets:
        found[each.identity].append(each)
    dropped: dict[WeightSet, str] = {}
    data = [each for each in choice.sets if each.format == "other"]
    for sets in found.values():
        if len(sets) == 1:
            continue
        if sets[0].format == "onnx":
            choice.alternatives += sets
            dropped |= dict.fromkeys(sets, f"one of {len(sets)} variants; {_WHEN}")
            of_variants = f"data of one of {len(sets)} variants, which are not read yet"
            dropped |= dict.fromkeys(data, of_variants)
            data = []
            continue
        variants = {each.variant for each in sets}
        chosen = preferred if preferred in variants else "" if "" in variants else None
        for each in sets:
            if chosen is not None and each.variant != chosen:
                dropped[each] = "a variant, read only if a user asks for it"
    choice.drop(dropped)


_WHEN = "one is fetched when it is loaded"


def _leave_out_alternatives(choice: Choice, is_one_model: bool) -> None:
    """Rule 4."""
    projectors = [each for each in choice.sets if is_projector(each.stem)]
    if len(projectors) > 1:
        choice.drop(dict.fromkeys(projectors, f"one of {len(projectors)} projectors; {_WHEN}"))
    models = [each for each in choice.sets if not is_projector(each.stem)]
    if len(models) <= 1 or (is_one_model and models[0].format != "gguf"):
        return
    if any(each.format == "other" for each in models) and {each.format for each in models} <= {
        "onnx",
        "other",
    }:
        return  # an ONNX model and its external data
    choice.alternatives += models
    what = "GGUF models" if models[0].format == "gguf" else "models in this directory"
    choice.drop(dict.fromkeys(choice.sets, f"one of {len(models)} {what}; {_WHEN}"))


def _follow(
    choice: Choice, every: Iterable[WeightSet], read: Sequence[str], opened: Sequence[str]
) -> None:
    """Rule 6."""
    seen = {*read, *opened}
    for each in every:
        if seen.isdisjoint(each.names) or each in choice.sets:
            continue
        rivals = [other for other in choice.sets if _are_rivals(each, other)]
        loaded = [name for name in read if name in each.names]
        if not loaded:
            if not rivals or any(not seen.isdisjoint(other.names) for other in rivals):
                continue
            loaded = [name for name in opened if name in each.names]
        instead = f"the loader reads {loaded[-1]} and similar files instead"
        unread = (other for other in rivals if not set(other.names).intersection(read))
        choice.drop(dict.fromkeys(unread, instead))
        choice.sets.append(each)
        for name in each.names:
            del choice.excluded[name]


def _are_rivals(each: WeightSet, other: WeightSet) -> bool:
    """Whether a loader that reads one of them does not need the other."""
    return (
        each.identity == other.identity
        or (each.is_whole and each.format != other.format)
        or each.is_consolidated
        or other.is_consolidated
    )


def _order(each: WeightSet) -> tuple[int, object]:
    return weight_set_order(each.names[0], is_main=each.indexed or each.identity == MODEL)
