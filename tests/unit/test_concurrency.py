"""The limits that follow from what they are told."""

from __future__ import annotations

import heapq

from lazyfs.fetch.concurrency import Concurrency, HedgeTimer, Pacer

MIB = 1 << 20
BLOCK = 8 * MIB


def settle(limits: Concurrency, per_connection: float, link: float, seconds: float = 60) -> None:
    """Drive it by a link that gives each request the lesser of its own rate and its share."""
    now, running = 0.0, [0.0]
    heapq.heapify(running)
    for _ in range(limits.limit - 1):
        heapq.heappush(running, 0.0)
    while now < seconds:
        now = heapq.heappop(running)
        limits.answered(now, BLOCK, saturated=True)
        while len(running) < limits.limit:
            rate = min(per_connection, link / limits.limit)
            heapq.heappush(running, now + 0.03 + BLOCK / rate)


def test_it_grows_while_that_pays() -> None:
    limits = Concurrency(64)
    settle(limits, per_connection=90 * MIB, link=100_000 * MIB)
    assert limits.limit == 64


def test_it_stays_where_the_link_is_full() -> None:
    limits = Concurrency(64)
    settle(limits, per_connection=90 * MIB, link=250 * MIB)
    assert limits.limit <= 24


def test_it_halves_once_for_all_that_was_in_flight_together() -> None:
    limits = Concurrency(64)
    for _ in range(16):
        limits.throttled()
    assert limits.limit == 8
    for _ in range(8):
        limits.throttled()
    assert limits.limit == 4
    for _ in range(100):
        limits.throttled()
    assert limits.limit == 1


def test_answers_end_a_burst_of_refusals_too() -> None:
    limits = Concurrency(64)
    limits.throttled()
    for now in range(15):
        limits.answered(float(now), BLOCK, saturated=False)
    assert limits.limit == 8
    limits.throttled()
    assert limits.limit == 4


def test_it_never_exceeds_the_most() -> None:
    limits = Concurrency(4)
    settle(limits, per_connection=1 * MIB, link=1000 * MIB)
    assert limits.limit == 4


def test_idle_times_are_not_measured() -> None:
    limits = Concurrency(64)
    for now in range(1000):
        limits.answered(float(now), BLOCK, saturated=False)
    assert limits.limit == 16


def test_hedging_waits_for_what_is_usual() -> None:
    timer = HedgeTimer()
    for _ in range(50):
        timer.answered(0.1)
    assert timer.delay_s == 1.0
    for _ in range(50):
        timer.answered(4.0)
    assert 8.0 <= timer.delay_s < 12


def test_pacing() -> None:
    pacer = Pacer(1000)
    assert pacer.delay_s(0.0, 500) == 0.0
    assert pacer.delay_s(0.0, 500) == 0.5
    assert pacer.delay_s(10.0, 500) == 0.0
    assert Pacer("off").delay_s(0.0, 10**9) == 0.0
