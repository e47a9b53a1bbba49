"""Block arithmetic."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lazyfs.blocks import Span, block_count, block_length, gaps, spans

SIZES = st.integers(0, 1000)
BLOCKS = st.sampled_from([1, 2, 7, 64, 4096])


@given(SIZES, BLOCKS)
def test_blocks_cover_a_file_exactly(size: int, block_size: int) -> None:
    lengths = [block_length(size, block_size, n) for n in range(block_count(size, block_size))]
    assert sum(lengths) == size
    assert all(length == block_size for length in lengths[:-1])
    assert all(length > 0 for length in lengths)


@given(SIZES, BLOCKS, st.integers(0, 1200), st.integers(0, 1200))
def test_spans_are_the_read(size: int, block_size: int, offset: int, length: int) -> None:
    file = bytes(i % 251 for i in range(size))
    blocks = [file[i : i + block_size] for i in range(0, size, block_size)]
    read = b"".join(
        blocks[span.number][span.start : span.stop]
        for span in spans(offset, length, size, block_size)
    )
    assert read == file[offset : offset + length]


PARTS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted), max_size=6)


@given(PARTS, st.integers(0, 50))
def test_gaps_are_the_uncovered_parts(parts: list[list[int]], length: int) -> None:
    taken = [Span(3, start, stop) for start, stop in parts]
    covered = {byte for start, stop in parts for byte in range(start, stop)}
    found = [byte for gap in gaps(taken, length) for byte in range(gap.start, gap.stop)]
    within = [byte for byte in found if byte < length]
    assert within == [byte for byte in range(length) if byte not in covered]
    assert not covered & set(found)


def test_gaps_belong_to_the_block_of_the_parts() -> None:
    taken = [Span(3, 5, 8), Span(3, 0, 2)]
    assert list(gaps(taken, 10)) == [Span(3, 2, 5), Span(3, 8, 10)]
    assert list(gaps([], 10)) == [Span(0, 0, 10)]
    assert list(gaps([Span(3, 0, 10)], 10)) == []
