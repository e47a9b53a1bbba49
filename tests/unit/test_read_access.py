"""Whether a mount may have what is on the disk: when S3 is asked, and what its answers mean."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import trio
import trio.testing

from lazyfs.errors import (
    AccessDeniedError,
    CredentialsExpiredError,
    ObjectChangedError,
    SourceError,
    UnavailableError,
)
from lazyfs.fetch.read_access import AHEAD, KNOWN_PATIENCE_S, UNANSWERED_S, ReadAccess
from lazyfs.listed_object import File

FILE = File(7, 1, "a", "m/a", 10, "etag", 0)
LASTS_S = 60.0


class Asked:
    """Answers of S3: an error, or None for a byte; the last one is repeated."""

    def __init__(self, *answers: SourceError | None, takes_s: float = 0.0) -> None:
        self._answers = list(answers)
        self._takes_s = takes_s
        self.times = 0

    async def __call__(self, _: File | None = None) -> None:
        self.times += 1
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        await trio.sleep(self._takes_s)
        if answer is not None:
            raise answer


def run(test: Callable[[ReadAccess], object], lasts_s: float = LASTS_S) -> None:
    async def main() -> None:
        await test(ReadAccess(lasts_s))  # type: ignore[misc]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_access_is_checked_once_in_a_while() -> None:
    async def test(access: ReadAccess) -> None:
        ask = Asked(None)
        for _ in range(3):
            await access.check(FILE, ask)
        assert ask.times == 1
        await trio.sleep(LASTS_S)
        await access.check(FILE, ask)
        assert ask.times == 2

    run(test)


def test_objects_that_s3_delivered_are_not_checked() -> None:
    async def test(access: ReadAccess) -> None:
        access.shown(FILE)
        await access.check(FILE, Asked(AccessDeniedError("no")))

    run(test)


def test_concurrent_checks_share_one_request() -> None:
    async def test(access: ReadAccess) -> None:
        ask = Asked(AccessDeniedError("no"), takes_s=1)
        denied = 0

        async def reader() -> None:
            nonlocal denied
            try:
                await access.check(FILE, ask)
            except AccessDeniedError:
                denied += 1

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(reader)
        assert (ask.times, denied) == (1, 5)

    run(test)


@pytest.mark.parametrize("trouble", [UnavailableError("away"), CredentialsExpiredError("old")])
def test_access_stays_while_s3_does_not_answer(trouble: SourceError) -> None:
    async def test(access: ReadAccess) -> None:
        with pytest.raises(type(trouble)):
            await access.check(FILE, Asked(trouble))
        await access.check(FILE, Asked(None))
        await trio.sleep(LASTS_S)
        await access.check(FILE, Asked(trouble))
        await access.check(FILE, Asked(AccessDeniedError("not asked again at once")))
        await trio.sleep(UNANSWERED_S)
        with pytest.raises(AccessDeniedError):
            await access.check(FILE, Asked(AccessDeniedError("no")))
        with pytest.raises(type(trouble)):
            await access.check(FILE, Asked(trouble))

    run(test)


def test_many_objects_are_checked_in_advance() -> None:
    async def test(access: ReadAccess) -> None:
        files = [File(inode, 1, "", f"{inode}", 1, "", 0) for inode in range(3 * AHEAD)]
        ask = Asked(AccessDeniedError("no"), None, takes_s=1)
        began_s = trio.current_time()
        await access.check_ahead(files, ask, at_once=10**6)
        assert (ask.times, trio.current_time() - began_s) == (3 * AHEAD, 3)
        refused = Asked(AccessDeniedError("no"))
        with pytest.raises(AccessDeniedError):
            await access.check(files[0], refused)
        await access.check(files[1], refused)

    run(test)


def test_no_more_are_checked_at_once_than_requests_are_allowed() -> None:
    async def test(access: ReadAccess) -> None:
        files = [File(inode, 1, "", f"{inode}", 1, "", 0) for inode in range(9)]
        began_s = trio.current_time()
        await access.check_ahead(files, Asked(None, takes_s=1), at_once=3)
        assert trio.current_time() - began_s == 3

    run(test)


def test_the_access_check_can_be_turned_off() -> None:
    async def test(access: ReadAccess) -> None:
        await access.check(FILE, Asked(AccessDeniedError("no")))

    run(test, lasts_s=0)


@pytest.mark.parametrize("was_shown", [False, True])
def test_without_an_answer_readers_are_served_only_if_access_was_shown_before(
    was_shown: bool,
) -> None:
    async def test(access: ReadAccess) -> None:
        if was_shown:
            access.shown(FILE)
            await trio.sleep(LASTS_S)
        ask = Asked(UnavailableError("away"), takes_s=1)
        served = 0

        async def reader() -> None:
            nonlocal served
            with contextlib.suppress(UnavailableError):
                await access.check(FILE, ask)
                served += 1

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(reader)
        assert (ask.times, served) == ((1, 3) if was_shown else (3, 0))

    run(test)


def test_concurrent_checks_share_an_answer_that_allows_it() -> None:
    async def test(access: ReadAccess) -> None:
        ask = Asked(None, takes_s=1)
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(access.check, FILE, ask)
        assert ask.times == 1

    run(test)


def test_who_could_read_before_waits_only_a_moment_for_an_s3_that_is_silent() -> None:
    """Without a limit of its own, each question would last for `--io-timeout`."""

    async def test(access: ReadAccess) -> None:
        access.shown(FILE)
        await trio.sleep(LASTS_S)
        began_s = trio.current_time()
        ask = Asked(UnavailableError("away"), takes_s=600)
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(access.check, FILE, ask)
        for _ in range(3):
            await access.check(FILE, ask)
        assert (ask.times, trio.current_time() - began_s) == (1, KNOWN_PATIENCE_S)
        await trio.sleep(UNANSWERED_S)
        with pytest.raises(AccessDeniedError):
            await access.check(FILE, Asked(AccessDeniedError("no")))

    run(test)


def test_a_replaced_object_is_the_same_to_all_who_ask() -> None:
    """Who could read it before still can, whether he asked or waited for the answer."""

    async def test(access: ReadAccess) -> None:
        access.shown(FILE)
        await trio.sleep(LASTS_S)
        ask = Asked(ObjectChangedError("is another one"), takes_s=1)
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(access.check, FILE, ask)
        assert ask.times == 1

    run(test)
