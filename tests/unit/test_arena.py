"""Buffers in a file that other processes map too."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from descriptors import descriptors

from lazyfs.blocks import buffers
from lazyfs.blocks.arena import STEP, Arena
from lazyfs.blocks.buffers import (
    HUGE_PAGE,
    LEAST_SHARED,
    free_idle,
    share,
    shared_offset,
    take_buffer,
)

SIZE = 64 << 10
# A size that no other test takes.
BLOCK = 5 * HUGE_PAGE


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena()
    yield made
    share(None)
    os.close(made.descriptor)


def content(arena: Arena, offset: int, size: int) -> bytes:
    """What another process sees there."""
    return os.pread(arena.descriptor, size, offset)


class TestSlots:
    def test_each_has_a_place_of_its_own_in_the_file(self, arena: Arena) -> None:
        slots = [arena.take(size) for size in (SIZE, 2 * SIZE, SIZE)]
        assert [slot.offset for slot in slots] == [0, SIZE, 3 * SIZE]
        assert os.fstat(arena.descriptor).st_size == STEP
        for number, slot in enumerate(slots, start=1):
            assert slot.arena is arena
            slot[:] = bytes([number]) * len(slot)
        for number, slot in enumerate(slots, start=1):
            assert content(arena, slot.offset, len(slot)) == bytes([number]) * len(slot)

    def test_none_lies_across_a_former_end_of_the_file(self, arena: Arena) -> None:
        """There a mapping of a mover ends."""
        arena.take(STEP - SIZE)
        assert arena.take(2 * SIZE).offset == STEP
        assert arena.take(2 * STEP).offset == 2 * STEP
        assert os.fstat(arena.descriptor).st_size == 4 * STEP
        assert arena.take(SIZE).offset == 4 * STEP

    def test_one_that_is_given_back_is_freed_and_taken_again(self, arena: Arena) -> None:
        slot = arena.take(SIZE)
        arena.take(SIZE)
        slot[:] = b"x" * SIZE
        arena.give_back(slot)
        assert content(arena, slot.offset, SIZE) == bytes(SIZE)
        assert arena.take(2 * SIZE).offset == 2 * SIZE, "it has another size"
        assert arena.take(SIZE).offset == 0
        assert arena.take(SIZE).offset == 4 * SIZE

    def test_a_file_that_cannot_grow_is_an_error(
        self, arena: Arena, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(size: int, offset: int) -> None:
            raise OSError("out of memory")

        monkeypatch.setattr(arena, "_mapped", refuse)
        with pytest.raises(OSError, match="out of memory"):
            arena.take(SIZE)
        monkeypatch.undo()
        assert arena.take(SIZE).offset == 0, "its place is not lost"

    def test_many_slots_take_no_descriptors(self, arena: Arena) -> None:
        before = descriptors()
        slots = [arena.take(4096) for _ in range(50)]
        assert descriptors() == before
        assert len(slots) == 50


class TestBuffers:
    def test_large_ones_are_taken_from_the_arena(self, arena: Arena) -> None:
        outside = take_buffer(BLOCK)
        share(arena)
        buffer = take_buffer(BLOCK - 10)
        offset = shared_offset(buffer)
        assert offset == 0
        buffer[5:9] = b"here"
        assert shared_offset(buffer[5:9]) == 5
        assert content(arena, 5, 4) == b"here"
        second = take_buffer(BLOCK)
        assert shared_offset(second) == BLOCK
        assert shared_offset(outside) is None
        assert shared_offset(buffer.toreadonly()) is None
        assert shared_offset(buffer[:0]) is None
        assert shared_offset(memoryview(bytearray(9))) is None

    def test_small_ones_are_not(self, arena: Arena) -> None:
        share(arena)
        assert shared_offset(take_buffer(LEAST_SHARED // 2)) is None
        assert shared_offset(take_buffer(LEAST_SHARED)) is not None

    def test_those_of_another_arena_are_not_shared_any_more(self, arena: Arena) -> None:
        share(arena)
        buffer = take_buffer(BLOCK)
        other = Arena()
        share(other)
        assert shared_offset(buffer) is None
        assert shared_offset(take_buffer(BLOCK)) == 0
        share(None)
        assert shared_offset(take_buffer(BLOCK)) is None
        os.close(other.descriptor)

    def test_unused_ones_are_all_kept_until_they_are_freed(self, arena: Arena) -> None:
        share(arena)
        count = buffers.MOST_IDLE_BYTES // BLOCK + 3
        many = [take_buffer(BLOCK) for _ in range(count)]
        for each in many:
            each[:1] = b"x"
        del each
        many.clear()
        again = [take_buffer(BLOCK) for _ in range(count)]
        offsets = {shared_offset(buffer) for buffer in again}
        assert offsets == {at * BLOCK for at in range(count)}
        again.clear()
        free_idle()
        assert os.fstat(arena.descriptor).st_blocks == 0
        assert shared_offset(take_buffer(BLOCK)) is not None
