"""The format of a block's file, and its checks. Pure.

A file describes itself, so that it is known whose block it is, and a lost index can be rebuilt from
the files:

    the bytes of the block
    zeros up to a multiple of 4096, so that the rest can be read directly as well
    which object's block it is (`Content`), as JSON
    the footer: magic, block number, length of the block, length of the JSON, CRC-32C of the
    block, CRC-32C of JSON and footer; 32 bytes, little-endian

The index may have the sums of a block's pieces as well (`running_sums`), so that a part of a block
can be read and checked without the rest: bytes of another block do not match them. They are not in
the file, because older versions of lazyfs, which may use the same directory, would take it for
damaged.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from lazyfs.blocks import block_count, block_length
from lazyfs.blocks.buffers import align

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAGIC = b"lazyfs\x00\x01"
# A part of a block is read and checked in pieces of this size.
PIECE = 256 << 10
_FOOTER = struct.Struct("<8sQIIII")
_CRC = struct.Struct("<I")
# crc32c: "positive: always release the GIL". A checksum of 8 MiB takes a third of a millisecond.
_RELEASE_GIL = 1


class DamagedBlockError(Exception):
    """A file differs from what was stored; the message says how."""


@dataclass(frozen=True)
class Content:
    """One version of one object, divided into blocks of one size.

    Mounts that would fetch the same bytes have equal contents; a replaced object has another one.
    """

    endpoint: str
    bucket: str
    key: str
    etag: str
    size_bytes: int
    block_size: int

    @cached_property
    def identity(self) -> bytes:
        """The content as JSON; equal contents give equal text."""
        return json.dumps(asdict(self), sort_keys=True, ensure_ascii=False).encode()

    @cached_property
    def digest(self) -> str:
        """The content's name: 32 hexadecimal digits."""
        return hashlib.blake2b(self.identity, digest_size=16).hexdigest()

    @classmethod
    def from_identity(cls, identity: bytes) -> Content:
        """Parse the output of `identity`. Raises ValueError."""
        try:
            content = cls(**json.loads(identity))
        except TypeError as error:
            raise ValueError(str(error)) from None
        if content.identity != identity:
            raise ValueError("not the form that was stored")
        return content

    @property
    def block_count(self) -> int:
        """The number of its blocks."""
        return block_count(self.size_bytes, self.block_size)

    def length(self, number: int) -> int:
        """The length of a block in bytes."""
        return block_length(self.size_bytes, self.block_size, number)

    @property
    def tail_length(self) -> int:
        """The length of the part of a file after the padded block."""
        return len(self.identity) + _FOOTER.size

    def file_length(self, number: int) -> int:
        """The length of a block's file."""
        return align(self.length(number)) + self.tail_length


def checksum(data: Buffer, before: int = 0) -> int:
    """CRC-32C, without the interpreter's lock.

    Args:
        before: that of the bytes before `data`.
    """
    from crc32c import crc32c  # imports argparse, which a mount does not need to be ready

    return crc32c(data, before, _RELEASE_GIL)


def running_sums(data: memoryview) -> bytes:
    """The CRC-32C of a block up to the end of each piece, little-endian, 4 bytes each.

    The last one is that of the block. From the one before it, each piece can be checked by itself.
    """
    crc = 0
    sums = bytearray()
    for start in range(0, len(data), PIECE):
        crc = checksum(data[start : start + PIECE], crc)
        sums += _CRC.pack(crc)
    return bytes(sums)


def sums_length(length: int) -> int:
    """The length of the running sums of a block of that length."""
    return len(pieces_of(0, length)) * _CRC.size


def block_sum(sums: bytes) -> int:
    """The CRC-32C of a block with these running sums."""
    return int(_CRC.unpack_from(sums, len(sums) - _CRC.size)[0])


def pieces_of(start: int, stop: int) -> range:
    """The pieces that have bytes `start` to `stop` of a block."""
    return range(start // PIECE, -(-stop // PIECE))


def bytes_of_pieces(start: int, stop: int) -> int:
    """How many bytes the pieces have that have bytes `start` to `stop`, at most."""
    return len(pieces_of(start, stop)) * PIECE


def check_pieces(sums: bytes, pieces: range, data: memoryview) -> None:
    """Check successive pieces of a block with these running sums.

    Raises:
        DamagedBlockError: they are not what was stored.
    """
    crcs = [0, *(crc for (crc,) in _CRC.iter_unpack(sums))]
    if checksum(data, crcs[pieces.start]) != crcs[pieces.stop]:
        raise DamagedBlockError("has a wrong checksum")


def make_tail(content: Content, number: int, length: int, crc: int) -> bytes:
    """The tail to store after a block of that length and CRC-32C."""
    footer = _FOOTER.pack(MAGIC, number, length, len(content.identity), crc, 0)
    tail = content.identity + footer[: -_CRC.size]
    return tail + _CRC.pack(checksum(tail))


def check(content: Content, number: int, data: memoryview, tail: Buffer) -> None:
    """Check that a block's bytes and tail are those that were stored.

    Raises:
        DamagedBlockError: they are not.
    """
    found, found_number, crc = parse_tail(tail)
    if found != content or found_number != number:
        raise DamagedBlockError(f"holds block {found_number} of {found.key}")
    if crc != checksum(data):
        raise DamagedBlockError("has a wrong checksum")


def parse_tail(tail: Buffer) -> tuple[Content, int, int]:
    """The content and number of a file's block, and the CRC-32C that its bytes must have.

    Args:
        tail: the end of the file, from the JSON on or from before it.

    Raises:
        DamagedBlockError: this is not the tail of a block's file.
    """
    end = bytes(tail)
    if len(end) < _FOOTER.size:
        raise DamagedBlockError("is too short")
    magic, number, length, identity_length, crc, tail_crc = _FOOTER.unpack(end[-_FOOTER.size :])
    begin = len(end) - _FOOTER.size - identity_length
    if magic != MAGIC or begin < 0 or checksum(end[begin : -_CRC.size]) != tail_crc:
        raise DamagedBlockError("is not a block's file, or its end is damaged")
    try:
        content = Content.from_identity(end[begin : -_FOOTER.size])
    except ValueError as error:
        raise DamagedBlockError(f"describes no block: {error}") from None
    if not 0 <= number < content.block_count or content.length(number) != length:
        raise DamagedBlockError("describes a block that its object does not have")
    return content, number, crc
