"""When the cache of a fleet is asked, rests, and is tried again."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
import trio
import trio.testing

from lazyfs.fetch import fleet_policy
from lazyfs.fetch.fleet_policy import (
    FIRST_WORD_S,
    MOST_CUT_OFF,
    RECONNECT_S,
    REST_S,
    TRIAL_S,
    Fleet,
    State,
)  # fmt: skip
from lazyfs.store.fleet_cache import FleetCache, FleetCacheError, Trouble

LONGEST_REST_S = 1.2 * REST_S


class Door:
    """The connections to a cache.

    Attributes:
        is_open: whether a connection can be made.
        takes_s: how long that takes.
        tries: when a connection was tried.
    """

    url = "http://cache:8080"

    def __init__(self) -> None:
        self.is_open = True
        self.takes_s = 0.0
        self.tries: list[float] = []

    def connect(self) -> None:
        self.tries.append(trio.current_time())
        if not self.is_open:
            raise FleetCacheError(Trouble.AWAY, "no connection")


def play(steps: Callable[[Door, Fleet], Awaitable[None]], *, is_open: bool = True) -> None:
    """Connect, and do some steps; time passes only while all wait."""
    door = Door()
    door.is_open = is_open

    async def run_sync(connect: Callable[[], None], **_: object) -> None:
        await trio.sleep(door.takes_s)
        connect()

    async def main() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cast(Any, fleet_policy.trio.to_thread), "run_sync", run_sync)
            made = Fleet(cast(FleetCache, door))
            await steps(door, made)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def failure(trouble: Trouble) -> FleetCacheError:
    return FleetCacheError(trouble, f"it is {trouble.value}")


def test_it_is_asked_as_soon_as_there_is_a_connection() -> None:
    async def steps(door: Door, made: Fleet) -> None:
        assert made.state is State.UNKNOWN
        assert await made.may_be_asked()
        assert await made.may_be_asked()
        assert (made.state, made.trouble) == (State.USED, None)

    play(steps)


def test_the_first_requests_wait_only_a_moment_for_a_connection() -> None:
    async def steps(door: Door, made: Fleet) -> None:
        door.takes_s = 10.0
        began_s = trio.current_time()
        assert not await made.may_be_asked()
        assert not await made.may_be_asked()
        assert trio.current_time() - began_s == pytest.approx(FIRST_WORD_S)
        await trio.sleep(door.takes_s)
        assert await made.may_be_asked()

    play(steps)


def test_without_a_connection_it_rests_and_is_used_as_soon_as_there_is_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, fleet_policy.__name__)

    async def steps(door: Door, made: Fleet) -> None:
        assert not await made.may_be_asked()
        assert made.results == {"away": 1}
        assert (made.state, made.trouble) == (State.RESTING, "no connection")
        await trio.sleep(2.5 * RECONNECT_S)
        assert not await made.may_be_asked()
        door.is_open = True
        await trio.sleep(RECONNECT_S)
        assert [round(at - door.tries[0], 3) for at in door.tries] == [
            0, RECONNECT_S, 2 * RECONNECT_S, 3 * RECONNECT_S,
        ]  # fmt: skip
        assert (made.state, made.trouble) == (State.USED, None)
        assert await made.may_be_asked()
        assert await made.may_be_asked()

    play(steps, is_open=False)
    assert caplog.messages == [
        "the fleet cache http://cache:8080: no connection: asking S3 itself, and the cache again "
        "in 30 s",
        "the fleet cache http://cache:8080 is there again",
    ]


@pytest.mark.parametrize("way", ["let_go", "failed", "silent"])
def test_a_trial_without_an_answer_is_followed_by_another(way: str) -> None:
    async def steps(door: Door, made: Fleet) -> None:
        assert await made.may_be_asked()
        made.outdone()
        await trio.sleep(LONGEST_REST_S)
        assert await made.may_be_asked()
        assert not await made.may_be_asked()
        if way == "let_go":
            made.let_go()
        elif way == "failed":
            made.failed(failure(Trouble.FAILED), s3_gave=False)
        else:
            await trio.sleep(TRIAL_S)
        assert await made.may_be_asked()
        assert not await made.may_be_asked()

    play(steps)


def test_it_rests_for_about_half_a_minute() -> None:
    async def steps(door: Door, made: Fleet) -> None:
        assert await made.may_be_asked()
        made.outdone()
        await trio.sleep(REST_S - 0.01)
        assert not await made.may_be_asked()
        await trio.sleep(LONGEST_REST_S - REST_S + 0.01)
        assert await made.may_be_asked()
        assert len(door.tries) == 1, "there was a connection: that is not what is missing"

    play(steps)


@pytest.mark.parametrize("trouble", [Trouble.FAILED, Trouble.REFUSED, Trouble.WRONG])
def test_what_s3_does_not_give_either_is_no_trouble_of_the_cache(trouble: Trouble) -> None:
    async def steps(door: Door, made: Fleet) -> None:
        assert await made.may_be_asked()
        made.failed(failure(trouble), s3_gave=False)
        assert made.state is State.USED
        made.failed(failure(trouble), s3_gave=True)
        assert (made.state, made.trouble) == (State.RESTING, f"it is {trouble.value}")
        assert made.results == {trouble.value: 2}

    play(steps)


def test_answers_that_were_cut_off_in_a_row_end_it() -> None:
    async def steps(door: Door, made: Fleet) -> None:
        assert await made.may_be_asked()
        for _ in range(MOST_CUT_OFF - 1):
            made.failed(failure(Trouble.CUT_OFF), s3_gave=True)
        made.gave()
        for _ in range(MOST_CUT_OFF - 1):
            made.failed(failure(Trouble.CUT_OFF), s3_gave=True)
            made.is_asked_again(failure(Trouble.CUT_OFF))
        assert made.state is State.USED
        made.failed(failure(Trouble.CUT_OFF), s3_gave=True)
        assert made.state is State.RESTING
        assert made.results == {"cut_off": 3 * MOST_CUT_OFF - 2, "served": 1}
        await trio.sleep(LONGEST_REST_S)
        assert await made.may_be_asked()
        made.gave()
        made.failed(failure(Trouble.CUT_OFF), s3_gave=True)
        assert made.state is State.USED, "the count began anew"

    play(steps)


def test_a_cache_that_goes_away_rests_at_once_and_one_task_tries_to_reconnect() -> None:
    async def steps(door: Door, made: Fleet) -> None:
        assert await made.may_be_asked()
        door.is_open = False
        for _ in range(3):
            made.failed(failure(Trouble.AWAY), s3_gave=False)
        assert made.state is State.RESTING
        await trio.sleep(RECONNECT_S + 0.1)
        assert len(door.tries) == 2, "the first one, and one more"
        await trio.sleep(2 * LONGEST_REST_S)
        tries = len(door.tries)
        await trio.sleep(LONGEST_REST_S)
        assert len(door.tries) == tries, "after the rest requests try it"
        assert await made.may_be_asked()
        made.failed(failure(Trouble.AWAY), s3_gave=False)
        await trio.sleep(RECONNECT_S + 0.1)
        assert len(door.tries) == tries + 1, "a new rest"

    play(steps)


def test_an_answer_from_before_the_trouble_does_not_end_a_rest() -> None:
    async def steps(door: Door, made: Fleet) -> None:
        assert await made.may_be_asked()
        made.outdone()
        made.gave()
        assert made.state is State.RESTING

    play(steps)


def test_only_the_first_rest_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, fleet_policy.__name__)

    async def steps(door: Door, made: Fleet) -> None:
        assert await made.may_be_asked()
        for _ in range(3):
            made.outdone()
            made.outdone()
            await trio.sleep(LONGEST_REST_S)
            assert await made.may_be_asked()
            made.gave()

    play(steps)
    levels = [each.levelname for each in caplog.records if "asking S3 itself" in each.message]
    assert levels == ["WARNING", "DEBUG", "DEBUG"]
