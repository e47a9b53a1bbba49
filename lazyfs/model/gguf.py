"""Finds where the tensors of a GGUF file end, from its header. Pure.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): `GGUF`, a version, the
number of tensors and of key-value pairs; the pairs, among them the vocabulary; then for each tensor
its name, dimensions, type and offset. The data follows, aligned. llama.cpp refuses a file in which
a tensor ends behind the end of the file (`llama-model-loader.h`, "data is not within the file
bounds").

The header of a large vocabulary has 10 MB or more, and its end cannot be known without reading all
of it. It is read in pieces, and nothing of it is kept.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from types import MappingProxyType

from lazyfs.model.safetensors import MalformedHeaderError, TruncatedFileError

MAGIC = b"GGUF"
# The first version with 64-bit counts, and the one that added big-endian files.
VERSIONS = (2, 3)
LONGEST_HEADER = 64 << 20
PIECE_BYTES = 1 << 20
MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
ALIGNMENT_KEY = b"general.alignment"
DEFAULT_ALIGNMENT = 32
_UINT32, _STRING, _ARRAY = 4, 8, 9
# Bytes by type of value: enum gguf_metadata_value_type.
_VALUE_BYTES: Mapping[int, int] = MappingProxyType(
    {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
)
# Elements and bytes of a block, by type of tensor: GGML_QUANT_SIZES of gguf 0.19.0, which are the
# sizes of the structures in ggml/src/ggml-common.h. Types that were withdrawn are not among them.
BLOCKS: Mapping[int, tuple[int, int]] = MappingProxyType(
    {
        0: (1, 4),  # F32
        1: (1, 2),  # F16
        2: (32, 18),  # Q4_0
        3: (32, 20),  # Q4_1
        6: (32, 22),  # Q5_0
        7: (32, 24),  # Q5_1
        8: (32, 34),  # Q8_0
        9: (32, 40),  # Q8_1
        10: (256, 84),  # Q2_K
        11: (256, 110),  # Q3_K
        12: (256, 144),  # Q4_K
        13: (256, 176),  # Q5_K
        14: (256, 210),  # Q6_K
        15: (256, 292),  # Q8_K
        16: (256, 66),  # IQ2_XXS
        17: (256, 74),  # IQ2_XS
        18: (256, 98),  # IQ3_XXS
        19: (256, 50),  # IQ1_S
        20: (32, 18),  # IQ4_NL
        21: (256, 110),  # IQ3_S
        22: (256, 82),  # IQ2_S
        23: (256, 136),  # IQ4_XS
        24: (1, 1),  # I8
        25: (1, 2),  # I16
        26: (1, 4),  # I32
        27: (1, 8),  # I64
        28: (1, 8),  # F64
        29: (256, 56),  # IQ1_M
        30: (1, 2),  # BF16
        34: (256, 54),  # TQ1_0
        35: (256, 66),  # TQ2_0
        39: (32, 17),  # MXFP4
        40: (64, 36),  # NVFP4
        41: (128, 18),  # Q1_0
    }
)


def check_is_whole(first: bytes, size_bytes: int, read: Callable[[int, int], bytes]) -> None:
    """Check that a file holds all tensors that its header lists.

    Of a tensor of an unknown type, only the beginning has to be there.

    Args:
        first: the beginning of the file, as far as it was read.
        size_bytes: of the file.
        read: returns the bytes at an offset, as many as asked for.

    Raises:
        TruncatedFileError: the file ends before.
        MalformedHeaderError: the header is not valid, or of another version.
        SourceError: from `read`.
    """
    end = _Header(first, size_bytes, read).end_of_tensors()
    if end > size_bytes:
        raise TruncatedFileError(
            f"the tensors end at byte {end}, the file has {size_bytes}: it is cut off"
        )


class _Header:
    """Reads a header from its beginning to its end."""

    def __init__(self, first: bytes, size_bytes: int, read: Callable[[int, int], bytes]) -> None:
        self._size_bytes = size_bytes
        self._read = read
        self._at = 0
        # A piece of the file, and its offset.
        self._piece, self._start = first, 0
        self._order = "<"

    def end_of_tensors(self) -> int:
        """The offset behind the last byte of all tensors."""
        if (magic := self._take(len(MAGIC))) != MAGIC:
            raise MalformedHeaderError(f"the file begins with {magic!r} instead of {MAGIC!r}")
        version = self._number("I")
        if not version & 0xFFFF:  # the file was written on a big-endian machine
            self._order = ">"
            (version,) = struct.unpack(">I", struct.pack("<I", version))
        if version not in VERSIONS:
            raise MalformedHeaderError(f"version {version} of GGUF is not known")
        tensors, pairs = self._number("Q"), self._number("Q")
        alignment = DEFAULT_ALIGNMENT
        for _ in range(pairs):
            key, kind = self._string(), self._number("I")
            if key == ALIGNMENT_KEY and kind == _UINT32:
                alignment = self._number("I")
            else:
                self._skip_value(kind)
        if alignment < 1:
            raise MalformedHeaderError("its alignment is 0")
        end = max((self._end_of_tensor() for _ in range(tensors)), default=0)
        return -(-self._at // alignment) * alignment + end if end else self._at

    def _end_of_tensor(self) -> int:
        """The offset behind a tensor, from the beginning of all."""
        self._string()
        dimensions = self._number("I")
        if dimensions > MOST_DIMENSIONS:
            raise MalformedHeaderError(f"a tensor has {dimensions} dimensions")
        elements = math.prod(self._number("Q") for _ in range(dimensions))
        kind, offset = self._number("I"), self._number("Q")
        per_block, block_bytes = BLOCKS.get(kind, (1, 0))
        return offset + -(-elements // per_block) * block_bytes

    def _skip_value(self, kind: int) -> None:
        if kind == _ARRAY:
            kind, count = self._number("I"), self._number("Q")
        else:
            count = 1
        if kind == _STRING:
            for _ in range(count):
                self._skip(self._number("Q"))
        elif kind in _VALUE_BYTES:
            self._skip(count * _VALUE_BYTES[kind])
        else:
            raise MalformedHeaderError(f"a value has type {kind}, which is not known")

    def _string(self) -> bytes:
        length = self._number("Q")
        if length > PIECE_BYTES:
            raise MalformedHeaderError(f"a name has {length} bytes")
        return self._take(length)

    def _number(self, form: str) -> int:
        form = self._order + form
        number: int = struct.unpack(form, self._take(struct.calcsize(form)))[0]
        return number

    def _skip(self, length: int) -> None:
        self._at += length
        if self._at > self._size_bytes:
            raise TruncatedFileError(
                f"its header goes on to byte {self._at}, the file has {self._size_bytes}: it is "
                "cut off"
            )
        if self._at > LONGEST_HEADER:
            raise MalformedHeaderError(f"its header has more than {LONGEST_HEADER} bytes")

    def _take(self, length: int) -> bytes:
        at = self._at
        self._skip(length)
        if self._at > self._start + len(self._piece):
            self._start = at
            self._piece = self._read(at, min(max(length, PIECE_BYTES), self._size_bytes - at))
        return self._piece[at - self._start : self._at - self._start]
