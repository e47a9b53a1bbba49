"""What is wished for, in which order."""

from __future__ import annotations

from lazyfs.blocks import BlockId
from lazyfs.prefetch import Place, Prefetcher

BLOCK = 10


def prefetcher(policy: str = "model", *sizes: int) -> Prefetcher:
    """Files 2, 3, ... of so many blocks, in loading order."""
    made = Prefetcher(policy, BLOCK)
    for inode, size in enumerate(sizes, start=2):
        made.add_file(inode, size * BLOCK - 3)
    made.set_order(range(2, 2 + len(sizes)))
    return made


def take(made: Prefetcher, count: int) -> list[tuple[int, int]]:
    """The next wishes, each granted at once."""
    taken = []
    for _ in range(count):
        block = made.next_fetch()
        if block is None:
            break
        made.moved(block, Place.COMING)
        taken.append(tuple(block))
    return taken


def test_a_model_is_fetched_in_loading_order_before_anyone_reads() -> None:
    made = prefetcher("model", 2, 1, 2)
    assert take(made, 9) == [(2, 0), (2, 1), (3, 0), (4, 0), (4, 1)]


def test_a_reader_moves_the_focus_and_what_was_passed_over_comes_last() -> None:
    made = prefetcher("model", 2, 3, 2)
    made.was_read(3, 0)
    assert take(made, 9) == [(3, 0), (3, 1), (3, 2), (4, 0), (4, 1), (2, 0), (2, 1)]


def test_a_touched_tensor_is_fetched_whole_wherever_it_was_touched() -> None:
    made = prefetcher("model", 40)
    made.set_tensors(2, [2, 100, 250])
    made.was_read(2, 220)
    assert take(made, 3) == [(2, 10), (2, 11), (2, 12)]
    made.was_read(2, 255)
    assert take(made, 1) == [(2, 25)]


def test_off_wishes_nothing() -> None:
    made = prefetcher("off", 5)
    made.was_read(2, 0)
    assert take(made, 1) == []
    assert made.next_load(10**9) is None


def test_a_file_out_of_order_is_followed_only_as_far_as_it_was_read() -> None:
    made = prefetcher("sequential", 100)
    assert take(made, 1) == []
    made.was_read(2, 0)
    assert take(made, 99) == [(2, 0), (2, 1), (2, 2)]
    for number in range(1, 5):
        made.was_read(2, number * BLOCK)
    assert take(made, 99)[-1] == (2, 14)


def test_a_failed_block_is_left_to_its_readers() -> None:
    made = prefetcher("model", 3)
    made.failed(BlockId(2, 0))
    assert take(made, 9) == [(2, 1), (2, 2)]
    made.was_read(2, 0)
    assert take(made, 9) == [(2, 0)]


def test_a_block_that_was_used_is_fetched_again_only_for_a_second_pass() -> None:
    made = prefetcher("model", 4)
    take(made, 4)
    for number in range(4):
        made.moved(BlockId(2, number), Place.USED)
    assert take(made, 9) == []
    made.was_read(2, BLOCK)
    assert take(made, 9) == [(2, 1), (2, 2), (2, 3)]


def test_only_blocks_of_inodes_that_the_kernel_knows_are_loaded() -> None:
    made = prefetcher("model", 2, 1)
    for block in ((2, 0), (2, 1), (3, 0)):
        made.moved(BlockId(*block), Place.LOCAL)
    assert made.next_load(10**9) is None
    made.set_known(3, True)
    assert made.next_load(10**9) == (3, 0)
    made.set_known(2, True)
    assert made.next_load(10**9) == (2, 0)
    assert made.next_load(5) is None
    made.opened(2, direct=True)
    assert made.next_load(10**9) == (3, 0)


def test_when_the_kernel_forgets_an_inode_its_pages_are_gone() -> None:
    made = prefetcher("model", 1)
    made.set_known(2, True)
    made.moved(BlockId(2, 0), Place.NEAR)
    made.set_known(2, False)
    assert made.place(BlockId(2, 0)) == Place.LOCAL
