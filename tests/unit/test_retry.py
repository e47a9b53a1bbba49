"""How long a request waits before it is made again."""

from __future__ import annotations

import itertools
import logging

import pytest
import trio
import trio.testing

from lazyfs.errors import ObjectGoneError, SourceError, ThrottledError
from lazyfs.store import retry
from lazyfs.store.retry import patiently


def times_asked(
    told_s: list[float], timeout_s: float, timeout_later_s: float | None = None
) -> list[float]:
    """When a service is asked that says so often how long to wait, and then answers.

    Args:
        timeout_later_s: the timeout after the first second, when a reader has come.
    """
    asked: list[float] = []
    left = list(told_s)

    async def ask() -> None:
        asked.append(trio.current_time())
        if left:
            error = ThrottledError("busy")
            error.retry_after_s = left.pop(0)
            raise error

    async def main() -> None:
        await trio.sleep(1000)
        began_s = trio.current_time()

        def patience_s() -> float:
            if timeout_later_s is None or trio.current_time() <= began_s + 1:
                return timeout_s
            return timeout_later_s

        await patiently(ask, what="x", timeout_s=patience_s)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return [each - asked[0] for each in asked]


@pytest.fixture(autouse=True)
def no_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry.random, "random", lambda: 1.0)


def test_pauses_double() -> None:
    assert times_asked([0, 0, 0], 60) == pytest.approx([0, 0.1, 0.3, 0.7])


def test_retry_after_is_obeyed() -> None:
    assert times_asked([7, 0], 60) == pytest.approx([0, 7.1, 7.3])


def test_long_retry_after_is_bounded() -> None:
    assert times_asked([86400], 60) == pytest.approx([0, retry.LONGEST_TOLD_S + 0.1])


def test_pauses_have_a_longest() -> None:
    asked = times_asked([0.0] * 8, 60)
    pauses_s = [later - former for former, later in itertools.pairwise(asked)]
    assert pauses_s[4:] == pytest.approx([1.6, *[retry.LONGEST_PAUSE_S] * 3])


def test_each_error_that_is_followed_by_another_attempt_is_told_of() -> None:
    answers: list[SourceError] = [ThrottledError("one"), ThrottledError("two")]
    told: list[SourceError] = []

    async def ask() -> str:
        if len(told) < len(answers):
            raise answers[len(told)]
        return "the answer"

    async def main() -> None:
        found = await patiently(ask, what="x", timeout_s=lambda: 60, on_retry=told.append)
        assert found == "the answer"

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert told == answers


@pytest.mark.parametrize(
    ("error", "timeout_s"), [(ObjectGoneError("gone"), 60.0), (ThrottledError("busy"), 0.0)]
)
def test_where_waiting_does_not_help_nothing_is_asked_again(
    error: SourceError, timeout_s: float
) -> None:
    asked: list[int] = []
    told: list[SourceError] = []

    async def ask() -> None:
        asked.append(1)
        raise error

    async def main() -> None:
        with pytest.raises(type(error)):
            await patiently(ask, what="x", timeout_s=lambda: timeout_s, on_retry=told.append)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert (asked, told) == ([1], [])


def test_retries_end_at_the_timeout() -> None:
    assert times_asked([20], 5) == pytest.approx([0, 5])
    with pytest.raises(SourceError):
        times_asked([20, 20], 5)


def test_a_reader_that_comes_in_a_pause_waits_no_longer_than_it_may() -> None:
    assert times_asked([30], 20, timeout_later_s=5) == pytest.approx([0, 5])
    assert times_asked([30], 20, timeout_later_s=60) == pytest.approx([0, 30.1])


def test_mounts_that_failed_together_do_not_come_back_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retry.random, "random", lambda: 0.25)
    assert times_asked([0.0, 0.0, 0.0], 60.0) == pytest.approx([0, 0.025, 0.075, 0.175])


@pytest.mark.parametrize(("told_s", "lines"), [([1.0, 1.0], 0), ([4.0, 1.0, 1.0], 2)])
def test_a_long_wait_is_told_once_and_its_end_too(
    told_s: list[float], lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    times_asked(told_s, 60.0)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == lines
    if told:
        assert told[0].startswith("still waiting for x after 4 s: busy")
        assert told[1].startswith("x answered after 6.")
