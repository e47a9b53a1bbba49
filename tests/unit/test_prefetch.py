"""What is wished for, in which order."""

from __future__ import annotations

from itertools import pairwise

from lazyfs.blocks import BlockId
from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.file_blocks import AWAY, Place
from lazyfs.model.safetensors import Tensor
from lazyfs.prefetch.loads import LOOK_BYTES
from lazyfs.prefetch.prefetcher import Prefetcher

BLOCK = 10


def prefetcher(policy: str = "model", *sizes: int) -> Prefetcher:
    """Files 2, 3, ... of so many blocks, in loading order."""
    made = Prefetcher(policy, BlockMap(BLOCK))
    for inode, size in enumerate(sizes, start=2):
        made.blocks.add_file(inode, size * BLOCK - 3)
    if policy != "sequential":
        made.set_order((), range(2, 2 + len(sizes)))
    return made


def heads(made: Prefetcher) -> list[int]:
    """All files whose headers are wished for by themselves."""
    return list(iter(made.next_head, None))


def tensors(*begins: int, end: int, name: str = "t.{}.w") -> list[Tensor]:
    """Tensors that begin there and leave no gaps."""
    return [
        Tensor(name.format(n), "U8", (), b, e) for n, (b, e) in enumerate(pairwise((*begins, end)))
    ]


def take(made: Prefetcher, count: int) -> list[tuple[int, int]]:
    """The next wishes, each granted at once."""
    taken = []
    for _ in range(count):
        block = made.next_fetch()
        if block is None:
            break
        made.blocks.moved(block, Place.COMING)
        taken.append(tuple(block))
    return taken


def test_a_model_is_fetched_in_loading_order_before_anyone_reads() -> None:
    made = prefetcher("model", 2, 1, 2)
    assert take(made, 9) == [(2, 0), (2, 1), (3, 0), (4, 0), (4, 1)]


def test_small_files_come_before_all_shards() -> None:
    made = prefetcher("model", 2, 1, 2)
    made.set_order([4], [2, 3])
    assert take(made, 9) == [(4, 0), (4, 1), (2, 0), (2, 1), (3, 0)]


def test_headers_are_requested_once_and_not_if_their_block_is_coming() -> None:
    made = prefetcher("model", 2, 3, 3)
    take(made, 1)
    made.set_order((), [2, 3, 4], [2, 3, 4])
    assert heads(made) == [3, 4]
    assert not made.blocks.beginnings_are_here()
    made.head_came(3)
    made.set_order((), [3, 2, 4], [2, 3, 4])
    assert heads(made) == []
    made.head_came(4)
    made.blocks.moved(BlockId(2, 0), Place.LOCAL)
    assert made.blocks.beginnings_are_here()


def test_headers_alone() -> None:
    made = prefetcher("headers", 3, 3)
    made.set_order((), [2, 3], [3])
    assert take(made, 9) == [(2, 0)], "what has no header has its first block"
    assert heads(made) == [3]
    made.was_read(2, BLOCK, BLOCK)
    assert take(made, 9) == []


def test_a_reader_moves_the_focus_and_skipped_blocks_come_last() -> None:
    made = prefetcher("model", 2, 3, 2)
    made.was_read(3, BLOCK, 1)
    assert take(made, 3) == [(3, 0), (3, 1), (3, 2)]
    assert take(made, 9) == [(4, 0), (4, 1), (2, 0), (2, 1)]


def test_a_touched_tensor_is_fetched_whole_wherever_it_was_touched() -> None:
    made = prefetcher("model", 40)
    made.set_tensors(2, tensors(2, 100, 250, end=397))
    made.was_read(2, 220, 4)
    assert take(made, 3) == [(2, 10), (2, 11), (2, 12)]
    made.was_read(2, 255, 4)
    assert take(made, 1) == [(2, 25)]


def test_off_requests_nothing() -> None:
    made = prefetcher("off", 5)
    made.was_read(2, 0, 1)
    assert take(made, 1) == []
    assert made.next_load(10**9) is None


def test_a_file_out_of_order_is_followed_only_as_far_as_it_was_read() -> None:
    made = prefetcher("sequential", 100)
    assert take(made, 1) == []
    made.was_read(2, 0, 1)
    assert take(made, 99) == [(2, 0), (2, 1), (2, 2)]
    for number in range(1, 5):
        made.was_read(2, number * BLOCK, BLOCK)
    assert take(made, 99)[-1] == (2, 14)


