"""Files that say what belongs to a model. Pure.

`*.safetensors.index.json` and `*.bin.index.json` name the shards of a model, and `model_index.json`
the components of a pipeline of diffusers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from posixpath import dirname, join, normpath

from lazyfs.model.json_cost import MOST_PARSED_BYTES, json_cost
from lazyfs.model.soundness import POINTER

PIPELINE_INDEX = "model_index.json"
# The index of a variant (`model.safetensors.index.fp16.json`) is left alone: the numbers of its
# shards say what is there.
SHARD_INDEX = re.compile(r"(?P<stem>.+)(?P<suffix>\.safetensors|\.bin)\.index\.json$")
# The index of DeepSeek-V3 has 90,000 tensors and 9 MB.
MAX_INDEX_BYTES = 32 << 20

NAMES_SHOWN = 3
# Classes of components that have no weights.
_NO_WEIGHTS = re.compile(r"(Scheduler|Tokenizer|TokenizerFast|Processor|Extractor)$")


class MalformedIndexError(ValueError):
    """An index cannot be used. The message is one line."""


class BrokenIndexError(MalformedIndexError):
    """No loader can read an index."""


@dataclass(frozen=True, slots=True)
class NamedShards:
    """What an index names.

    Attributes:
        found: names of shards that exist.
        missing: names of shards that do not.
        warnings: what is odd with the index itself.
        broken: why no loader can read the index; None if one can.
    """

    found: Set[str] = frozenset()
    missing: Sequence[str] = ()
    warnings: Sequence[str] = ()
    broken: str | None = None


def parse_index(data: bytes) -> tuple[str, ...]:
    """The distinct file names in an index of shards, in the order in which they first appear.

    The names are returned as they are written. The files may not exist.

    Args:
        data: the whole file.

    Raises:
        MalformedIndexError: it is too long, is not JSON, or has no `weight_map` of strings.

    >>> parse_index(b'{"weight_map": {"a": "1.safetensors", "b": "1.safetensors"}}')
    ('1.safetensors',)
    """
    parsed = _parse(data)
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict):
        raise MalformedIndexError("it has no object 'weight_map'")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise MalformedIndexError("its 'weight_map' has a file name that is not a string")
    return tuple(dict.fromkeys(weight_map.values()))


def parse_pipeline(data: bytes) -> frozenset[str]:
    """The components that a `model_index.json` names, which are directories beside it.

    A component is a pair of library and class; one that is left out is `[null, null]`. A class
    whose name begins with `Multi` may have more directories, with numbers: they are returned as
    `controlnet_*` (`MultiControlNetModel.save_pretrained`). All other
    values are settings of the pipeline (diffusers, `DiffusionPipeline.from_pretrained`). Components
    without weights, such as a scheduler, are not returned.

    Raises:
        MalformedIndexError: it is too long, is not JSON, or names no component.

    >>> parse_pipeline(b'{"vae": ["diffusers", "AutoencoderKL"], "safety_checker": [null, null]}')
    frozenset({'vae'})
    """
    parsed = _parse(data)
    classes = {
        name: value[1]
        for name, value in (parsed.items() if isinstance(parsed, dict) else ())
        if isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)
        if not _NO_WEIGHTS.search(value[1])
    }
    if not classes:
        raise MalformedIndexError("it names no component")
    more = (f"{name}_*" for name, kind in classes.items() if kind.startswith("Multi"))
    return frozenset((*classes, *more))


def _parse(data: bytes) -> object:
    if len(data) > MAX_INDEX_BYTES:
        raise MalformedIndexError(f"it has {len(data)} bytes, the limit is {MAX_INDEX_BYTES}")
    if json_cost(data) > MOST_PARSED_BYTES:
        raise MalformedIndexError("parsing it takes too much memory")
    try:
        parsed: object = json.loads(data.decode("utf-8"))
    except RecursionError:
        raise MalformedIndexError("it is nested too deeply") from None
    except ValueError as error:
        if data.startswith(POINTER):  # `soundness.py` looks at all files for these
            raise MalformedIndexError("it is a Git LFS pointer") from None
        raise BrokenIndexError(f"it is not valid JSON: {error}") from None
    return parsed


def named_shards(
    path: str, index: bytes, listed: Set[str], exists: Callable[[str], bool]
) -> NamedShards:
    """The shards that an index names.

    Args:
        path: of the index, for messages.
        index: its contents.
        listed: names of the weights in its directory.
        exists: whether there are weights at a path in another directory.
    """
    try:
        names = parse_index(index)
    except BrokenIndexError as error:
        return NamedShards(broken=f"{path} is broken: {error}; upload it again")
    except MalformedIndexError as error:
        ignored = f"{path} is ignored: {error}; shards are read in the order of their names"
        return NamedShards(warnings=[ignored])
    warnings = []
    if foreign := [name for name in names if _is_foreign(name)]:
        warnings.append(f"{path} names files outside its directory: {shown(foreign)}")
    found = listed & set(names)
    if not found:
        warnings.append(f"{path} is ignored: it names none of the shards in its directory")
    place = dirname(path)
    missing = [
        name
        for name in names
        if not (exists(normpath(join(place, name))) if _is_foreign(name) else name in listed)
    ]
    return NamedShards(found, missing, warnings)


def _is_foreign(name: str) -> bool:
    return "/" in name or name in ("", ".", "..")


def shown(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(ascii(name) for name in names[:NAMES_SHOWN]) + more
