"""What holds of the prefetcher whatever happens: driven at random, as a mount drives it."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lazyfs.blocks import BlockId, block_count
from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.file_blocks import AWAY, PIECE_BLOCKS, Place
from lazyfs.model.safetensors import Tensor
from lazyfs.options.mount_options import POLICIES
from lazyfs.prefetch.prefetcher import Prefetcher

BLOCK = 10
SIZES = st.one_of(st.integers(0, 4 * BLOCK), st.integers(0, 60 * BLOCK))
# More wishes than there are blocks: a policy that goes round in circles does not end.
MOST_WISHES = 10_000
SKIPPED = ("b", "d")


class Mount(RuleBasedStateMachine):
    """Does what a mount does with a prefetcher, in any order, and keeps its own account."""

    @initialize(
        policy=st.sampled_from(POLICIES), sizes=st.lists(SIZES, min_size=1, max_size=5),
        chooses=st.booleans(), first_shard=st.integers(0, 2), strays=st.integers(0, 1),
    )  # fmt: skip
    def mount(
        self, policy: str, sizes: list[int], chooses: bool, first_shard: int, strays: int
    ) -> None:
        self.policy = policy
        self.wanted = (lambda name: name.rpartition(".")[2] not in SKIPPED) if chooses else None
        self.made = Prefetcher(policy, BlockMap(BLOCK), wanted=self.wanted)
        self.sizes = dict(enumerate(sizes))
        for inode, size in self.sizes.items():
            self.made.blocks.add_file(inode, size)
        ordered = list(self.sizes)[: len(sizes) - strays]
        self.small = ordered[:first_shard]
        self.shards = ordered[first_shard:]
        self.tables: dict[int, list[Tensor]] = {}
        self.coming: set[BlockId] = set()
        self.stored: set[BlockId] = set()
        # What this load has had or tried to have: not to be wished for again.
        self.came: set[BlockId] = set()
        self.has_failed: set[BlockId] = set()
        # Of these, what no reader has asked for since.
        self.given_up: set[BlockId] = set()
        self.read: set[BlockId] = set()
        # The first and the last block of each tensor of which something was read.
        self.touched: set[tuple[int, int, int]] = set()
        self.made.set_order(self.small, self.shards, [])

    # --- what happens to a mount

    def _any_file(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(list(self.sizes)))

    @rule(data=st.data())
    def a_header_is_known(self, data: st.DataObject) -> None:
        inode = self._any_file(data)
        size = self.sizes[inode]
        if size < 4:
            return
        cuts = data.draw(st.lists(st.integers(1, size), max_size=12, unique=True).map(sorted))
        bounds = [1, *(cut for cut in cuts if cut > 1)]
        tensors = [
            Tensor(f"layers.{at // 4}.{'abcd'[at % 4]}", "U8", (), begin, end)
            for at, (begin, end) in enumerate(zip(bounds, [*bounds[1:], size], strict=True))
        ]
        if inode not in self.tables:
            self.tables[inode] = data.draw(st.sampled_from([tensors, tensors, []]))
            if self.tables[inode]:
                # Which runs of blocks were read is not known any more; tensors are seen from now
                # on. A file without tensors stays what it was, and so do its runs of blocks.
                self.touched = {piece for piece in self.touched if piece[0] != inode}
        self.made.set_tensors(inode, self.tables[inode])

    @rule(data=st.data(), direct=st.booleans())
    def a_file_is_opened(self, data: st.DataObject, direct: bool) -> None:
        self.made.blocks.opened(self._any_file(data), direct=direct)

    @rule(data=st.data(), known=st.sampled_from([True, True, False]))
    def the_kernel_knows(self, data: st.DataObject, known: bool) -> None:
        self.made.blocks.set_known(self._any_file(data), known)

    @rule(data=st.data())
    def a_reader_asks(self, data: st.DataObject) -> None:
        """What is not here is fetched at once, whatever the prefetcher wishes for."""
        inode = self._any_file(data)
        if not self.sizes[inode]:
            return
        offset = data.draw(st.integers(0, self.sizes[inode] + BLOCK))
        self._read(inode, offset, data.draw(st.integers(1, 3 * BLOCK)))

    @rule(data=st.data())
    def a_reader_goes_on(self, data: st.DataObject) -> None:
        """Through a file, or through every other tensor of it."""
        inode = self._any_file(data)
        tensors = self.tables.get(inode)
        steps = data.draw(st.integers(1, 8))
        if tensors:
            for tensor in tensors[:: data.draw(st.sampled_from([1, 2, 4]))][:steps]:
                self._read(inode, tensor.begin, tensor.end - tensor.begin)
        else:
            for offset in range(0, min(self.sizes[inode], 6 * steps * BLOCK), BLOCK):
                self._read(inode, offset, BLOCK)

    def _read(self, inode: int, offset: int, size: int) -> None:
        first = BlockId(inode, offset // BLOCK)
        if offset < self.sizes[inode] and self.made.blocks.place(first) == Place.USED:
            # What had come whole is had again in its turn; what had not is still somebody's.
            self.touched = {
                (other, start, stop)
                for other, start, stop in self.touched
                if other != inode or stop <= first.number or self._lacks(other, start, stop)
            }
        used = {block for block in self.came if self.made.blocks.place(block) == Place.USED}
        self.made.was_read(inode, offset, size)
        self.came -= {block for block in used if self.made.blocks.place(block) != Place.USED}
        if self._completes(inode) and first.number < block_count(self.sizes[inode], BLOCK):
            self._touch(inode, offset, min(offset + size // 2, self.sizes[inode] - 1))
        stop = min(offset + size, self.sizes[inode])
        for number in range(offset // BLOCK, block_count(stop, BLOCK)):
            block = BlockId(inode, number)
            place = self.made.blocks.place(block)
            if place in AWAY and block not in self.coming:
                # Fetched for the reader, who does not ask the prefetcher.
                self.made.blocks.moved(block, Place.COMING)
                self.made.blocks.moved(block, Place.LOCAL)
                self.came.add(block)
            self.read.add(block)
            self.given_up.discard(block)

    def _touch(self, inode: int, offset: int, middle: int) -> None:
        """Something was read of the tensor, or else of the run of blocks, around `middle`."""
        tensors = self.tables.get(inode)
        if tensors:
            for tensor in tensors:
                if tensor.begin <= middle < tensor.end and offset:
                    stop = block_count(tensor.end, BLOCK)
                    self.touched.add((inode, tensor.begin // BLOCK, stop))
        elif offset >= BLOCK:  # else it is the header
            begin = middle // BLOCK // PIECE_BLOCKS * PIECE_BLOCKS
            self.touched.add((inode, begin, begin + PIECE_BLOCKS))

    def _completes(self, inode: int) -> bool:
        """Whether tensors of a file are to be had whole, and first."""
        return (self.policy == "tensor" and bool(self.tables.get(inode))) or (
            self.policy == "model" and inode in (*self.small, *self.shards)
        )

    @rule(count=st.integers(1, 12))
    def blocks_are_fetched(self, count: int) -> None:
        for _ in range(count):
            block = self._wish()
            if block is None:
                return
            self.made.blocks.moved(block, Place.COMING)
            self.coming.add(block)

    @rule(data=st.data())
    def blocks_come(self, data: st.DataObject) -> None:
        for block in sorted(self.coming):
            what = data.draw(st.sampled_from(["stored", "held", "fails", "later"]))
            if what == "later":
                continue
            self.coming.discard(block)
            if what == "fails":
                self.made.blocks.failed(block)
                self.has_failed.add(block)
                self.given_up.add(block)
                self.came.discard(block)
                continue
            self.made.blocks.moved(block, Place.LOCAL)
            if what == "stored":
                self.made.blocks.stored(block)
                self.stored.add(block)

    @rule(count=st.integers(1, 12), allowance=st.integers(0, 40))
    def blocks_go_into_the_page_cache(self, count: int, allowance: int) -> None:
        for _ in range(count):
            block = self.made.next_load(allowance * BLOCK)
            if block is None:
                return
            assert allowance, "there was no room"
            assert self.made.blocks.place(block) == Place.LOCAL
            self.made.blocks.moved(block, Place.NEAR)

    @rule(count=st.integers(1, 6))
    def the_disk_is_full(self, count: int) -> None:
        """What all readers have had makes room; it is in the page cache, or only in S3 again."""
        for block in self.made.take_spent(count):
            assert block in self.stored, "each is named once"
            self.stored.discard(block)
            if self.made.blocks.place(block) != Place.NEAR:
                self.made.blocks.moved(block, Place.USED)

    @rule(data=st.data())
    def memory_is_short(self, data: st.DataObject) -> None:
        """What was read is let go of, if it is nowhere else."""
        here = [
            block for block in sorted(self.read) if self.made.blocks.place(block) == Place.LOCAL
        ]
        if here:
            self.made.blocks.moved(data.draw(st.sampled_from(here)), Place.USED)

    @rule(data=st.data())
    def the_plan_is_another_one(self, data: st.DataObject) -> None:
        order = data.draw(st.permutations(list(self.sizes)))
        cut = data.draw(st.integers(0, len(order)))
        self.small, self.shards = order[:cut][:1], order[cut:]
        headed = [inode for inode in self.shards[:1] if self.sizes[inode]]
        self.made.set_order(self.small, self.shards, headed)

    @rule()
    def headers_come(self) -> None:
        while (inode := self.made.next_head()) is not None:
            assert inode in self.shards
            self.made.head_came(inode)

    # --- what must hold

    def _wish(self) -> BlockId | None:
        block = self.made.next_fetch()
        if block is None:
            return None
        place = self.made.blocks.place(block)
        assert 0 <= block.number < block_count(self.sizes[block.inode], BLOCK)
        assert place in (Place.ABSENT, Place.PASSED), "it is here, or nobody wants it"
        assert self.policy == "model" or place == Place.ABSENT, "it is passed over"
        assert self.policy != "off"
        assert block not in self.came, "this load has had it"
        assert block not in self.given_up, "it is left to who reads it"
        assert not self._is_excluded(block) or self._is_of_touched(block)
        if not self._is_of_touched(block):
            for inode, first, stop in self.touched:
                assert not self._lacks(inode, first, stop), "of a tensor that was read"
        if self.policy == "headers":
            assert block.inode in self.small or block.number == 0 or self._is_of_touched(block)
        self.came.add(block)
        return block

    def _lacks(self, inode: int, first: int, stop: int) -> bool:
        """Whether of a run of blocks one is wanted and not on its way."""
        stop = min(stop, block_count(self.sizes[inode], BLOCK))
        return any(
            self.made.blocks.place(BlockId(inode, number)) == Place.ABSENT
            for number in range(first, stop)
        )

    def _is_of_touched(self, block: BlockId) -> bool:
        return any(
            inode == block.inode and first <= block.number < stop
            for inode, first, stop in self.touched
        )

    def _is_excluded(self, block: BlockId) -> bool:
        """Whether only tensors that are not wanted are in a block."""
        tensors = self.tables.get(block.inode)
        if self.wanted is None or not tensors or not block.number:
            return False
        begin = block.number * BLOCK
        inside = [
            each
            for each in tensors
            if each.begin < begin + BLOCK and each.end > max(begin, each.begin)
        ]
        return not any(self.wanted(tensor.name) for tensor in inside)

    @invariant()
    def counts_agree_with_places(self) -> None:
        if not hasattr(self, "made"):
            return
        made = self.made
        for inode, size in self.sizes.items():
            blocks = made.blocks.files[inode]
            found = Counter(
                made.blocks.place(BlockId(inode, number))
                for number in range(block_count(size, BLOCK))
            )
            assert blocks.counts == [found[place] for place in Place]
        ordered = [made.blocks.files[inode].counts for inode in made.blocks.order]
        assert [made.blocks.ordered_blocks(place) for place in Place] == [
            sum(counts[place] for counts in ordered) for place in Place
        ]
        _, there = made.blocks.progress()
        assert 0 <= there <= sum(self.sizes.values())
        assert made.near_ahead_bytes >= 0

    def teardown(self) -> None:
        """At last all comes that is wished for: that ends, and is enough."""
        if not hasattr(self, "made"):
            return
        for block in sorted(self.coming):
            self.made.blocks.moved(block, Place.LOCAL)
        wishes = 0
        while (block := self._wish()) is not None:
            wishes += 1
            assert wishes < MOST_WISHES
            self.made.blocks.moved(block, Place.COMING)
            self.made.blocks.moved(block, Place.LOCAL)
        if self.policy != "model":
            return
        for inode in (*self.small, *self.shards):
            for number in range(block_count(self.sizes[inode], BLOCK)):
                block = BlockId(inode, number)
                place = self.made.blocks.place(block)
                assert place not in (Place.ABSENT, Place.COMING, Place.PASSED), "never wished for"
                is_due = self.wanted is None or (inode in self.tables and number)
                if place == Place.LEFT and is_due and not self._is_excluded(block):
                    assert block in self.has_failed


Mount.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestRules = Mount.TestCase