def test_a_failed_block_is_left_to_its_readers() -> None:
    made = prefetcher("model", 3)
    made.blocks.failed(BlockId(2, 0))
    assert take(made, 9) == [(2, 1), (2, 2)]
    made.was_read(2, 0, 1)
    assert take(made, 9) == [(2, 0)]


def test_a_block_that_was_used_is_fetched_again_only_for_a_second_pass() -> None:
    made = prefetcher("model", 4)
    take(made, 4)
    for number in range(4):
        made.blocks.moved(BlockId(2, number), Place.USED)
    assert take(made, 9) == []
    made.was_read(2, BLOCK, 1)
    assert take(made, 9) == [(2, 1), (2, 2), (2, 3)]


def test_a_second_reading_of_a_file_goes_before_the_first() -> None:
    made = prefetcher("model", 7)
    made.set_tensors(2, tensors(5, 40, end=67))
    take(made, 7)
    for number in range(7):
        made.blocks.moved(BlockId(2, number), Place.LOCAL)
        made.was_read(2, number * BLOCK, BLOCK // 2)
    for number in range(1, 7):
        made.blocks.moved(BlockId(2, number), Place.USED)
    made.was_read(2, BLOCK, BLOCK // 2)
    made.blocks.moved(BlockId(2, 1), Place.LOCAL)
    assert take(made, 9) == [(2, 2), (2, 3), (2, 4), (2, 5), (2, 6)]


def test_a_tensor_that_its_last_reader_reads_again_is_fetched_whole_again() -> None:
    made = prefetcher("tensor", 7)
    made.set_tensors(2, tensors(5, 60, end=67))
    made.was_read(2, BLOCK, BLOCK // 2)
    for block in take(made, 7):
        made.blocks.moved(BlockId(*block), Place.USED)
    assert take(made, 9) == []
    made.was_read(2, BLOCK, BLOCK // 2)
    assert take(made, 5) == [(2, 1), (2, 2), (2, 3), (2, 4), (2, 5)]


def test_only_blocks_of_inodes_that_the_kernel_knows_are_loaded() -> None:
    made = prefetcher("model", 2, 1)
    for block in ((2, 0), (2, 1), (3, 0)):
        made.blocks.moved(BlockId(*block), Place.LOCAL)
    assert made.next_load(10**9) is None
    made.blocks.set_known(3, True)
    assert made.next_load(10**9) == (3, 0)
    made.blocks.set_known(2, True)
    assert made.next_load(10**9) == (2, 0)
    assert made.next_load(5) is None
    made.blocks.opened(2, direct=True)
    assert made.next_load(10**9) == (3, 0)


def test_blocks_that_the_kernel_dropped_are_on_disk_or_not_local() -> None:
    """Also if memory still has them: their room is for what readers need sooner."""
    made = prefetcher("model", 3)
    made.blocks.set_known(2, True)
    made.blocks.is_held = lambda block: block.number == 1
    for number in range(3):
        made.blocks.moved(BlockId(2, number), Place.NEAR)
    made.blocks.stored(BlockId(2, 0))
    made.blocks.set_known(2, False)
    places = [made.blocks.place(BlockId(2, number)) for number in range(3)]
    assert places == [Place.LOCAL, Place.USED, Place.USED]
    assert take(made, 9) == [], "nobody reads it"


def test_a_model_that_the_kernel_forgot_is_wanted_again_when_a_reader_begins() -> None:
    made = prefetcher("model", 2, 3, 1)
    for inode, number in ((2, 0), (2, 1), (3, 0), (3, 1), (3, 2), (4, 0)):
        made.blocks.moved(BlockId(inode, number), Place.NEAR)
    for inode in (2, 3):
        made.blocks.set_known(inode, False)
    assert take(made, 9) == []
    made.was_read(2, 0, BLOCK)
    assert take(made, 9) == [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)], "4 is still in its place"


def test_blocks_that_failed_are_wanted_and_not_here() -> None:
    made = prefetcher("model", 1, 3)
    size = BLOCK - 3 + 3 * BLOCK - 3
    for block in ((2, 0), (3, 0), (3, 1)):
        made.blocks.moved(BlockId(*block), Place.LOCAL)
    made.blocks.failed(BlockId(3, 2))
    wanted, there = made.blocks.progress()
    assert wanted == size
    assert there == BLOCK - 3 + 2 * BLOCK
    made.blocks.failed(BlockId(2, 0))
    assert made.blocks.progress() == (size, 2 * BLOCK)
    made.was_read(2, 0, 1)
    made.blocks.moved(BlockId(2, 0), Place.LOCAL)
    assert made.blocks.progress() == (size, there)


def test_unwanted_blocks_are_not_waited_for() -> None:
    made = Prefetcher("model", BlockMap(BLOCK), wanted=lambda name: name.startswith("a"))
    made.blocks.add_file(2, 25)
    made.set_order((), [2])
    made.set_tensors(2, [Tensor("a", "U8", (), 5, 15), Tensor("b", "U8", (), 15, 25)])
    assert made.blocks.progress() == (20, 0), "the last block, of 5 bytes, is not wanted"


def test_progress_does_not_run_backwards_while_blocks_are_put_into_the_page_cache() -> None:
    made = prefetcher("model", 2)
    there = []
    for place in (Place.COMING, Place.LOCAL, Place.LOADING, Place.NEAR):
        made.blocks.moved(BlockId(2, 0), place)
        there.append(made.blocks.progress()[1])
    assert there == [0, BLOCK, BLOCK, BLOCK]


def test_reading_the_header_of_a_shard_is_not_a_load() -> None:
    made = prefetcher("model", 2, 4, 4)
    take(made, 1)
    for inode in (2, 3, 4):
        made.was_read(inode, 0, BLOCK)
    assert take(made, 1) == [(2, 1)], "still the first shard"


def test_a_missed_mapped_page_is_in_the_middle_of_its_request() -> None:
    made = prefetcher("model", 40)
    made.set_tensors(2, tensors(2, 100, 250, end=397))
    take(made, 1)
    made.was_read(2, 96, 10)
    assert take(made, 1) == [(2, 10)]


def test_several_readers_are_served_evenly() -> None:
    made = prefetcher("model", 30, 30, 30)
    for inode in (2, 4):
        made.blocks.moved(BlockId(inode, 0), Place.NEAR)
    for inode in (2, 4):
        made.set_tensors(inode, tensors(2, 15, end=297))
        made.was_read(inode, 20, 1)
    taken = take(made, 20)
    assert sorted(inode for inode, _ in taken) == [2] * 10 + [4] * 10


def test_tensor_fetches_the_touched_one_whole_and_little_more() -> None:
    made = prefetcher("tensor", 100)
    take(made, 1)
    made.set_tensors(2, tensors(2, 200, 300, 600, end=997))
    assert take(made, 9) == []
    made.was_read(2, 310, 4)
    assert take(made, 99) == [(2, number) for number in range(30, 60 + 16)]


def layered(policy: str, layers: int = 20) -> Prefetcher:
    """Each layer has a tensor `a` and one `b`, of 5 blocks each."""
    made = prefetcher(policy, 10 * layers)
    begins = range(0, 100 * layers, 50)
    made.set_tensors(
        2,
        [
            Tensor(f"layers.{at // 2}.{'ab'[at % 2]}", "U8", (), begin + 1, begin + 51)
            for at, begin in enumerate(begins)
        ],
    )
    return made


def test_tensors_that_a_loader_keeps_skipping_are_not_fetched() -> None:
    made = layered("tensor")
    for layer in range(3):
        made.was_read(2, 100 * layer + 20, 4)
    ahead = {number for _, number in take(made, 99)}
    assert {30, 31, 32, 33, 34} <= ahead, "layers.3.a"
    assert not {36, 37, 38} & ahead, "layers.3.b"


def test_skipped_bytes_that_were_fetched_are_counted_until_they_are_read() -> None:
    made = layered("model")
    for number in range(200):
        made.blocks.moved(BlockId(2, number), Place.LOCAL)
    made.was_read(2, 20, 4)
    made.was_read(2, 120, 4)
    assert made.passed_over_bytes == 4 * BLOCK, "layers.0.b, without what it shares with others"
    made.was_read(2, 80, 4)
    assert made.passed_over_bytes == 0


def test_skipped_tensors_are_wanted_again_once_they_are_read() -> None:
    made = layered("tensor")
    for layer in range(3):
        made.was_read(2, 100 * layer + 20, 4)
    made.was_read(2, 370, 4)
    assert {45, 46, 47, 48} <= {number for _, number in take(made, 99)}, "layers.4.b"


def test_model_fetches_skipped_tensors_last() -> None:
    made = layered("model")
    for layer in range(3):
        made.was_read(2, 100 * layer + 20, 4)
    order = [number for _, number in take(made, 999)]
    assert sorted(order) == list(range(200)), "but it has it"
    assert order.index(38) > order.index(190)


def test_model_expects_a_skip_only_after_two() -> None:
    made = layered("model")
    made.was_read(2, 20, 4)
    made.was_read(2, 120, 4)
    assert made.blocks.place(BlockId(2, 18)) == Place.ABSENT, "layers.1.b"
    made.was_read(2, 220, 4)
    assert made.blocks.place(BlockId(2, 38)) == Place.PASSED, "layers.3.b"


def test_wasted_bytes_are_bounded() -> None:
    """A reader of every seventh tensor, of names without any pattern."""
    made = prefetcher("tensor", 3000)
    take(made, 1)
    made.set_tensors(2, tensors(*range(1, 29_990, 30), end=29_997, name="x{}"))
    for begin in range(1, 29_000, 210):
        made.was_read(2, begin + 10, 4)
        take(made, 999)
    away = sum(made.blocks.place(BlockId(2, number)) in AWAY for number in range(3000))
    assert 3000 - away < 139 * 4 * 1.2 + 16


def test_only_tensors_that_are_wanted() -> None:
    made = Prefetcher("model", BlockMap(BLOCK), wanted=lambda name: name.endswith(".a"))
    made.blocks.add_file(2, 200)
    made.set_order((), [2])
    assert take(made, 99) == [(2, 0)], "the header says what there is"
    made.set_tensors(2, [Tensor("0.a", "U8", (), 5, 60), Tensor("0.b", "U8", (), 60, 200)])
    assert take(made, 99) == [(2, number) for number in range(1, 6)]
    made.was_read(2, 150, 4)
    assert take(made, 99) == []


def test_a_file_without_tensors_is_wanted_whole() -> None:
    made = Prefetcher("model", BlockMap(BLOCK), wanted=lambda name: False)
    made.blocks.add_file(2, 3 * BLOCK)
    made.set_order((), [2])
    made.set_tensors(2, ())
    assert take(made, 99) == [(2, 0), (2, 1), (2, 2)]


def test_reads_out_of_order_and_of_headers_are_reported() -> None:
    made = prefetcher("model", 2)
    made.blocks.add_file(9, 100)
    told: list[int] = []
    made.on_stray = made.on_head = told.append
    made.was_read(9, 50, 4)
    made.was_read(9, 60, 4)
    assert told == [9]
    made.blocks.moved(BlockId(2, 0), Place.COMING)
    made.blocks.moved(BlockId(2, 0), Place.LOCAL)
    made.head_came(2)
    assert told == [9, 2, 2]


def test_no_file_in_the_order_is_a_stray() -> None:
    made = prefetcher("model", 30, 30)
    told: list[int] = []
    made.on_stray = told.append
    for inode in (2, 3):
        made.was_read(inode, 100, 4)
        made.was_read(inode, 150, 4)
    assert told == []


def test_one_request_near_a_header_is_no_load_and_one_far_from_it_is() -> None:
    told: list[int] = []
    size = 1 << 30

    def first_read(offset: int, *, header: int | None = None) -> list[int]:
        made = Prefetcher("model", BlockMap(8 << 20), read_ahead_bytes=ahead)
        made.set_order((), ())
        made.blocks.add_file(9, size)
        if header is not None:
            made.set_tensors(9, tensors(header, end=size))
        made.on_stray = told.append
        told.clear()
        made.was_read(9, 0, 4096)
        made.was_read(9, offset, 4096)
        return told

    for ahead in (1 << 20, 64 << 20):
        assert first_read(LOOK_BYTES + ahead - 4096) == []
        assert first_read(LOOK_BYTES + ahead) == [9]
        assert first_read(100_000 + ahead - 4096, header=100_000) == []
        assert first_read(100_000 + ahead, header=100_000) == [9]


def looked_at(made: Prefetcher, inode: int) -> list[tuple[int, int]]:
    """What is fetched ahead after a read of the first block."""
    made.blocks.add_file(inode, 1 << 30)
    made.blocks.moved(BlockId(inode, 0), Place.COMING)
    made.was_read(inode, 0, 1 << 20)
    return take(made, 9)


def test_a_file_is_read_ahead_from_its_first_block_until_another_was_only_looked_at() -> None:
    made = Prefetcher("model", BlockMap(8 << 20))
    made.set_order((), ())
    assert looked_at(made, 5) == [(5, 1), (5, 2)]
    made.was_read(5, 100 << 20, 1 << 20)
    take(made, 999)
    assert looked_at(made, 6) == [(6, 1), (6, 2)], "the one before was loaded"
    assert looked_at(made, 7) == [], "the one before may be looked at only"
    made.was_read(6, 100 << 20, 1 << 20)
    made.was_read(7, 100 << 20, 1 << 20)
    take(made, 999)
    assert looked_at(made, 8) == [(8, 1), (8, 2)]


def test_a_small_file_that_was_read_says_nothing_about_looks() -> None:
    made = Prefetcher("model", BlockMap(8 << 20))
    made.set_order((), ())
    made.blocks.add_file(4, LOOK_BYTES)
    made.blocks.moved(BlockId(4, 0), Place.COMING)
    made.was_read(4, 0, 4096)
    assert looked_at(made, 5) == [(5, 1), (5, 2)]


def test_other_files_can_wait_only_for_what_is_coming_of_the_first_one() -> None:
    made = prefetcher("model", 2, 2, 2)
    take(made, 2)
    assert not made.can_wait(BlockId(3, 0)), "nothing was read"
    made.was_read(2, BLOCK, 4)
    assert made.can_wait(BlockId(3, 0))
    assert not made.can_wait(BlockId(2, 1))
    for number in range(2):
        made.blocks.moved(BlockId(2, number), Place.LOCAL)
    assert not made.can_wait(BlockId(3, 0)), "the first one is here"
    take(made, 2)
    made.was_read(3, BLOCK, 4)
    assert not made.can_wait(BlockId(4, 0)), "the second is not the first"


def test_pages_count_as_unread_until_a_request_from_behind_them() -> None:
    made = prefetcher("model", 20, 20)
    made.blocks.set_known(2, True)
    for number in range(20):
        made.blocks.moved(BlockId(2, number), Place.NEAR)
    assert made.near_ahead_bytes == 20 * BLOCK
    made.was_read(2, 17 * BLOCK, 4)
    assert made.near_ahead_bytes == 4 * BLOCK, "the piece begins at block 16"
    made.was_read(3, 9 * BLOCK, 4)
    assert made.near_ahead_bytes == 0
    made.blocks.moved(BlockId(3, 12), Place.NEAR)
    assert made.near_ahead_bytes == BLOCK


def test_the_next_block_is_found_without_a_scan_of_all_blocks() -> None:
    """Or this would not end before the test's timeout."""
    made = prefetcher("model", *[8] * 2000)
    wishes = 0
    while (block := made.next_fetch()) is not None:
        made.blocks.moved(block, Place.COMING)
        made.blocks.moved(block, Place.NEAR)
        made.was_read(block.inode, block.number * BLOCK, BLOCK)
        wishes += 1
    assert wishes == 16_000


def test_blocks_on_disk_are_given_up_once_all_readers_have_read_them() -> None:
    made = prefetcher("model", 60, 60)
    for number in range(60):
        made.blocks.stored(BlockId(2, number))
        made.blocks.moved(BlockId(2, number), Place.NEAR if number < 30 else Place.LOCAL)
    assert made.take_spent(99) == []
    for number in (10, 35, 50):
        made.was_read(2, number * BLOCK, BLOCK)
    assert [number for _, number in made.take_spent(5)] == [0, 1, 2, 3, 4]
    assert [number for _, number in made.take_spent(99)] == [*range(5, 30), *range(32, 40)], (
        "what lay in the page cache, and the pieces that were touched; not what was passed by, "
        "and not what is just behind the reader"
    )
