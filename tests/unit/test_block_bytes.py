"""Sparse bytes behave as a bytearray does, and take memory only where something is set."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.blocks import BlockId
from lazyfs.blocks.block_bytes import DENSE_BLOCKS, SparseBytes, zero_bytes
from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.file_blocks import Place

COUNT = 3 * DENSE_BLOCKS + 5
POSITIONS = st.one_of(
    st.integers(0, COUNT - 1),
    st.sampled_from([0, DENSE_BLOCKS - 1, DENSE_BLOCKS, 2 * DENSE_BLOCKS, COUNT - 1]),
)


@given(
    st.lists(st.tuples(POSITIONS, st.integers(0, 3)), max_size=20),
    st.integers(0, 3), POSITIONS, st.one_of(POSITIONS, st.none(), st.just(COUNT + 7)),
)  # fmt: skip
def test_they_are_like_a_bytearray(
    changes: list[tuple[int, int]], value: int, start: int, stop: int | None
) -> None:
    sparse, dense = SparseBytes(COUNT), bytearray(COUNT)
    for at, mark in changes:
        sparse[at] = dense[at] = mark
    assert len(sparse) == len(dense)
    assert [sparse[at] for at, _ in changes] == [dense[at] for at, _ in changes]
    assert sparse[-1] == dense[-1]
    assert sparse.find(value, start, stop) == dense.find(value, start, stop)
    assert sparse.find(value) == dense.find(value)
    assert sparse.count(value, start) == dense.count(value, start)


def test_there_is_nothing_beyond_the_end() -> None:
    marks = SparseBytes(COUNT)
    for at in (COUNT, -COUNT - 1):
        with pytest.raises(IndexError):
            marks[at] = 1
    assert isinstance(zero_bytes(DENSE_BLOCKS), bytearray)


def test_files_of_fifty_terabytes_take_little_memory() -> None:
    """A hundred of them, of which the kernel knows, and one reader each."""
    tracemalloc.start()
    blocks = BlockMap(1 << 20)
    for inode in range(2, 102):
        blocks.add_file(inode, 50 << 40)
        blocks.set_known(inode, True)
        last = len(blocks.files[inode].places) - 1
        for number in (0, last // 2, last):
            blocks.moved(BlockId(inode, number), Place.NEAR)
            assert blocks.place(BlockId(inode, number)) is Place.NEAR
        assert list(blocks.files[inode].all_at(Place.NEAR)) == [0, last // 2, last]
        blocks.set_known(inode, False)
        assert blocks.files[inode].counts[Place.USED] == 3
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 50 << 20
