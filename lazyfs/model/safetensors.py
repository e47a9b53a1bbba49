"""Parses the header of a safetensors file into a table of tensors. Pure.

The format (https://github.com/huggingface/safetensors#format): 8 bytes hold the length N of the
header, unsigned and little-endian. Then come N bytes of JSON, `{name: {dtype, shape,
data_offsets}}` with an optional `"__metadata__": {str: str}`, then the bytes of the tensors.
`data_offsets` count from the end of the header. A `Tensor` counts from the start of the file, like
a read.

The parser rejects what the reference rejects, the safetensors crate 0.8.0, including unknown
dtypes. No loader reads such a file, so it needs no table; the file itself is still served. Tests
against the crate show these differences:

- Rejected here, accepted by the crate: white space before the `{`, and a duplicate key in an object
  (the format forbids both; the crate takes the last key); forms that only serde knows, a tensor as
  `[dtype, shape, data_offsets]` and a dtype as `{"U8": null}`; a header with more than
  `MAX_HEADER_VALUES` values, far more than any model has.
- Accepted here, rejected by the crate: `-0` for 0; and, in fields that both ignore, nesting deeper
  than 127 levels, numbers too large for a double, and lone surrogates.
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

from lazyfs.listed_object import File

Buffer: TypeAlias = bytes | bytearray | memoryview

LENGTH_BYTES = 8
SUFFIX = ".safetensors"
# The header of a smaller file comes with its first block.
LEAST_HEADED = 1 << 20
# The first read of a shard. It covers nearly all headers, and whole pages.
HEAD_BYTES = 64 << 10
# A longer header is not prefetched. Parsing takes 5 ms for a usual header (300 tensors), but
# seconds for the longest that the format allows.
LONGEST_HEADER = 16 << 20
# The largest N; MAX_HEADER_SIZE of the crate.
MAX_HEADER_LENGTH = 100_000_000
# A parsed value takes up to 100 bytes of memory, but only two bytes of JSON. With this limit the
# worst header of 100 MB takes 1 GB and 1.5 s (measured). 400,000 tensors with two dimensions have
# that many values, in a header of 50 MB.
MAX_HEADER_VALUES = 4_000_000
# The crate computes in 64 bits and rejects larger values.
U64_MAX = 2**64 - 1
SHOWN_LETTERS = 80

# Bits per element. The names are those in an error message of the crate 0.8.0.
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
    """The header of a file is not valid in its format. The message is one line."""


class TruncatedFileError(MalformedHeaderError):
    """The file ends before its last tensor, or in its header: an upload was not completed."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: bytes `begin` to `end` of the file, excluding `end`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class TensorTable:
    """A parsed header. The tensors cover the rest of the file without gaps.

    Attributes:
        header_bytes: size of the length field and the header, 8+N; offset of the first tensor.
        tensors: in the order of their bytes, which is the order of `safe_open(...).keys()`.
        metadata: `__metadata__`, such as `{"format": "pt"}`.
        size_bytes: the size of the whole file.
    """

    header_bytes: int
    tensors: tuple[Tensor, ...]
    metadata: Mapping[str, str]
    size_bytes: int

    def at(self, offset: int) -> Tensor | None:
        """The tensor that holds the byte at `offset` of the file; None outside all tensors."""
        # Of several tensors with the same `begin`, all but the last are empty.
        index = bisect_right(self.tensors, offset, key=attrgetter("begin")) - 1
        if index >= 0 and offset < self.tensors[index].end:
            return self.tensors[index]
        return None


def has_head(file: File) -> bool:
    """Whether the header of a file is worth a request of its own."""
    return file.name.endswith(SUFFIX) and file.size_bytes > LEAST_HEADED


