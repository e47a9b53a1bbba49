"""Learns what a loader skips, and limits how much may be prefetched speculatively.

`SkipRules` predicts which tensors will be skipped. This module applies that to blocks: a block that
holds only such tensors gets `Place.PASSED` and is prefetched last or not at all. The policy
`tensor` also fetches blocks that may never be read. Those that turn out to be wasted are counted
and limit further speculation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from lazyfs.blocks import BlockId
from lazyfs.blocks.file_blocks import AWAY, FileBlocks, Place
from lazyfs.prefetch.skip_rules import SkipRules

# Limits on speculative blocks that are unread, and on those that were skipped: a share of the
# blocks read so far, or a number of blocks if that is more. EXPECTED_BLOCKS applies to tensors
# whose counterpart in the last layer was read.
UNREAD_SHARE = 1 / 16
WASTED_SHARE = 1 / 20
LEAST_BLOCKS = 8
EXPECTED_BLOCKS = 16


class SkipLearner:
    """Learns from reads.

    Args:
        files: all files by inode; files may be added later.
        moved: called with a block and its new place, like `Prefetcher.moved`.
        times: number of consecutive skips of a role after which the next skip is expected.
    """

    def __init__(
        self,
        files: Mapping[int, FileBlocks],
        moved: Callable[[BlockId, Place], None],
        times: int,
    ) -> None:
        self._files = files
        self._moved = moved
        self._skips = SkipRules(times)
        # Inodes and pieces by role.
        self._roles: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        # Speculative blocks that are not read yet, and those of them that were skipped.
        self._unread: set[BlockId] = set()
        self._wasted: set[BlockId] = set()
        self._read_blocks = 0
        # Blocks that were here when a reader skipped them, and were not read since.
        self._passed_by: set[BlockId] = set()

    @property
    def passed_by_blocks(self) -> int:
        """Number of blocks that were fetched and then skipped, as far as requests show."""
        return len(self._passed_by)

    def add_tensors(self, inode: int) -> None:
        """The tensors of a file are known now."""
        for piece, role in enumerate(self._files[inode].roles):
            self._roles[role].append((inode, piece))
            if self._skips.expects_skip(role):
                self._pass_over(inode, piece)

    def read(
        self, inode: int, piece: int, passed: Iterable[int], may_be_pages: Callable[[int], bool]
    ) -> None:
        """A piece was read.

        Args:
            passed: the pieces that its reader has passed since its last request.
            may_be_pages: whether a block of the file is in the page cache, or about to be, so that
                the reader may have read it without a request.
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

    def add_speculative(self, block: BlockId) -> None:
        """A block is fetched speculatively: it may never be read."""
        self._unread.add(block)

    def may_speculate(self, block: BlockId) -> bool:
        """Whether to fetch a block speculatively now."""
        unread, wasted = len(self._unread), len(self._wasted)
        if self._is_expected(block):
            return unread < max(EXPECTED_BLOCKS, self._read_blocks * UNREAD_SHARE)
        return unread < max(LEAST_BLOCKS, self._read_blocks * UNREAD_SHARE) and (
            wasted < max(LEAST_BLOCKS, self._read_blocks * WASTED_SHARE)
        )

    def _was_passed(self, inode: int, piece: int, may_be_pages: Callable[[int], bool]) -> None:
        blocks = self._files[inode]
        numbers = range(*blocks.blocks_of(piece))
        speculative = self._unread.intersection(BlockId(inode, number) for number in numbers)
        self._unread -= speculative
        self._wasted |= speculative
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
            # These skips are predicted from now on, so they no longer count as waste.
            self._wasted = {block for block in self._wasted if not self._is_passed(block)}

    def _was_read(self, role: str) -> None:
        if not self._skips.read(role):
            return
        for inode, piece in self._roles[role]:
            for number in range(*self._files[inode].blocks_of(piece)):
                if self._files[inode].places[number] == Place.PASSED:
                    self._moved(BlockId(inode, number), Place.ABSENT)

    def _pass_over(self, inode: int, piece: int) -> None:
        """Postpone the blocks of a tensor that hold only tensors expected to be skipped."""
        blocks = self._files[inode]
        for number in range(*blocks.blocks_of(piece)):
            block = BlockId(inode, number)
            if blocks.places[number] == Place.ABSENT and self._is_passed(block):
                self._moved(block, Place.PASSED)

    def _is_passed(self, block: BlockId) -> bool:
        """Whether all tensors in a block are expected to be skipped."""
        blocks = self._files[block.inode]
        return all(
            self._skips.expects_skip(blocks.roles[piece]) and not blocks.touched[piece]
            for piece in blocks.pieces_in(block.number)
        )

    def _is_expected(self, block: BlockId) -> bool:
        """Whether a tensor in the block had its counterpart in the last layer read."""
        blocks = self._files[block.inode]
        pieces = blocks.pieces_in(block.number) if blocks.roles else ()
        return any(self._skips.expects_read(blocks.roles[piece]) for piece in pieces)
