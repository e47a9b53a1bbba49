"""The header of a safetensors file made into a table of tensors. Pure: bytes in, a table out.

The format (https://github.com/huggingface/safetensors#format): 8 bytes with the length N of the
header, unsigned and little-endian; N bytes of JSON, `{name: {dtype, shape, data_offsets}}` and
perhaps `"__metadata__": {str: str}`; then the bytes of the tensors. `data_offsets` count from the
end of the header; a `Tensor` counts from the beginning of the file, like a read does.

What is refused follows the reference, the safetensors crate as of 0.8.0: what it refuses needs no
table, since no loader reads it, and the file itself is served all the same. An unknown dtype is
among that. Found by trying, these are the differences:

- We refuse and the crate takes: white space before the `{` and a key twice in one object (the
  format forbids both, the crate takes the last key); the forms that only serde knows, a tensor as
  `[dtype, shape, data_offsets]` and a dtype as `{"U8": null}`; a header of more than
  `MAX_HEADER_VALUES` values, which no model comes near.
- We take and the crate refuses: `-0` for 0, and in fields that both ignore nesting deeper than
  127, numbers beyond a double, and half a surrogate pair.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from types import MappingProxyType
from typing import NoReturn, TypeAlias, TypeGuard

Buffer: TypeAlias = bytes | bytearray | memoryview

LENGTH_BYTES = 8
# Read first of a shard: more than nearly all headers have, and whole pages.
HEAD_BYTES = 64 << 10
# A longer header is not fetched ahead of its readers. Parsing takes 5 ms for a usual header (300
# tensors), but seconds for the longest that the format allows.
LONGEST_HEADER = 16 << 20
# N at most; MAX_HEADER_SIZE of the crate.
MAX_HEADER_LENGTH = 100_000_000
# A parsed value takes up to 100 bytes of memory, and JSON can say one in two bytes of header. With
# this limit the worst header of 100 MB takes 1 GB and 1.5 s (measured); 400,000 tensors of two
# dimensions have so many values, and take 50 MB of header.
MAX_HEADER_VALUES = 4_000_000
# The crate computes in 64 bits and refuses what does not fit.
U64_MAX = 2**64 - 1
SHOWN_LETTERS = 80

# Bits of one element. The names are those that the crate 0.8.0 lists in its own error message.
DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 8,
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "U8": 8,
        "I8": 8,
        "F8_E5M2": 8,
        "F8_E4M3": 8,
        "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8,
        "I16": 16,
        "U16": 16,
        "F16": 16,
        "BF16": 16,
        "I32": 32,
        "U32": 32,
        "F32": 32,
        "C64": 64,
        "F64": 64,
        "I64": 64,
        "U64": 64,
    }
)


class MalformedHeaderError(ValueError):
    """The file is no safetensors file, or a broken one. The message is one line for a person."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: bytes `begin` to `end` of the file, the end not included."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class TensorTable:
    """What a header says. The tensors cover the file from the end of the header without a gap.

    Attributes:
        header_bytes: the length field and the header, 8+N; where the first tensor begins.
        tensors: in the order of their bytes, which is the order of `safe_open(...).keys()`.
        metadata: what the writer said of the file, such as `{"format": "pt"}`.
        size_bytes: the size of the whole file.
    """

    header_bytes: int
    tensors: tuple[Tensor, ...]
    metadata: Mapping[str, str]
    size_bytes: int

    def at(self, offset: int) -> Tensor | None:
        """The tensor that holds the byte at `offset` of the file; None in the header and beyond."""
        # Of tensors with the same begin only the last one can have bytes.
        index = bisect_right(self.tensors, offset, key=attrgetter("begin")) - 1
        if index >= 0 and offset < self.tensors[index].end:
            return self.tensors[index]
        return None


def header_size(first8: Buffer, size_bytes: int) -> int:
    """How many bytes of the file `parse_header` needs.

    Args:
        first8: the first 8 bytes of the file; more are ignored.
        size_bytes: the size of the file.

    Returns:
        8+N, never more than `size_bytes`.

    Raises:
        MalformedHeaderError: the length field is cut off, over the limit or beyond the file.

    >>> header_size(b"\\x02\\0\\0\\0\\0\\0\\0\\0", 10)
    10
    """
    if size_bytes < LENGTH_BYTES or len(first8) < LENGTH_BYTES:
        raise MalformedHeaderError(
            f"the header needs {LENGTH_BYTES} bytes for its length, "
            f"there are {min(size_bytes, len(first8))}"
        )
    length = int.from_bytes(bytes(first8[:LENGTH_BYTES]), "little")
    if length > MAX_HEADER_LENGTH:
        raise MalformedHeaderError(
            f"the header is said to be {length} bytes long, the limit is {MAX_HEADER_LENGTH}"
        )
    if LENGTH_BYTES + length > size_bytes:
        raise MalformedHeaderError(
            f"the header is said to be {length} bytes long, the file has {size_bytes} in all"
        )
    return LENGTH_BYTES + length


