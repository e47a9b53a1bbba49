"""Block arithmetic."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lazyfs.blocks import block_count, block_length, spans

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
