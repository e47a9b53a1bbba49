"""What lies in the page cache ahead of readers, and what all readers have consumed."""

from __future__ import annotations

from lazyfs.blocks import BlockId
from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.file_blocks import PIECE_BLOCKS, Place
from lazyfs.prefetch.consumed_blocks import BEHIND_BLOCKS, ConsumedBlocks
from lazyfs.prefetch.pages_ahead import PagesAhead

BLOCK = 10
COUNT = 4 * PIECE_BLOCKS


def pages(*near: int) -> tuple[BlockMap, PagesAhead]:
    """Files 2, 3 and 4 in loading order, and 9 beside them; all blocks of some are near."""
    blocks = BlockMap(BLOCK)
    for inode in (2, 3, 4, 9):
        blocks.add_file(inode, COUNT * BLOCK)
    blocks.set_order([2, 3, 4])
    ahead = PagesAhead(blocks.files)
    blocks.on_move.append(ahead.moved)
    for inode in near:
        for number in range(COUNT):
            blocks.moved(BlockId(inode, number), Place.NEAR)
    return blocks, ahead


class TestPagesAhead:
    def test_before_anyone_reads_all_pages_of_the_order_count(self) -> None:
        blocks, ahead = pages(2, 3, 9)
        assert ahead.blocks == 2 * COUNT, "nobody reads the file beside the order"
        blocks.moved(BlockId(2, 0), Place.NEAR)
        assert ahead.blocks == 2 * COUNT, "it was there"
        blocks.moved(BlockId(2, 0), Place.USED)
        assert ahead.blocks == 2 * COUNT - 1

    def test_pages_count_from_the_rearmost_reader_on(self) -> None:
        blocks, ahead = pages(3, 4)
        ahead.locate(blocks.order, [(4, 1), (2, 3), (3, 2)])
        assert ahead.blocks == 2 * COUNT
        blocks.moved(BlockId(2, 3 * PIECE_BLOCKS - 1), Place.NEAR)
        assert ahead.blocks == 2 * COUNT, "behind the reader"
        blocks.moved(BlockId(2, 3 * PIECE_BLOCKS), Place.NEAR)
        assert ahead.blocks == 2 * COUNT + 1
        ahead.locate(blocks.order, [(4, 1), (3, 2)])
        assert ahead.blocks == COUNT - PIECE_BLOCKS, "one that has only pages left has read them"

    def test_a_reader_that_left_only_pages_behind_has_read_them(self) -> None:
        blocks, ahead = pages(2)
        blocks.moved(BlockId(2, 0), Place.USED)
        ahead.locate(blocks.order, [(3, 0), (2, 1)])
        assert ahead.blocks == 0
        ahead.locate(blocks.order, [(2, 1), (3, 0)])
        assert ahead.blocks == COUNT - PIECE_BLOCKS, "it was active last"

    def test_readers_beside_the_order_count_from_the_rearmost_of_each_file(self) -> None:
        blocks, ahead = pages(9)
        ahead.locate(blocks.order, [(9, 3), (9, 1), (9, 2)])
        assert ahead.blocks == 3 * PIECE_BLOCKS
        blocks.moved(BlockId(9, PIECE_BLOCKS), Place.USED)
        blocks.moved(BlockId(9, PIECE_BLOCKS - 1), Place.USED)
        assert ahead.blocks == 3 * PIECE_BLOCKS - 1
        ahead.locate(blocks.order, [])
        assert ahead.blocks == 0

    def test_what_is_behind_all_readers(self) -> None:
        blocks, ahead = pages()
        assert not ahead.is_behind(0, 0)
        ahead.locate(blocks.order, [(3, 1)])
        assert ahead.is_behind(0, COUNT - 1)
        assert ahead.is_behind(1, PIECE_BLOCKS - 1)
        assert not ahead.is_behind(1, PIECE_BLOCKS)
        assert not ahead.is_behind(2, 0)


class TestConsumedBlocks:
    def consumed(self, reader: int) -> tuple[BlockMap, ConsumedBlocks]:
        """All is stored and was read in the page cache; a reader is at a piece of file 3."""
        blocks, ahead = pages(2, 3, 4)
        spent = ConsumedBlocks(blocks.files, ahead)
        blocks.on_stored.append(spent.stored)
        for inode in (2, 3, 4):
            for number in range(COUNT):
                blocks.stored(BlockId(inode, number))
        ahead.locate(blocks.order, [(3, reader)])
        return blocks, spent

    def test_they_are_named_in_loading_order_and_once(self) -> None:
        blocks, spent = self.consumed(2)
        first = spent.take(blocks.order, COUNT - 1)
        assert first == [BlockId(2, number) for number in range(COUNT - 1)]
        rest = spent.take(blocks.order, 10 * COUNT)
        behind = range(2 * PIECE_BLOCKS - BEHIND_BLOCKS)
        assert rest == [BlockId(2, COUNT - 1), *(BlockId(3, number) for number in behind)]
        assert spent.take(blocks.order, 10 * COUNT) == []

    def test_one_that_is_stored_again_or_comes_earlier_in_a_new_order_is_found(self) -> None:
        blocks, spent = self.consumed(1)
        spent.take(blocks.order, 10 * COUNT)
        assert spent.take(blocks.order, 1) == []
        blocks.stored(BlockId(2, 5))
        assert spent.take(blocks.order, 10) == [BlockId(2, 5)]
        blocks.files[2].stored[6] = 1
        spent.reorder()
        assert spent.take(blocks.order, 10) == [BlockId(2, 6)]

    def test_what_was_neither_read_nor_lay_in_the_page_cache_stays(self) -> None:
        blocks, spent = self.consumed(2)
        for number in range(2 * PIECE_BLOCKS):
            blocks.moved(BlockId(2, number), Place.LOCAL)
        blocks.files[2].touched[1] = 1
        blocks.moved(BlockId(2, PIECE_BLOCKS), Place.LOADING)
        blocks.moved(BlockId(2, PIECE_BLOCKS + 1), Place.COMING)
        taken = spent.take(blocks.order, COUNT - PIECE_BLOCKS - 2)
        assert [number for _, number in taken] == list(range(PIECE_BLOCKS + 2, COUNT))
