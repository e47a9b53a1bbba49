"""Where the blocks of files are, of which most are only looked up."""

from __future__ import annotations

import pytest

from lazyfs.blocks import BlockId
from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.file_blocks import Place


def test_a_file_that_was_only_looked_up_has_no_blocks_until_they_are_asked_for() -> None:
    blocks = BlockMap(10)
    for inode in (2, 3, 4):
        blocks.add_file(inode, 25)
        blocks.add_file(inode, 99)
    blocks.set_known(2, True)
    blocks.set_known(3, True)
    blocks.set_known(3, False)
    assert len(blocks.files) == 0
    assert blocks.planned_bytes() == 0
    assert [blocks.files[inode].known for inode in (2, 3, 4)] == [True, False, False]
    assert [each.size_bytes for each in blocks.files.values()] == [25, 25, 25]
    blocks.set_known(4, True)
    assert blocks.files[4].known
    with pytest.raises(KeyError):
        _ = blocks.files[5]


def test_a_file_that_is_added_again_keeps_its_blocks() -> None:
    blocks = BlockMap(10)
    blocks.add_file(2, 25)
    blocks.moved(BlockId(2, 1), Place.LOCAL)
    blocks.set_known(2, True)
    blocks.add_file(2, 25)
    assert blocks.place(BlockId(2, 1)) is Place.LOCAL
    assert blocks.files[2].known
