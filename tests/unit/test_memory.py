"""Which block is let go, and which never."""

from __future__ import annotations

import pytest

from lazyfs.blocks import BlockId, Span
from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.file_blocks import Place
from lazyfs.blocks.memory import PART, BlockMemory, Held, all_unread
from lazyfs.listed_object import File
from lazyfs.prefetch.prefetcher import Prefetcher

FILE = File(2, 1, "f", "f", 1000, "e", 0)


class Room:
    """A memory of ten blocks of one byte, of which two are for demand only."""

    def __init__(self) -> None:
        self.prefetcher = Prefetcher("model", BlockMap(1))
        self.prefetcher.blocks.add_file(2, 1000)
        self.memory = BlockMemory(10, 1, self.prefetcher.blocks, lambda: self.prefetcher.readers)

    def hold(self, number: int, place: Place = Place.LOCAL, **state: object) -> Held:
        held = Held(FILE, memoryview(b"x"), **{"unread": 1, **state})  # type: ignore[arg-type]
        self.memory.reserve(1)
        self.memory.hold(BlockId(2, number), held)
        self.prefetcher.blocks.moved(BlockId(2, number), place)
        return held

    def left(self) -> set[int]:
        return {n for n in range(20) if self.memory.get(BlockId(2, n)) is not None}

    def ask(self, urgent: bool = False) -> bool:
        return self.memory.make_room(1, urgent=urgent)


@pytest.fixture
def room() -> Room:
    return Room()


def test_prefetch_never_drops_unread_blocks(room: Room) -> None:
    for number in range(8):
        room.hold(number)
    assert not room.ask()
    assert room.left() == set(range(8))


@pytest.mark.parametrize(
    "state", [{"on_disk": True}, {"unread": 0}, {"place": Place.NEAR}], ids=str
)
def test_blocks_that_are_on_disk_are_dropped_first_oldest_first(room: Room, state: dict) -> None:
    for number in range(8):
        room.hold(number, **(state if number in (3, 5) else {}))
    assert room.ask()
    assert room.left() == set(range(8)) - {3}


def test_partly_read_blocks_stay_even_if_they_are_on_disk(room: Room) -> None:
    for number in range(8):
        room.hold(number, on_disk=True, demanded=True)
    assert not room.ask()
    assert room.ask(urgent=True)
    assert room.ask(urgent=True)
    assert room.left() == set(range(8)), "there was room for demand"
    room.hold(8), room.hold(9)
    assert room.ask(urgent=True)
    assert 0 not in room.left()


def test_demand_drops_no_block_while_others_are_served(room: Room) -> None:
    for number in range(10):
        room.hold(number)
    assert not room.memory.make_room(1, urgent=True, is_served=True)
    assert room.ask(urgent=True)


def test_blocks_in_use_stay_even_for_demand(room: Room) -> None:
    for number in range(10):
        room.hold(number, users=1, on_disk=True)
    assert not room.ask(urgent=True)
    assert len(room.left()) == 10


def test_demand_drops_the_last_prefetched_block(room: Room) -> None:
    for number in range(10):
        room.hold(number)
    assert room.ask(urgent=True)
    assert room.left() == set(range(9))
    assert room.prefetcher.blocks.place(BlockId(2, 9)) == Place.ABSENT


def test_demand_finds_room_that_a_prefetch_must_leave(room: Room) -> None:
    for number in range(8):
        room.hold(number)
    assert not room.ask()
    assert room.ask(urgent=True)
    assert len(room.left()) == 8


def test_a_block_that_was_read_is_not_wanted_again(room: Room) -> None:
    for number in range(8):
        room.hold(number, unread=0)
    assert room.ask()
    assert room.prefetcher.blocks.place(BlockId(2, 0)) == Place.USED


