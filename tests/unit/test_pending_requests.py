"""What a worker knows of the requests with which former ones died."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from lazyfs.handover.pending_requests import SLOTS, InHand, Request, note_death

READ, LOOKUP = 5, 0


@pytest.fixture
def file() -> Iterator[int]:
    descriptor = os.memfd_create("in-hand")
    yield descriptor
    os.close(descriptor)


def test_a_request_that_two_workers_died_of_is_refused(file: int) -> None:
    """Others, which were answered or came later, are not."""
    first = InHand(file)
    done = first.take(READ, 7, 4096)
    assert done is not None
    first.answered(done)
    first.take(READ, 7, 8192)
    note_death(file)
    second = InHand(file)
    assert second.deaths(Request(READ, 7, 8192)) == 1
    assert second.take(READ, 7, 8192) is not None
    note_death(file)
    third = InHand(file)
    assert third.take(READ, 7, 8192) is None
    assert third.take(READ, 7, 8192) is None, "however often it is asked"
    for request in ((READ, 7, 4096), (READ, 8, 8192), (LOOKUP, 7, 8192)):
        assert third.take(*request) is not None


def test_deaths_from_outside_do_not_count(file: int) -> None:
    """Somebody killed or replaced the workers."""
    for _ in range(5):
        assert InHand(file).take(READ, 7, 0) is not None


def test_a_death_from_outside_in_between_changes_nothing(file: int) -> None:
    InHand(file).take(READ, 7, 0)
    note_death(file)
    InHand(file).take(READ, 7, 0)
    InHand(file).take(READ, 7, 0)
    note_death(file)
    assert InHand(file).take(READ, 7, 0) is None


def test_workers_that_die_before_they_are_asked_change_nothing(file: int) -> None:
    InHand(file).take(READ, 7, 0)
    for _ in range(5):
        note_death(file)
        InHand(file)
    again = InHand(file)
    assert again.deaths(Request(READ, 7, 0)) == 0, "the last one did not die"


def test_requests_answered_after_a_death_are_not_blamed(file: int) -> None:
    InHand(file).take(READ, 7, 0)
    note_death(file)
    second = InHand(file)
    slot = second.take(READ, 7, 0)
    assert slot is not None
    second.answered(slot)
    second.take(READ, 7, 0)
    note_death(file)
    assert InHand(file).take(READ, 7, 0) is not None


def test_an_orderly_end_forgets_what_is_refused(file: int) -> None:
    """As `lazyfs upgrade` brings: the new version may be able to answer."""
    for _ in range(2):
        InHand(file).take(READ, 7, 0)
        note_death(file)
    assert InHand(file).take(READ, 7, 0) is None
    assert InHand(file).take(READ, 7, 0) is not None


def test_more_requests_than_there_are_slots(file: int) -> None:
    """They are served, and not noted."""
    in_hand = InHand(file)
    slots = [in_hand.take(READ, 7, offset) for offset in range(SLOTS + 2)]
    assert None not in slots
    for slot in slots:
        assert slot is not None
        in_hand.answered(slot)
    assert len({in_hand.take(READ, 8, offset) for offset in range(SLOTS)}) == SLOTS


@pytest.mark.parametrize("content", [b"x", b"another form" * 10_000, b""])
def test_records_of_another_format_are_dropped(file: int, content: bytes) -> None:
    os.write(file, content)
    slot = InHand(file).take(READ, 7, 0)
    assert slot is not None and slot >= 0
    note_death(file)
    assert InHand(file).deaths(Request(READ, 7, 0)) == 1


def test_all_numbers_of_the_kernel_fit(file: int) -> None:
    for number in (0, 1, (1 << 64) - 1):
        assert InHand(file).take(255, number, number) is not None
