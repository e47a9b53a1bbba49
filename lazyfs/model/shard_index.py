"""The index of a sharded model, `*.safetensors.index.json`: which shards belong to it. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence, Set

INDEX_SUFFIX = ".safetensors.index.json"
# The index of DeepSeek-V3 has 90,000 tensors and 9 MB. Parsed, an index takes up to 25 times its
# size in memory.
MAX_INDEX_BYTES = 32 << 20

NAMES_SHOWN = 3


class MalformedIndexError(ValueError):
    """A `*.safetensors.index.json` is not a valid index. The message is one line."""


def parse_index(data: bytes) -> tuple[str, ...]:
    """The distinct file names in an index, in the order in which they first appear.

    The names are returned as they are written. The files may not exist.

    Args:
        data: the whole `*.safetensors.index.json`.

    Raises:
        MalformedIndexError: it is too long, is not JSON, or has no `weight_map` of strings.

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
        raise MalformedIndexError("its 'weight_map' has a file name that is not a string")
    return tuple(dict.fromkeys(weight_map.values()))


def named_shards(path: str, index: bytes, listed: Set[str]) -> tuple[Set[str], list[str]]:
    """The shards that an index names and that exist.

    Args:
        path: of the index, for warnings.
        index: its contents.
        listed: names of the shards in its directory.

    Returns:
        The names, and a warning for everything that is wrong with the index.
    """
    try:
        names = parse_index(index)
    except MalformedIndexError as error:
        return set(), [f"{path} is ignored: {error}; shards are read in the order of their names"]
    warnings = []
    foreign = [name for name in names if _is_foreign(name)]
    missing = [name for name in names if name not in listed and not _is_foreign(name)]
    if foreign:
        warnings.append(f"{path} names files outside its directory: {_shown(foreign)}")
    if missing:
        warnings.append(f"{path} names shards that do not exist: {_shown(missing)}")
    found = listed & set(names)
    if not found:
        warnings.append(f"{path} is ignored: it names none of the shards in its directory")
    return found, warnings


def _is_foreign(name: str) -> bool:
    return "/" in name or name in ("", ".", "..")


def _shown(names: Sequence[str]) -> str:
    """The first few names, for a warning."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(ascii(name) for name in names[:NAMES_SHOWN]) + more
