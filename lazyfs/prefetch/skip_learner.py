"""What this loader takes and what it passes over, and how much may be brought that it may not take.

Rules of tensors are in `Skips`. Here they become places of blocks: what is expected to be passed
over is `Place.PASSED`, which is wished for last or not at all. And it is counted what a policy that
ventures (`tensor`) brought for nothing, which is held against what it ventures next.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from lazyfs.blocks import BlockId
from lazyfs.blocks.block_map import AWAY, FileBlocks, Place
from lazyfs.prefetch.skips import Skips

# How much may lie there that nobody has read yet, and how much that was passed over: a share of
# what was read, or so many blocks; more of tensors whose like was read one layer before.
UNREAD_SHARE = 1 / 16
WASTED_SHARE = 1 / 20
LEAST_BLOCKS = 8
EXPECTED_BLOCKS = 16


class SkipLearner:
    """Learns from what is read.

    Args:
        files: all files by inode; what is added later counts as well.
        moved: told of a block that is at another place now, as `Prefetcher.moved` is.
        times: how often on end a role must be passed over until that is expected.
    """

    def __init__(
        self,
        files: Mapping[int, FileBlocks],
        moved: Callable[[BlockId, Place], None],
        times: int,
    ) -> None:
        self._files = files
        self._moved = moved
        self._skips = Skips(times)
        # Inodes and pieces by role.
        self._roles: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        # What was ventured and not read yet, and what of it was passed over.
        self._unread: set[BlockId] = set()
        self._wasted: set[BlockId] = set()
        self._read_blocks = 0
        # What was here already when a reader passed over it, and was not read since.
        self._passed_by: set[BlockId] = set()

    @property
    def passed_by_blocks(self) -> int:
        """How many blocks were fetched and passed over, as far as requests show that."""
        return len(self._passed_by)

    def add_tensors(self, inode: int) -> None:
        """It is known what tensors are in a file."""
        for piece, role in enumerate(self._files[inode].roles):
            self._roles[role].append((inode, piece))
            if self._skips.expects(role):
                self._pass_over(inode, piece)

    def read(
        self, inode: int, piece: int, passed: Iterable[int], may_be_pages: Callable[[int], bool]
    ) -> None:
        """A piece was read.

        Args:
            passed: the pieces that its reader has passed since he was seen last.
            may_be_pages: whether a block of the file lies in the page cache, or is about to, so
                that he may have read it without a request.
        """
        blocks = self._files[inode]
        first, stop = blocks.blocks_of(piece)
        if not blocks.touched[piece]:
            blocks.touched[piece] = 1
            self._read_blocks += stop - first
        if blocks.roles:
            for other in passed:
                self._was_passed(inode, other, may_be_pages)
            self._was_read(blocks.roles[piece])
        for block in (BlockId(inode, number) for number in range(first, stop)):
            self._unread.discard(block)
            self._wasted.discard(block)
            self._passed_by.discard(block)

    def venture(self, block: BlockId) -> None:
        """A block is brought that nobody may read."""
        self._unread.add(block)

    def may_venture(self, block: BlockId) -> bool:
        """Whether a block should be brought now that nobody may read."""
        unread, wasted = len(self._unread), len(self._wasted)
        if self._is_expected(block):
            return unread < max(EXPECTED_BLOCKS, self._read_blocks * UNREAD_SHARE)
        return unread < max(LEAST_BLOCKS, self._read_blocks * UNREAD_SHARE) and (
            wasted < max(LEAST_BLOCKS, self._read_blocks * WASTED_SHARE)
        )

    def _was_passed(self, inode: int, piece: int, may_be_pages: Callable[[int], bool]) -> None:
        blocks = self._files[inode]
        numbers = range(*blocks.blocks_of(piece))
        ventured = self._unread.intersection(BlockId(inode, number) for number in numbers)
        self._unread -= ventured
        self._wasted |= ventured
        if blocks.touched[piece] or all(map(may_be_pages, numbers)):
            return
        self._passed_by.update(
            BlockId(inode, number)
            for number in numbers
            if blocks.places[number] not in AWAY and not blocks.is_touched(number)
        )
        role = blocks.roles[piece]
        if self._skips.passed(role):
            for which in self._roles[role]:
                self._pass_over(*which)
            # It will not happen again, so it is not held against what comes.
            self._wasted = {block for block in self._wasted if not self._is_passed(block)}

    def _was_read(self, role: str) -> None:
        if not self._skips.read(role):
            return
        for inode, piece in self._roles[role]:
            for number in range(*self._files[inode].blocks_of(piece)):
                if self._files[inode].places[number] == Place.PASSED:
                    self._moved(BlockId(inode, number), Place.ABSENT)

    def _pass_over(self, inode: int, piece: int) -> None:
        """Wish last for those blocks of a tensor in which only such tensors are."""
        blocks = self._files[inode]
        for number in range(*blocks.blocks_of(piece)):
            block = BlockId(inode, number)
            if blocks.places[number] == Place.ABSENT and self._is_passed(block):
                self._moved(block, Place.PASSED)

    def _is_passed(self, block: BlockId) -> bool:
        """Whether all tensors in a block are expected to be passed over."""
        blocks = self._files[block.inode]
        return all(
            self._skips.expects(blocks.roles[piece]) and not blocks.touched[piece]
            for piece in blocks.pieces_in(block.number)
        )

    def _is_expected(self, block: BlockId) -> bool:
        """Whether a tensor in a block was read in the layer where it was met last."""
        blocks = self._files[block.inode]
        pieces = blocks.pieces_in(block.number) if blocks.roles else ()
        return any(self._skips.expects_read(blocks.roles[piece]) for piece in pieces)
