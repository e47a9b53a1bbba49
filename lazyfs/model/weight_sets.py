"""Sets of weights: the files of one directory that a loader reads together. Pure.

A set is the shards that an index names, the numbered parts of a model, an ONNX file with its
external data, or one file. Sets with the same *identity* hold the same model: `model.safetensors`,
`pytorch_model.bin` and `consolidated.00.pth` do, and so do two files that differ only in their
suffix or variant.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

from lazyfs.model.filenames import (
    MODEL,
    NUMBER,
    PART,
    Format,
    format_of,
    identity_of,
    is_consolidated,
    split_variant,
    stem_of,
    suffix_of,
)
from lazyfs.model.loading_order import natural_order

CORE: frozenset[Format] = frozenset({"safetensors", "pytorch"})
# No model has more parts; a name may say anything.
MOST_PARTS = 10_000


@dataclass(slots=True, eq=False)
class WeightSet:
    """Files of one directory that are read together.

    Attributes:
        format: of its files.
        stem: their common name, without suffix, part number and variant.
        variant: such as `fp16`; empty: none.
        suffix: of the files.
        indexed: an index names them.
        names: without directories.
        parts: how many there should be, if their names say so; else 0.
    """

    format: Format
    stem: str
    variant: str
    suffix: str
    indexed: bool = False
    names: list[str] = field(default_factory=list)
    parts: int = 0

    @property
    def identity(self) -> str:
        """The same for all copies of one model."""
        return identity_of(self.stem)

    @property
    def is_consolidated(self) -> bool:
        """Whether this is Mistral's second copy of a model."""
        return is_consolidated(self.stem)

    @property
    def is_whole(self) -> bool:
        """Whether this can only be a whole model, and not a component of one."""
        return self.format not in CORE and (self.format != "onnx" or MODEL in self.stem)

    def missing(self) -> list[str]:
        """Names of parts that do not exist; at most as many as there are parts."""
        if self.indexed or not self.parts:
            return []
        found = PART.search(stem_of(self.names[0]))
        assert found is not None, "only numbered parts have a count"
        before = stem_of(self.names[0])[: found.start("number")]
        after = stem_of(self.names[0])[found.end("number") :] + suffix_of(self.names[0])
        first = 0 if any(int(_number(name)) == 0 for name in self.names) else 1
        numbers = range(first, first + min(self.parts, MOST_PARTS))
        wanted = (f"{before}{number:0{len(found['number'])}}{after}" for number in numbers)
        return [name for name in wanted if name not in self.names]


def group(
    files: Iterable[str], indexed: Mapping[str, Iterable[str]], data: Container[str] = ()
) -> list[WeightSet]:
    """Sort weights into sets.

    Args:
        data: the files that are external data of ONNX models, although their suffix is another's.
    """
    sets: dict[tuple[str, str, str, bool, bool], WeightSet] = {}
    index_of = {name: stem for stem, names in indexed.items() for name in names}
    names = sorted(files, key=natural_order)
    numbered = _numbered_from_the_beginning(names)
    for name in names:
        form, suffix = format_of(name) or "other", suffix_of(name)
        if name in data:
            form = "other"
        stem, count = stem_of(name), 0
        if form == "other":
            stem = suffix = ""  # an engine or a checkpoint of many files
        elif form == "onnx":
            suffix = ".onnx"
        elif name in index_of:
            stem = index_of[name]
        elif found := PART.search(stem):
            stem, count = stem[: found.start()], int(found["count"])
        elif name in numbered:
            stem = NUMBER.sub("", stem)
        base, variant = split_variant(stem, form)
        key = (form, suffix, stem, name in index_of, count > 0)
        if key not in sets:
            sets[key] = WeightSet(form, base, variant, suffix, name in index_of)
        sets[key].names.append(name)
        sets[key].parts = max(sets[key].parts, count)
    return list(sets.values())


def data_of_graphs(files: Mapping[str, int]) -> set[str]:
    """The `.bin` file that has the data of ONNX models: larger than these, and nothing else here.

    Several may be models of their own (`ggml-base.bin`, `ggml-large.bin` beside a small one).
    """
    graphs = [name for name in files if name.endswith(".onnx")]
    forms = {format_of(name) for name in files}
    data = {name for name in files if name.endswith(".bin") and format_of(name) == "pytorch"}
    is_data = (
        bool(graphs)
        and len(data) == 1
        and forms == {"onnx", "pytorch"}
        and all(
            identity_of(stem_of(name)) != MODEL and not PART.search(stem_of(name)) for name in data
        )
        and sum(files[name] for name in graphs) < sum(files[name] for name in data)
    )
    return data if is_data else set()


def _number(name: str) -> str:
    found = PART.search(stem_of(name))
    return found["number"] if found else "1"


def _numbered_from_the_beginning(names: Iterable[str]) -> set[str]:
    """Names that end in all numbers from 0 or 1 on: parts, and not versions (`v1-4`, `v1-5`)."""
    found: defaultdict[str, dict[int, str]] = defaultdict(dict)
    for name in names:
        if number := NUMBER.search(stem_of(name)):
            series = name[: number.start()] + suffix_of(name)
            found[series][int(number["number"])] = name
    return {
        name
        for series in found.values()
        if len(series) > 1 or 0 in series
        if sorted(series) in (list(range(len(series))), list(range(1, len(series) + 1)))
        for name in series.values()
    }