def parse_header(header: Buffer, size_bytes: int) -> TensorTable:
    """Read the header of a file.

    Args:
        header: the file from its first byte, at least `header_size` bytes; more are ignored.
        size_bytes: the size of the file.

    Raises:
        MalformedHeaderError: the format's rules are broken (see the module's docstring).

    >>> text = b'{"t": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}'
    >>> parse_header(len(text).to_bytes(8, "little") + text, 8 + len(text) + 4).at(71).name
    't'
    """
    header_bytes = header_size(header, size_bytes)
    if len(header) < header_bytes:
        raise MalformedHeaderError(
            f"the header is cut off: {len(header)} of its {header_bytes} bytes are there"
        )
    entries = _parse_json(header[LENGTH_BYTES:header_bytes])
    metadata = _metadata(entries.pop("__metadata__", None))
    tensors = [_tensor(name, entry, header_bytes) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end, tensor.name))
    _check_cover(tensors, header_bytes, size_bytes)
    return TensorTable(header_bytes, tuple(tensors), metadata, size_bytes)


def _parse_json(text: Buffer) -> dict[str, object]:
    if bytes(text[:1]) != b"{":
        raise MalformedHeaderError(f"the header begins with {bytes(text[:1])!r} instead of '{{'")
    try:
        decoded = str(text, "utf-8")
    except UnicodeDecodeError as error:
        raise MalformedHeaderError(
            f"the header is not UTF-8: {error.reason} at byte {LENGTH_BYTES + error.start}"
        ) from None
    if sum(decoded.count(sign) for sign in "[{,") > MAX_HEADER_VALUES:
        raise MalformedHeaderError(f"the header has more than {MAX_HEADER_VALUES} values")
    try:
        parsed = json.loads(
            decoded, object_pairs_hook=_without_repetition, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise MalformedHeaderError("the header is nested too deeply") from None
    except ValueError as error:
        # Also what json raises for integers of more than 4,300 digits.
        raise MalformedHeaderError(f"the header is not valid JSON: {error}") from None
    assert isinstance(parsed, dict), "text that begins with { parses to a dict"
    return parsed


def _without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"{_shown(twice)} is there twice")
    return unique


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _metadata(entry: object) -> Mapping[str, str]:
    """`__metadata__`; null is none, as in the crate."""
    if entry is None:
        return MappingProxyType({})
    if not isinstance(entry, dict):
        raise MalformedHeaderError("__metadata__ is not an object")
    metadata: dict[str, str] = {}
    for key, value in entry.items():
        if not isinstance(value, str):
            raise MalformedHeaderError(f"__metadata__ has no string for {_shown(key)}")
        _check_unicode(key)
        _check_unicode(value)
        metadata[key] = value
    return MappingProxyType(metadata)


def _tensor(name: str, entry: object, header_bytes: int) -> Tensor:
    _check_unicode(name)
    shown = f"tensor {_shown(name)}"
    if not isinstance(entry, dict):
        raise MalformedHeaderError(f"{shown} is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise MalformedHeaderError(f"{shown} has an unknown dtype: {_shown(dtype)}")
    if not _are_counts(shape):
        raise MalformedHeaderError(f"{shown} has no list of non-negative integers as its shape")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise MalformedHeaderError(f"{shown} has no begin and end as its data_offsets")
    begin, end = offsets
    if end - begin != _size_bytes(shown, dtype, shape):
        raise MalformedHeaderError(
            f"{shown} has {end - begin} bytes by its data_offsets, other than by dtype and shape"
        )
    return Tensor(name, dtype, tuple(shape), header_bytes + begin, header_bytes + end)


def _are_counts(value: object) -> TypeGuard[list[int]]:
    # A bool is an int to isinstance, but not to the format.
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item <= U64_MAX for item in value
    )


def _size_bytes(shown: str, dtype: str, shape: list[int]) -> int:
    elements = 1
    for dimension in shape:
        elements *= dimension
        # Checked at every step, so that a long shape cannot make a number of a million digits.
        if elements > U64_MAX:
            break
    bits = elements * DTYPE_BITS[dtype]
    if bits > U64_MAX:
        raise MalformedHeaderError(f"{shown} has a shape whose size overflows 64 bits")
    if bits % 8:
        raise MalformedHeaderError(f"{shown} does not end at a whole byte")
    return bits // 8


def _check_cover(tensors: list[Tensor], header_bytes: int, size_bytes: int) -> None:
    """Holes and overlaps are refused, so that a file holds nothing that its header hides."""
    end = header_bytes
    for tensor in tensors:
        if tensor.begin != end:
            what = "a hole before" if tensor.begin > end else "an overlap at"
            raise MalformedHeaderError(f"there is {what} tensor {_shown(tensor.name)}")
        end = tensor.end
    if end != size_bytes:
        raise MalformedHeaderError(
            f"the tensors end at byte {end}, the file has {size_bytes}: it is "
            + ("cut off" if end > size_bytes else "longer than its header says")
        )


def _check_unicode(text: str) -> None:
    """Refuse half a surrogate pair, which JSON can write and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise MalformedHeaderError(f"{_shown(text)} is not Unicode text") from None


def _shown(value: object) -> str:
    """A name for a message: quoted, on one line and not too long."""
    if not isinstance(value, str):
        return "none" if value is None else f"of type {type(value).__name__}"
    return ascii(value[:SHOWN_LETTERS]) + ("..." if len(value) > SHOWN_LETTERS else "")