def test_a_prefetch_can_leave_blocks_that_are_about_to_be_pushed(room: Room) -> None:
    """They are on the disk, but to load them from there would cost more than to wait."""
    for number in range(8):
        room.hold(number, on_disk=True)
    assert not room.memory.make_room(1, urgent=False, keep_local=True)
    assert room.left() == set(range(8))
    room.prefetcher.blocks.moved(BlockId(2, 3), Place.NEAR)
    room.memory.get(BlockId(2, 6)).unread = 0  # type: ignore[union-attr]
    assert room.memory.make_room(2, urgent=False, keep_local=True)
    assert room.left() == set(range(8)) - {3, 6}
    assert room.ask(), "otherwise they cost nothing"


@pytest.mark.parametrize("place", [Place.NEAR, Place.USED, Place.ABSENT])
def test_a_prefetch_drops_what_does_not_count_as_local(room: Room, place: Place) -> None:
    """It was in the page cache, and nobody is known to have read it there."""
    for number in range(8):
        room.hold(number)
    room.prefetcher.blocks.moved(BlockId(2, 5), place)
    assert room.ask()
    assert room.left() == set(range(8)) - {5}
    assert room.prefetcher.blocks.place(BlockId(2, 5)) == place


def test_demand_spares_partly_read_blocks(room: Room) -> None:
    for number in range(10):
        room.hold(number, demanded=number < 5)
    assert room.ask(urgent=True)
    assert room.left() == set(range(9)), "what was fetched ahead goes before what is being read"


def test_blocks_of_readers_that_ended_are_dropped(room: Room) -> None:
    for number in range(10):
        room.hold(number, demanded=number != 9)
    assert room.ask(urgent=True)
    assert room.left() == set(range(1, 10))


def parts_left(length: int, *read: tuple[int, int]) -> list[int]:
    """Which parts of a block still count as unread after reads of these bytes."""
    held = Held(FILE, memoryview(bytes(length)), unread=all_unread(length))
    for start, stop in read:
        held.was_read(Span(0, start, stop))
    return [number for number in range(held.unread.bit_length()) if held.unread >> number & 1]


@pytest.mark.parametrize(
    ("length", "parts"), [(1, 1), (PART - 1, 1), (PART, 1), (PART + 1, 2), (4 * PART, 4)]
)
def test_every_part_begins_unread(length: int, parts: int) -> None:
    assert parts_left(length) == list(range(parts))


@pytest.mark.parametrize(
    ("read", "left"),
    [
        ((0, PART), [1, 2, 3]),
        ((0, PART - 1), [0, 1, 2, 3]),
        ((PART, 3 * PART), [0, 3]),
        ((PART, 3 * PART - 1), [0, 2, 3]),
        # A read that begins within a part and ends it: the bytes before were read by others.
        ((PART + 7, 2 * PART), [0, 2, 3]),
        ((5, 9), [0, 1, 2, 3]),
        ((3 * PART, 3 * PART + 10), [0, 1, 2]),
        ((0, 3 * PART + 10), []),
    ],
)
def test_a_part_counts_as_read_with_its_last_byte(read: tuple[int, int], left: list[int]) -> None:
    assert parts_left(3 * PART + 10, read) == left


def test_parts_that_were_read_stay_read() -> None:
    assert parts_left(4 * PART, (0, PART), (2 * PART, 3 * PART), (0, PART)) == [1, 3]


def test_dropped_blocks_are_counted(room: Room) -> None:
    for number in range(10):
        room.hold(number)
    assert room.memory.used_bytes == 10
    assert room.memory.unused_bytes == 0
    assert room.ask(urgent=True)
    assert room.memory.used_bytes == 9
    assert room.memory.unused_bytes == 1
    assert room.memory.dropped_bytes == PART, "one part of it was still unread"
    room.memory.release(4)
    assert room.memory.used_bytes == 5


def test_a_read_makes_a_block_the_last_to_go(room: Room) -> None:
    for number in range(8):
        room.hold(number, unread=0)
    assert room.memory.get(BlockId(2, 0)) is not None
    assert room.ask()
    assert room.left() == set(range(8)) - {1}


