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


def test_the_limit_grows_while_throughput_does() -> None:
    limits = Concurrency(64)
    settle(limits, per_connection=90 * MIB, link=100_000 * MIB)
    assert limits.limit == 64


def test_the_limit_stays_where_the_link_is_full() -> None:
    limits = Concurrency(64)
    settle(limits, per_connection=90 * MIB, link=250 * MIB)
    assert limits.limit <= 24


def test_throttled_requests_in_flight_together_halve_the_limit_once() -> None:
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


def test_the_limit_never_exceeds_the_maximum() -> None:
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


class Rounds:
    """Answers to requests that always wait, a round at a time."""

    def __init__(self, limits: Concurrency) -> None:
        self._limits = limits
        self._now_s = 0.0
        limits.answered(0.0, 1, saturated=True)

    def play(self, *rates: float) -> list[int]:
        """The limit after each round, in which answers of one byte come at a rate."""
        seen = []
        for rate in rates:
            for _ in range(self._limits.limit):
                self._now_s += 1 / rate
                self._limits.answered(self._now_s, 1, saturated=True)
            seen.append(self._limits.limit)
        return seen


def test_it_doubles_until_that_brings_nothing_and_then_tries_smaller_steps() -> None:
    rounds = Rounds(Concurrency(1000, start=10))
    assert rounds.play(100, 106, 109) == [20, 40, 20], "6 % more are worth it, 3 % are not"
    assert rounds.play(*[109] * 8) == [*[20] * 7, 30], "it waits for eight rounds"
    assert rounds.play(150, 200, 201) == [45, 67, 45]


def test_a_larger_limit_is_proven_by_the_next_round() -> None:
    limits = Concurrency(1000, start=10)
    rounds = Rounds(limits)
    assert (rounds.play(100), limits.proven_limit) == ([20], 10)
    assert (rounds.play(150), limits.proven_limit) == ([40], 20)
    assert (rounds.play(150), limits.proven_limit) == ([20], 20)


def test_it_grows_by_one_at_least() -> None:
    limits = Concurrency(1000, start=1)
    limits.throttled()
    seen = Rounds(limits).play(*range(100, 2000, 100))
    assert {1, 2, 3, 4} < set(seen)


def test_a_round_counts_only_while_requests_wait() -> None:
    limits = Concurrency(1000, start=10)
    for at in range(10):
        limits.answered(float(at), 1, saturated=True)
    limits.answered(10.0, 1, saturated=False)
    for at in range(11, 20):
        limits.answered(float(at), 1, saturated=True)
        assert limits.limit == 10
    limits.answered(20.0, 1, saturated=True)
    assert limits.limit == 20


def test_answers_that_come_at_one_instant_do_not_make_a_rate() -> None:
    limits = Concurrency(1000, start=4)
    for _ in range(100):
        limits.answered(5.0, 1, saturated=True)
    assert limits.limit == 4
    limits.answered(6.0, 1, saturated=True)
    assert limits.limit == 8


def test_after_a_refusal_it_waits_before_it_grows_again() -> None:
    limits = Concurrency(1000, start=16)
    limits.throttled()
    assert (limits.limit, type(limits.limit)) == (8, int)
    assert Rounds(limits).play(*[100] * 9) == [*[8] * 8, 12]


def test_how_long_an_answer_may_take() -> None:
    assert HedgeTimer(least_s=0.0, unknown_s=1.0).delay_s == 2.0
    timer = HedgeTimer(least_s=0.5)
    timer.answered(1.0)
    assert timer.delay_s == 2 * (1.0 + 4 * 0.5)
    timer.answered(2.0)
    assert timer.delay_s == 2 * (1.125 + 4 * 0.625)
    timer.answered(1.125)
    assert timer.delay_s == 2 * (1.125 + 4 * 0.625 * 3 / 4)
