"""Which blocks stay for the load that a cache serves."""

from __future__ import annotations

import pytest

from lazyfs.cache import current_load
from lazyfs.cache.current_load import (
    ANNOUNCE_S,
    DECLINE_S,
    IDLE_S,
    LONGEST_STAY_S,
    SHORTEST_STAY_S,
    CurrentLoad,
)  # fmt: skip

EPOCH_S = 1_700_000_000.0


class Clock:
    """Seconds since the machine started, and since the epoch."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def time(self) -> float:
        return EPOCH_S + self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(current_load, "time", made)
    return made


def stays_s(load: CurrentLoad, clock: Clock) -> float:
    """For how long blocks stay after their last use."""
    return clock.time() - load.may_leave_before_s


def test_what_a_load_used_stays_as_long_as_the_load(clock: Clock) -> None:
    load = CurrentLoad()
    load.announced()
    assert stays_s(load, clock) == SHORTEST_STAY_S
    for _ in range(10):
        clock.now_s += IDLE_S - 1
        load.used()
    assert stays_s(load, clock) == 10 * (IDLE_S - 1)
    clock.now_s += IDLE_S
    load.used()
    assert stays_s(load, clock) == 10 * (IDLE_S - 1) + IDLE_S, "this is the same load"
    clock.now_s += IDLE_S + 1
    load.used()
    load.announced()
    assert stays_s(load, clock) == SHORTEST_STAY_S, "this is another load"


def test_nothing_stays_for_ever(clock: Clock) -> None:
    load = CurrentLoad()
    load.announced()
    clock.now_s += 10 * LONGEST_STAY_S
    assert stays_s(load, clock) == LONGEST_STAY_S


def test_before_a_load_has_said_what_it_needs_all_stays(clock: Clock) -> None:
    load = CurrentLoad()
    assert stays_s(load, clock) == LONGEST_STAY_S
    load.announced()
    assert stays_s(load, clock) == SHORTEST_STAY_S
    clock.now_s += IDLE_S + 1
    load.used()
    assert stays_s(load, clock) == LONGEST_STAY_S, "the next one has not said it"


def test_a_load_says_again_and_again_what_it_needs(clock: Clock) -> None:
    load = CurrentLoad()
    assert load.needs_announcement
    load.announced()
    assert not load.needs_announcement
    clock.now_s += ANNOUNCE_S - 1
    assert not load.needs_announcement
    clock.now_s += 1
    assert load.needs_announcement
    clock.now_s += IDLE_S
    assert not load.needs_announcement, "the load has ended"
    load.used()
    assert load.needs_announcement


def test_after_a_block_was_declined_the_next_ones_are_for_a_moment(clock: Clock) -> None:
    load = CurrentLoad()
    assert not load.is_declined
    load.declined(0)
    assert load.is_declined
    clock.now_s += DECLINE_S
    assert not load.is_declined
    load.declined(0)
    load.gave_up()
    assert not load.is_declined
    assert load.times_given_up == 1
    load.declined(0)
    assert not load.is_declined, "it was declined before there was room"
    load.declined(1)
    assert load.is_declined


def test_room_that_was_made_while_it_was_looked_for_is_seen_each_time(clock: Clock) -> None:
    load = CurrentLoad()
    for times in range(3):
        load.gave_up()
        load.declined(times)
        assert not load.is_declined
        assert load.times_given_up == times + 1
    load.declined(3)
    assert load.is_declined


def test_a_load_that_has_ended_without_a_use_needs_nothing(clock: Clock) -> None:
    load = CurrentLoad()
    assert load.needs_announcement
    clock.now_s += IDLE_S - 1
    assert load.needs_announcement
    clock.now_s += 1
    assert not load.needs_announcement, "it was not used since"