BLOCK = 3


def memory_of(blocks: int, readers: int, **state: object) -> BlockMemory:
    """A memory of so many blocks, all of which are held."""
    where = BlockMap(BLOCK)
    where.add_file(2, 100 * BLOCK)
    memory = BlockMemory(blocks * BLOCK, BLOCK, where, lambda: readers)
    for number in range(blocks):
        memory.reserve(BLOCK)
        held = Held(FILE, memoryview(bytes(BLOCK)), **{"unread": 1, **state})  # type: ignore[arg-type]
        memory.hold(BlockId(2, number), held)
        where.moved(BlockId(2, number), Place.LOCAL)
    return memory


@pytest.mark.parametrize(
    ("blocks", "readers", "left_to_demand"),
    [
        (4, 0, 2),  # the least
        (40, 0, 10),  # a quarter
        (40, 15, 15),  # one for each reader
        (40, 30, 20),  # but not more than half
        (41, 30, 21),
    ],
)
def test_prefetch_leaves_room_for_demand(blocks: int, readers: int, left_to_demand: int) -> None:
    memory = memory_of(blocks, readers, unread=0)
    assert memory.make_room(BLOCK, urgent=False)
    assert memory.unused_bytes // BLOCK == left_to_demand + 1


def test_blocks_needed_soon_from_disk_leave_the_least_room() -> None:
    memory = memory_of(40, 15, unread=0)
    assert memory.make_room(BLOCK, urgent=False, soon=True)
    assert memory.unused_bytes == 3 * BLOCK
    assert memory.make_room(3 * BLOCK, urgent=True, soon=True)
    assert memory.unused_bytes == 3 * BLOCK, "it was there already"


@pytest.mark.parametrize(
    ("blocks", "readers", "may_go"), [(8, 0, 0), (9, 0, 1), (12, 12, 0), (13, 12, 1)]
)
def test_partly_read_blocks_on_disk_are_kept_for_several_readers(
    blocks: int, readers: int, may_go: int
) -> None:
    memory = memory_of(blocks, readers, on_disk=True, demanded=True)
    memory.make_room(BLOCK, urgent=False)
    assert blocks - memory.used_bytes // BLOCK == may_go
    assert (memory.get(BlockId(2, 0)) is None) == bool(may_go), "the one that was used longest ago"
    assert memory.get(BlockId(2, 1)) is not None


@pytest.mark.parametrize(
    ("blocks", "readers", "first"), [(8, 0, 8), (9, 0, 0), (12, 12, 12), (13, 12, 0)]
)
def test_demand_spares_partly_read_blocks_of_several_readers(
    blocks: int, readers: int, first: int
) -> None:
    memory = memory_of(blocks, readers, demanded=True)
    memory.reserve(BLOCK)
    memory.hold(BlockId(2, blocks), Held(FILE, memoryview(bytes(BLOCK)), unread=1))
    memory._blocks.moved(BlockId(2, blocks), Place.LOCAL)
    assert memory.make_room(0, urgent=True)
    gone = [number for number in range(blocks + 1) if memory.get(BlockId(2, number)) is None]
    assert gone == [first]


def test_demand_gets_room_if_all_blocks_are_partly_read() -> None:
    memory = memory_of(4, 0, demanded=True)
    assert memory.make_room(2 * BLOCK, urgent=True)
    gone = [number for number in range(4) if memory.get(BlockId(2, number)) is None]
    assert gone == [0, 1]
    assert memory.dropped_bytes == 2 * PART
    assert memory.used_bytes == 2 * BLOCK


def test_dropped_blocks_on_disk_are_not_counted() -> None:
    memory = memory_of(4, 0, on_disk=True)
    assert memory.make_room(BLOCK, urgent=True)
    assert memory.dropped_bytes == 0