def header_size(first8: Buffer, size_bytes: int) -> int:
    """The number of bytes from the start of the file that `parse_header` needs.

    Args:
        first8: the first 8 bytes of the file; more are ignored.
        size_bytes: the size of the file.

    Returns:
        8+N, never more than `size_bytes`.

    Raises:
        MalformedHeaderError: the length field is cut off, over the limit, or beyond the file.

    >>> header_size(b"\\x02\\0\\0\\0\\0\\0\\0\\0", 10)
    10
    """
    if size_bytes < LENGTH_BYTES or len(first8) < LENGTH_BYTES:
        raise MalformedHeaderError(
            f"the length of the header takes {LENGTH_BYTES} bytes, "
            f"there are {min(size_bytes, len(first8))}"
        )
    length = int.from_bytes(bytes(first8[:LENGTH_BYTES]), "little")
    if length > MAX_HEADER_LENGTH:
        raise MalformedHeaderError(
            f"the length of the header is {length} bytes, the limit is {MAX_HEADER_LENGTH}"
        )
    if LENGTH_BYTES + length > size_bytes:
        raise TruncatedFileError(
            f"the length of the header is {length} bytes, the whole file has {size_bytes}: it is "
            "cut off"
        )
    return LENGTH_BYTES + length


def parse_header(header: Buffer, size_bytes: int) -> TensorTable:
    """Parse the header of a file.

    Args:
        header: the file from its first byte, at least `header_size` bytes; more are ignored.
        size_bytes: the size of the file.

    Raises:
        MalformedHeaderError: the header is invalid (see the docstring of the module).

    >>> text = b'{"t": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}'
    >>> parse_header(len(text).to_bytes(8, "little") + text, 8 + len(text) + 4).at(71).name
    't'
    """
    header_bytes = header_size(header, size_bytes)
    if len(header) < header_bytes:
        raise MalformedHeaderError(
            f"the header is cut off: there are {len(header)} of its {header_bytes} bytes"
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
        # json also raises ValueError for integers of more than 4,300 digits.
        raise MalformedHeaderError(f"the header is not valid JSON: {error}") from None
    assert isinstance(parsed, dict), "text that begins with { parses to a dict"
    return parsed


def _without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"duplicate key {_shown(twice)}")
    return unique


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _metadata(entry: object) -> Mapping[str, str]:
    """`__metadata__`; null counts as absent, as in the crate."""
    if entry is None:
        return MappingProxyType({})
    if not isinstance(entry, dict):
        raise MalformedHeaderError("__metadata__ is not an object")
    metadata: dict[str, str] = {}
    for key, value in entry.items():
        if not isinstance(value, str):
            raise MalformedHeaderError(
                f"__metadata__ has a value for {_shown(key)} that is not a string"
            )
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
        raise MalformedHeaderError(f"the shape of {shown} is not a list of non-negative integers")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise MalformedHeaderError(f"the data_offsets of {shown} are not a begin and an end")
    begin, end = offsets
    if end - begin != _size_bytes(shown, dtype, shape):
        raise MalformedHeaderError(
            f"the data_offsets of {shown} give {end - begin} bytes, its dtype and shape do not"
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
        # Checked at every step, so that a long shape cannot produce a huge number.
        if elements > U64_MAX:
            break
    bits = elements * DTYPE_BITS[dtype]
    if bits > U64_MAX:
        raise MalformedHeaderError(f"the size of {shown} overflows 64 bits")
    if bits % 8:
        raise MalformedHeaderError(f"the size of {shown} is not a whole number of bytes")
    return bits // 8


def _check_cover(tensors: list[Tensor], header_bytes: int, size_bytes: int) -> None:
    """Reject gaps and overlaps, so that a file holds nothing that its header does not list."""
    end = header_bytes
    for tensor in tensors:
        if tensor.begin != end:
            what = "a gap before" if tensor.begin > end else "an overlap at"
            raise MalformedHeaderError(f"there is {what} tensor {_shown(tensor.name)}")
        end = tensor.end
    if end > size_bytes:
        raise TruncatedFileError(
            f"the tensors end at byte {end}, the file has {size_bytes}: it is cut off"
        )
    if end < size_bytes:
        raise MalformedHeaderError(
            f"the tensors end at byte {end}, the file has {size_bytes}: it is longer than its "
            "header says"
        )


def _check_unicode(text: str) -> None:
    """Reject lone surrogates, which JSON can write and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise MalformedHeaderError(f"{_shown(text)} is not Unicode text") from None


def _shown(value: object) -> str:
    """A name for a message: quoted, on one line, and shortened."""
    if not isinstance(value, str):
        return "none" if value is None else f"of type {type(value).__name__}"
    return ascii(value[:SHOWN_LETTERS]) + ("..." if len(value) > SHOWN_LETTERS else "")
