"""The policy of one mount: which block to fetch next.

This module is long because it is one class: all rules below look at the same places of blocks.

Theory of operation. The prefetcher is told the files in the order in which a loader reads them, the
reads, and where blocks are (`Place`). It answers two questions: which absent block to fetch from S3
(`next_fetch`), and which local block to push into the page cache (`next_load`). Demand does not
pass through here: a block that a reader waits for is fetched at once by the scheduler.

Both questions have the same answer, the first of these that has a block:

1. The rest of a *piece* (a tensor) that was read in part. Reads inside a tensor are interleaved and
   run backwards, because each thread of a loader copies its own part; if ranks share the tensor,
   they read slices. So a tensor is fetched as a whole.
2. Small files. The headers of shards are fetched beside them (`next_head`), without their blocks:
   loaders open all shards long before they read one.
3. The blocks after each reader (`Streams`), first those of the reader with the fewest blocks ahead,
   so that no reader waits for a block that another one needs later.
4. The files after the one that is being read, then files that were passed by.
5. Tensors that this loader skips (`SkipLearner`).

The policies:

- `model`: all five rules, as soon as the order is known.
- `tensor`: rules 1 and 2, and rule 3 in small amounts (`UNREAD_SHARE`). Once too much was skipped,
  rule 3 leaves out tensors whose role is still unknown (`WASTED_SHARE`). Only rule 1 pushes into
  the page cache, so that the first read of the next tensor is a request, and shows what the loader
  skips.
- `sequential`: twice as much of a file as has been read of it. So a look at the end of a
  large file costs little, and a copy of the file runs at full speed. `model` and `tensor` treat
  files without a place in the order in the same way, and `tensor` also files without tensors. But
  while a reader may only be looking at a file (`Loads`), the first two blocks read do not count.
- `headers`: rule 2 only.

A read of a header says nothing about what is read next: see rule 2. How far ahead of the readers
blocks are fetched depends on the room in memory and on the disk, which the caller knows.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain

from lazyfs.blocks import BlockId
from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.file_blocks import FileBlocks, Place
from lazyfs.model.safetensors import Tensor
from lazyfs.prefetch.consumed_blocks import ConsumedBlocks
from lazyfs.prefetch.loads import Loads
from lazyfs.prefetch.pages_ahead import PagesAhead
from lazyfs.prefetch.skip_learner import SkipLearner
from lazyfs.prefetch.skip_rules import role_of
from lazyfs.prefetch.streams import Streams

# The most pieces that were read in part and are still incomplete; beyond that, the oldest is
# dropped.
TOUCHED_PIECES = 64
_ON_ITS_WAY = (Place.COMING, Place.LOADING)


class Prefetcher:
    """The policy of one mount.

    Args:
        policy: one of `options.POLICIES`.
        blocks: where blocks are.
        wanted: which tensors may be fetched ahead, by name; None: all.
        read_ahead_bytes: how far beyond a read the kernel's own read-ahead may begin.

    Attributes:
        on_stray: called once with the inode of a file that is read beyond its header although it
            has no place in the order.
        on_head: called with the inode of a file whose header has arrived in memory.
    """

    def __init__(
        self,
        policy: str,
        blocks: BlockMap,
        *,
        wanted: Callable[[str], bool] | None = None,
        read_ahead_bytes: int = 1 << 20,
    ) -> None:
        self._policy = policy
        self.blocks = blocks
        self._block_size = blocks.block_size
        self._wanted = wanted
        self.on_stray: Callable[[int], None] = lambda inode: None
        self.on_head: Callable[[int], None] = lambda inode: None
        # Files of which the kernel forgot pages that are not on the disk.
        self._forgotten: set[int] = set()
        self._files = blocks.files
        self._loads = Loads(self._files, read_ahead_bytes)
        # Whether the files of models are known; before that, any file may belong to one.
        self._has_order = False
        # Files whose tensors are known; there may be none.
        self._tabled: set[int] = set()
        # To be fetched, and to be put into the page cache, before all others.
        self._first: deque[BlockId] = deque()
        self._first_pages: deque[BlockId] = deque()
        # Files whose headers are fetched with requests of their own, and those already returned.
        self._heads: deque[int] = deque()
        self._named_heads: set[int] = set()
        self._touched: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._streams = Streams()
        self._skip_learner = SkipLearner(self._files, blocks.moved, 1 if policy == "tensor" else 2)
        self._ahead = PagesAhead(self._files)
        self._spent = ConsumedBlocks(self._files, self._ahead)
        blocks.on_move.append(self._has_moved)
        blocks.on_stored.append(self._spent.stored)

    def set_order(
        self, small: Iterable[int], shards: Iterable[int], headed: Iterable[int] = ()
    ) -> None:
        """Set the order in which a loader reads. Other files are not fetched as a whole.

        All of them must have been added.

        Args:
            headed: the shards whose headers are fetched with requests of their own.
        """
        self._has_order = True
        small, shards = list(small), list(shards)
        self.blocks.set_order([*small, *shards])
        self._spent.reorder()
        headed = set(headed)
        self._heads = deque(inode for inode in shards if inode in headed - self._named_heads)
        self._first = deque(
            BlockId(inode, number)
            for inode in small
            for number in range(len(self._files[inode].places))
        )
        if self._policy == "headers" or self._wanted is not None:
            alone = (inode for inode in shards if inode not in headed)
            self._first += [BlockId(inode, 0) for inode in alone if self._files[inode].places]
        self._first_pages = deque(self._first)
        if self._wanted is not None:
            for inode in shards:
                if inode not in self._tabled:
                    self._leave(inode, [] if inode in headed else [(0, 1)])
        self._ahead.locate(self.blocks.order, self._streams)

    @property
    def loads_ahead(self) -> bool:
        """Whether more blocks are put into the page cache than small files and what was read."""
        return self._policy not in ("off", "headers")

    @property
    def readers(self) -> int:
        """How many readers there seem to be at once."""
        return len(self._streams)

    def loaded(self) -> list[int]:
        """The files that were read beyond their header, or may have been.

        A file that was opened and lies in the page cache may have been read without a request. It
        comes before the others, which come in the order in which they were read.
        """
        may_be = [
            inode
            for inode in self.blocks.order
            if inode not in self._loads and self.blocks.may_be_read(inode)
        ]
        return [*may_be, *self._loads]

    def knows_tensors(self, inode: int) -> bool:
        """Whether `set_tensors` was called for a file."""
        return inode in self._tabled

    def is_ordered(self, inode: int) -> bool:
        """Whether the file has a place in the loading order."""
        return inode in self._files and self._files[inode].rank >= 0

    def set_tensors(self, inode: int, tensors: Sequence[Tensor]) -> None:
        """Set the tensors of a file, in the order of bytes.

        A file without tensors is prefetched by offset.
        """
        blocks = self._files[inode]
        filled = [tensor for tensor in tensors if tensor.end > tensor.begin]
        if inode in self._tabled:
            return
        self._tabled.add(inode)
        if not filled:
            self._leave(inode, None)
            return
        roles = [role_of(tensor.name) for tensor in filled]
        blocks.set_pieces([tensor.begin for tensor in filled], roles)
        self._streams.forget(inode)
        for touched in [touched for touched in self._touched if touched[0] == inode]:
            del self._touched[touched]
        if self._wanted is not None:
            chosen = (at for at, tensor in enumerate(filled) if self._wanted(tensor.name))
            first = [] if blocks.has_head else [(0, 1)]
            self._leave(inode, [*first, *map(blocks.blocks_of, chosen)])
        self._skip_learner.add_tensors(inode)
        self._ahead.locate(self.blocks.order, self._streams)

    def can_wait(self, block: BlockId) -> bool:
        """Whether a block is of another file than the first of a load, which is still coming."""
        return self._loads.first not in (None, block.inode)

    def takes_pages(self, block: BlockId) -> bool:
        """Whether a block can and should be put into the page cache."""
        blocks = self._files[block.inode]
        if not blocks.takes_pages:
            return False
        return not self._by_tensor(blocks) or blocks.is_touched(block.number)

    @property
    def passed_over_bytes(self) -> int:
        """Bytes that were fetched and then skipped by a reader, as far as requests show that.

        Reads from the page cache make no requests, so blocks there are not counted.
        """
        return self._skip_learner.passed_by_blocks * self._block_size

    @property
    def near_ahead_bytes(self) -> int:
        """An estimate of the unread bytes in the page cache (`PagesAhead`)."""
        return self._ahead.blocks * self._block_size

    def _has_moved(self, block: BlockId, before: Place, now: Place) -> None:
        if block.number == 0 and now == Place.LOCAL and before in _ON_ITS_WAY:
            self.on_head(block.inode)
        if before == Place.NEAR and now == Place.USED:
            self._forgotten.add(block.inode)
        self._ahead.moved(block, before, now)

    def take_spent(self, count: int) -> list[BlockId]:
        """Blocks on the disk that all readers have consumed, in order; each is returned once.

        The caller then removes them from the disk.
        """
        return self._spent.take(self.blocks.order, count)

    def was_read(self, inode: int, offset: int, size: int) -> bool:
        """A reader read `size` bytes at `offset`. Returns whether other blocks are wanted now."""
        blocks = self._files[inode]
        number = offset // self._block_size
        if number >= len(blocks.places):
            return False  # at the end of the file
        is_again = blocks.places[number] in (Place.USED, Place.LEFT)
        if blocks.places[number] == Place.USED:
            self._begin_again(inode, number)
        elif blocks.places[number] == Place.LEFT:
            blocks.failed[number] = 0
            self.blocks.moved(BlockId(inode, number), Place.ABSENT)
        if number != blocks.last_read:
            blocks.last_read = number
            blocks.blocks_read += 1
        if blocks.piece_at(offset) < 0 if blocks.roles else blocks.rank >= 0 and number == 0:
            return is_again  # the header
        # On a fault in a mapped file, the kernel reads as much before the page as after it (Linux,
        # mm/filemap.c, do_sync_mmap_readahead), so the reader wants the middle.
        middle = min(offset + size // 2, blocks.size_bytes - 1)
        if self._loads.read(inode, offset, middle) and blocks.rank < 0:
            self.on_stray(inode)
        return self._touch(inode, blocks, blocks.piece_at(middle)) or is_again

    def next_head(self) -> int | None:
        """The next file whose header is fetched with its own request, or None; each once."""
        while self._policy != "off" and self._heads:
            inode = self._heads.popleft()
            self._named_heads.add(inode)
            if self.needs_head(inode):
                return inode
        return None

    def needs_head(self, inode: int) -> bool:
        """Whether the header of a file does not come with its first block now."""
        return self._files[inode].places[0] in (Place.ABSENT, Place.LEFT)

    def head_came(self, inode: int) -> None:
        """The header of a file has arrived."""
        self._files[inode].has_head = True
        self.on_head(inode)

    def takes_head(self, inode: int) -> bool:
        """Whether the header of a file can be put into the page cache."""
        return self._files[inode].takes_pages

    def next_fetch(self) -> BlockId | None:
        """The absent block to fetch from S3 next, or None."""
        if self._policy == "off":
            return None
        block = self._next(Place.ABSENT)
        if block is None and self._policy == "model":
            block = self._in_order(Place.PASSED)
        return block

    def next_load(self, allowance: int) -> BlockId | None:
        """The local block to put into the page cache next, or None.

        Args:
            allowance: how many bytes may still be put there ahead of the readers.
        """
        if self._policy == "off" or allowance < self._block_size:
            return None
        return self._next(Place.LOCAL)

    def _next(self, place: Place) -> BlockId | None:
        """The block at a place that is wanted first; see the module's docstring for the order."""
        for block in (self._of_touched(place), self._of_first(place)):
            if block is not None:
                return block
        if self._policy == "headers":
            return None
        block = self._of_following(place)
        if block is None and self._policy == "model":
            block = self._in_order(place)
        if block is not None and self._policy == "tensor" and place == Place.ABSENT:
            self._skip_learner.add_speculative(block)
        return block

    def _of_touched(self, place: Place) -> BlockId | None:
        best: BlockId | None = None
        least = 0
        for inode, piece in list(self._touched):
            blocks = self._files[inode]
            first, stop = blocks.blocks_of(piece)
            if max(blocks.find(at, first, stop) for at in (Place.ABSENT, Place.LOCAL)) < 0:
                del self._touched[inode, piece]
                continue
            number = self._find(blocks, place, first, stop)
            if number >= 0 and (best is None or number - first < least):
                best, least = BlockId(inode, number), number - first
        return best

    def _of_first(self, place: Place) -> BlockId | None:
        if place == Place.ABSENT:
            while self._first and self.blocks.place(self._first[0]) != Place.ABSENT:
                self._first.popleft()
            return self._first[0] if self._first else None
        while self._first_pages and self.blocks.place(self._first_pages[0]) in (
            Place.NEAR,
            Place.USED,
        ):
            self._first_pages.popleft()
        return next((block for block in self._first_pages if self._is_loadable(block)), None)

    def _is_loadable(self, block: BlockId) -> bool:
        """Whether a block is local and can be put into the page cache."""
        blocks = self._files[block.inode]
        return blocks.takes_pages and blocks.places[block.number] == Place.LOCAL

    def _of_following(self, place: Place) -> BlockId | None:
        best: BlockId | None = None
        least = 0
        for inode, piece in self._streams:
            for block, lead in self._following(inode, piece, place):
                if best is None or lead < least:
                    best, least = block, lead
        return best

    def _following(self, inode: int, piece: int, place: Place) -> Iterator[tuple[BlockId, int]]:
        """The first block at a place that follows a reader, and how many lie before it."""
        blocks = self._files[inode]
        first, _ = blocks.blocks_of(piece)
        stop = len(blocks.places)
        if self._by_tensor(blocks):
            if place == Place.ABSENT:
                yield from self._of_likely(inode, piece)
            return
        if self._policy != "model" or blocks.rank < 0:
            is_look = self._has_order and self._loads.is_look(inode)
            # A look takes two blocks: the header, and the kernel's read-ahead.
            read = max(0, blocks.blocks_read - 2) if is_look else blocks.blocks_read
            stop = min(stop, blocks.last_read + 1 + 2 * read)
        number = self._find(blocks, place, first, stop)
        if number >= 0:
            yield BlockId(inode, number), number - first

    def _of_likely(self, inode: int, piece: int) -> Iterator[tuple[BlockId, int]]:
        """The first absent block after a reader, if the reader will probably read it."""
        blocks = self._files[inode]
        _, after = blocks.blocks_of(piece)
        number = blocks.find(Place.ABSENT, after - 1, len(blocks.places))
        lead = number - after
        if number < 0 and 0 <= blocks.rank < len(self.blocks.order) - 1:
            lead = len(blocks.places) - after
            inode = self.blocks.order[blocks.rank + 1]
            following = self._files[inode]
            number = following.find(
                Place.ABSENT, 0, len(following.places) if following.roles else 0
            )
            lead += number
        if number >= 0 and self._skip_learner.may_speculate(BlockId(inode, number)):
            yield BlockId(inode, number), lead

    def _in_order(self, place: Place) -> BlockId | None:
        if not self.blocks.ordered_blocks(place):
            return None
        ranks = (self._files[inode].rank for inode, _ in self._streams)
        position = next((rank + 1 for rank in ranks if rank >= 0), 0)
        for rank in chain(range(position, len(self.blocks.order)), range(position)):
            inode = self.blocks.order[rank]
            blocks = self._files[inode]
            if blocks.counts[place]:
                number = self._find(blocks, place, 0, len(blocks.places))
                if number >= 0:
                    return BlockId(inode, number)
        return None

    def _find(self, blocks: FileBlocks, place: Place, start: int, stop: int) -> int:
        if place == Place.LOCAL and not blocks.takes_pages:
            return -1
        return blocks.find(place, start, stop)

    def _by_tensor(self, blocks: FileBlocks) -> bool:
        return self._policy == "tensor" and bool(blocks.roles)

    def _touch(self, inode: int, blocks: FileBlocks, piece: int) -> bool:
        """A piece was read in part. Returns whether its reader was elsewhere before."""
        if self._by_tensor(blocks) or (self._policy == "model" and blocks.rank >= 0):
            # Even if its reader is there already: the piece may have been dropped since.
            self._touched[inode, piece] = None
            self._touched.move_to_end((inode, piece))
            if len(self._touched) > TOUCHED_PIECES:
                self._touched.popitem(last=False)
        passed = self._streams.read(inode, piece)
        if passed is None:
            return False
        if self._by_tensor(blocks) and not blocks.is_touched_at_all:
            passed = range(piece)  # a reader that begins here does not want what comes before
        self._skip_learner.read(inode, piece, passed, partial(self._may_be_pages, blocks))
        self._ahead.locate(self.blocks.order, self._streams)
        return True

    def _may_be_pages(self, blocks: FileBlocks, number: int) -> bool:
        """Whether a block lies in the page cache, or is about to."""
        if self._by_tensor(blocks) and not blocks.is_touched(number):
            return False  # see `takes_pages`
        return blocks.places[number] in (Place.NEAR, *_ON_ITS_WAY)

    def _leave(self, inode: int, wanted: Iterable[tuple[int, int]] | None) -> None:
        """Prefetch only these blocks of a file; None: all of them."""
        blocks = self._files[inode]
        blocks.want(wanted)
        for place in (Place.ABSENT, Place.LEFT):
            for number in blocks.all_at(place):
                self.blocks.moved(BlockId(inode, number), Place.ABSENT)

    def _begin_again(self, inode: int, number: int) -> None:
        """A file is read a second time: its following blocks are wanted again, in their turn."""
        blocks = self._files[inode]
        for piece in [piece for other, piece in self._touched if other == inode]:
            first, stop = blocks.blocks_of(piece)
            if stop > number and blocks.find(Place.ABSENT, first, stop) < 0:
                del self._touched[inode, piece]  # it was complete for the former reader
        self._want_again(inode, number)
        if inode in self._forgotten:
            self._forgotten.discard(inode)
            # A loader continues with the files after this one, which the kernel dropped as well.
            rest = self.blocks.after(inode)
            for following in self._forgotten.intersection(rest):
                self._want_again(following, 0)

    def _want_again(self, inode: int, number: int) -> None:
        """Treat blocks from this one on as unread."""
        for used in self._files[inode].all_at(Place.USED, number):
            block = BlockId(inode, used)
            # If it is still in memory, `Scheduler` sees that when its turn has come.
            place = Place.LOCAL if self.blocks.is_stored(block) else Place.ABSENT
            self.blocks.moved(block, place)
