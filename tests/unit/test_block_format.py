"""The file of a block: what it says of itself, and what is not believed."""

from __future__ import annotations

import dataclasses
import json
import struct

import pytest

from lazyfs.blocks.buffers import ALIGNMENT
from lazyfs.cache.block_format import (
    MAGIC,
    Content,
    DamagedBlockError,
    check,
    checksum,
    make_tail,
    parse_tail,
)

CONTENT = Content("http://s3", "b", "m/ä", '"1"', 25, 10)
DATA = memoryview(b"0123456789")
IDENTITY = (
    '{"block_size": 10, "bucket": "b", "endpoint": "http://s3", "etag": "\\"1\\"", '
    '"key": "m/ä", "size_bytes": 25}'
).encode()


def tail_of(
    identity: bytes = IDENTITY, number: int = 1, length: int = 10, magic: bytes = MAGIC,
    claimed: int | None = None,
) -> bytes:  # fmt: skip
    """A tail with right checksums, whatever else it says."""
    claimed = len(identity) if claimed is None else claimed
    tail = identity + struct.pack("<8sQIII", magic, number, length, claimed, checksum(DATA))
    return tail + struct.pack("<I", checksum(tail))


def test_a_tail_has_the_form_that_earlier_versions_stored() -> None:
    assert CONTENT.identity == IDENTITY
    assert CONTENT.digest == "4372fdc34f35959ea3e35f81a4e3a1f0"
    assert checksum(b"123456789") == 0xE3069283, "CRC-32C (RFC 3720, B.4)"
    assert make_tail(CONTENT, 1, len(DATA), checksum(DATA)) == tail_of()
    assert tail_of()[-32:-24] == b"lazyfs\x00\x01"


def test_a_tail_is_read_as_it_was_written_whatever_is_before_it() -> None:
    for number, data in ((0, DATA), (1, DATA), (2, DATA[:5])):
        tail = make_tail(CONTENT, number, len(data), checksum(data))
        assert len(tail) == CONTENT.tail_length
        assert parse_tail(tail) == (CONTENT, number, checksum(data))
        assert parse_tail(b"\0" * 100 + tail) == (CONTENT, number, checksum(data))
        check(CONTENT, number, data, tail)


def test_a_file_has_the_padded_block_and_its_tail() -> None:
    content = dataclasses.replace(CONTENT, size_bytes=ALIGNMENT + 5, block_size=ALIGNMENT)
    assert (content.block_count, content.length(0), content.length(1)) == (2, ALIGNMENT, 5)
    for number in range(2):
        assert content.file_length(number) == ALIGNMENT + content.tail_length


def test_contents_that_differ_in_anything_have_other_names() -> None:
    others = [
        dataclasses.replace(CONTENT, **{name: value})
        for name, value in {
            "endpoint": "http://s4", "bucket": "c", "key": "m/b", "etag": '"2"',
            "size_bytes": 26, "block_size": 11,
        }.items()
    ]  # fmt: skip
    assert len({each.digest for each in [CONTENT, *others]}) == 7
    for other in others:
        with pytest.raises(DamagedBlockError, match="holds block 1 of"):
            check(other, 1, DATA, tail_of())


def test_another_block_of_the_same_object_is_not_taken() -> None:
    with pytest.raises(DamagedBlockError, match="holds block 1 of m/ä"):
        check(CONTENT, 0, DATA, tail_of())


def test_bytes_that_changed_are_noticed() -> None:
    with pytest.raises(DamagedBlockError, match="checksum"):
        check(CONTENT, 1, memoryview(b"0123456780"), tail_of())


def test_every_changed_byte_of_a_tail_is_noticed() -> None:
    tail = tail_of()
    for at in range(len(tail)):
        changed = bytearray(tail)
        changed[at] ^= 1
        with pytest.raises(DamagedBlockError):
            parse_tail(changed)


@pytest.mark.parametrize("length", [0, 1, 31, 32, 40, len(tail_of()) - 1])
def test_a_tail_that_was_cut_off_is_noticed(length: int) -> None:
    with pytest.raises(DamagedBlockError):
        parse_tail(tail_of()[len(tail_of()) - length :] if length < 33 else tail_of()[:length])


def changed(**fields: object) -> bytes:
    told = json.loads(IDENTITY) | fields
    return json.dumps(told, sort_keys=True, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (b"x" * 31, "too short"),
        (tail_of(magic=b"lazyfs\x00\x02"), "not a block's file"),
        (tail_of(claimed=len(IDENTITY) + 1), "not a block's file"),
        (tail_of(claimed=1 << 30), "not a block's file"),
        (tail_of(b"[]"), "describes no block"),
        (tail_of(b"{}"), "describes no block"),
        (tail_of(b"\xff"), "describes no block"),
        (tail_of(b""), "describes no block"),
        (tail_of(changed(more=1)), "describes no block"),
        (tail_of(IDENTITY.replace(b": ", b":")), "describes no block"),
        (tail_of(number=3), "does not have"),
        (tail_of(number=1 << 60), "does not have"),
        (tail_of(length=9), "does not have"),
        (tail_of(number=2, length=10), "does not have"),
    ],
)
def test_tails_with_right_checksums_that_make_no_sense_are_refused(
    tail: bytes, reason: str
) -> None:
    with pytest.raises(DamagedBlockError, match=reason):
        parse_tail(tail)
