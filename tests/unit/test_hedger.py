"""When a range is requested a second time, and what comes of both, on a link in modelled time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, cast

import pytest
import trio
import trio.testing
from inline_threads import InlineThreads

from lazyfs.blocks import BlockId
from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.file_blocks import Place
from lazyfs.blocks.memory import BlockMemory, Held
from lazyfs.errors import AccessDeniedError, SourceError, ThrottledError, UnavailableError
from lazyfs.fetch import hedger
from lazyfs.fetch.block_getter import BlockGetter
from lazyfs.fetch.hedger import HEDGES, SILENT_S
from lazyfs.listed_object import File
from lazyfs.observe.events import Cause, EventKind
from lazyfs.observe.recorder import Recorder
from lazyfs.options.mount_options import MountOptions
from lazyfs.store import retry
from lazyfs.store.cancel import Cancel

SIZE = 4
FILE = File(2, 1, "f", "f", 100 * SIZE, "e", 0)
OTHER = File(3, 1, "g", "g", 100 * SIZE, "e", 0)
# Twice of what is usual is less than the least time before a second request, which is 1 s.
USUAL_S = 0.1
SECOND_S = 1.0
NEVER_S = 1000.0


class Reply(NamedTuple):
    """An answer after a time, or an error, while so many bytes come in a second."""

    after_s: float = USUAL_S
    error: SourceError | None = None
    rate: float = 0.0


class Link:
    """Answers one request after another as it is told, and those after that as is usual.

    Attributes:
        asked: when each request was made.
        cut_off: how many were ended before that.
        closed: when idle connections were closed.
    """

    may_move = True

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.asked: list[float] = []
        self.cut_off = 0
        self.closed: list[float] = []

    @property
    def ranges(self) -> Link:
        return self

    def name(self, key: str) -> str:
        return key

    def close_idle(self, longer_than_s: float) -> None:
        self.closed.append(trio.current_time())

    async def read_by_mover(
        self, pin: File, start: int, length: int, cancel: Cancel,
        has_time: Callable[[], bool], ended: Callable[[], None],
    ) -> Any:  # fmt: skip
        reply = self.replies.pop(0) if self.replies else Reply()
        began_s = trio.current_time()
        self.asked.append(began_s)
        cancel.received_bytes = lambda: int(reply.rate * (trio.current_time() - began_s))  # type: ignore[method-assign]
        try:
            await trio.sleep(reply.after_s)
        except trio.Cancelled:
            self.cut_off += cancel.called or 1
            raise
        finally:
            ended()
        # An error is raised by `read`, as always.
        return [reply.error] if reply.error else memoryview(bytes(length))

    def read(
        self, pin: File, start: int, length: int, cancel: Cancel, asked: list[SourceError]
    ) -> memoryview:
        raise asked[0]


class Mount:
    """What asks over a link, and knows already what is usual."""

    def __init__(self, memory_bytes: int = 1000, **options: Any) -> None:
        self.link, self.recorder = Link(), Recorder()
        self.blocks = BlockMap(SIZE)
        self.memory = BlockMemory(memory_bytes, SIZE, self.blocks, lambda: 1)
        self.made_room = self.held_bytes = 0
        self.getter = BlockGetter(
            cast(Any, self.link), self.memory,
            MountOptions(**{"movers": 1, "block_size": SIZE, **options}), InlineThreads().threads,
            self._room_made, self.recorder,
        )  # fmt: skip

    def _room_made(self) -> None:
        self.made_room += 1

    async def get(
        self, start: int = 0, length: int = SIZE, *, file: File = FILE, patience_s: float = 600.0,
        reader: bool = True, **given: Any,
    ) -> float:  # fmt: skip
        """Get a range; returns how long that took."""
        began_s = trio.current_time()
        self.memory.reserve(length)
        try:
            got = await self.getter.get(
                file, start, length, patience_s=lambda: patience_s, saturated=lambda: False,
                has_time=lambda: not reader, **given,
            )  # fmt: skip
            assert len(got.data) == length
        finally:
            self.memory.release(length)
        return trio.current_time() - began_s

    async def warm(self) -> None:
        for _ in range(8):
            await self.get()
        self.link.asked.clear()

    async def answers(self, *replies: Reply) -> float:
        """How long it takes to get a range to which these are the answers."""
        self.link.replies = [*replies]
        return await self.get()


@pytest.fixture(autouse=True)
def no_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses are the longest that they can be."""
    monkeypatch.setattr(retry.random, "random", lambda: 1.0)
    monkeypatch.setattr(hedger.random, "random", lambda: 1.0)


def play(steps: Callable[[Mount], Awaitable[None]], *, warm: bool = True, **options: Any) -> Mount:
    made: list[Mount] = []

    async def main() -> None:
        made.append(Mount(**options))
        if warm:
            await made[0].warm()
        await steps(made[0])
        assert made[0].memory.used_bytes == made[0].held_bytes, "nothing is left of any request"

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return made[0]


def told(error: SourceError, wait_s: float) -> SourceError:
    error.retry_after_s = wait_s
    return error


def test_the_answer_that_comes_first_counts_and_the_other_request_is_ended() -> None:
    async def steps(mount: Mount) -> None:
        took_s = await mount.answers(Reply(NEVER_S))
        assert took_s == pytest.approx(SECOND_S + USUAL_S)
        assert (len(mount.link.asked), mount.link.cut_off) == (2, 1)
        assert mount.made_room == 1, "that of the second request"
        took_s = await mount.answers(Reply(SECOND_S + 0.05), Reply(NEVER_S))
        assert took_s == pytest.approx(SECOND_S + 0.05)
        assert (len(mount.link.asked), mount.link.cut_off) == (4, 2)
        assert mount.recorder.hedges == 2

    play(steps)


def test_a_second_request_that_fails_is_repeated_less_and_less_often() -> None:
    async def steps(mount: Mount) -> None:
        failure = Reply(USUAL_S, UnavailableError("not now"))
        await mount.answers(Reply(NEVER_S), *[failure] * 4)
        between_s = [b - a for a, b in zip(mount.link.asked, mount.link.asked[1:], strict=False)]
        assert between_s == pytest.approx(
            [SECOND_S, USUAL_S + 1, USUAL_S + 2, USUAL_S + 3, USUAL_S + 3]
        )
        assert mount.recorder.retries == {Cause.ERRORS: 4}
        assert mount.getter.trouble is None, "in the end it came"

    play(steps)


def test_a_second_request_waits_as_long_as_s3_says() -> None:
    async def steps(mount: Mount) -> None:
        busy = Reply(USUAL_S, told(ThrottledError("busy"), 7.0))
        await mount.answers(Reply(NEVER_S), busy)
        _, second, third = mount.link.asked
        assert third - second == pytest.approx(USUAL_S + 7)

    play(steps)


@pytest.mark.parametrize("error", [AccessDeniedError("no"), UnavailableError("not now")])
def test_while_a_second_request_pauses_the_first_may_answer(error: SourceError) -> None:
    async def steps(mount: Mount) -> None:
        took_s = await mount.answers(Reply(SECOND_S + 0.5), Reply(USUAL_S, error))
        assert took_s == pytest.approx(SECOND_S + 0.5)
        assert len(mount.link.asked) == 2
        assert not mount.recorder.retries

    play(steps)


def test_an_error_that_will_not_change_leaves_all_hope_to_the_first_request() -> None:
    async def steps(mount: Mount) -> None:
        took_s = await mount.answers(Reply(100.0), Reply(USUAL_S, AccessDeniedError("no")))
        assert took_s == pytest.approx(100)
        assert len(mount.link.asked) == 2

    play(steps)


def test_when_both_have_failed_the_request_has_failed() -> None:
    async def steps(mount: Mount) -> None:
        mount.link.replies = [
            Reply(SECOND_S + 0.5, UnavailableError("the first")),
            Reply(USUAL_S, UnavailableError("the second")),
        ]
        with pytest.raises(UnavailableError, match="the first"):
            await mount.get(patience_s=0)
        assert len(mount.link.asked) == 2
        assert mount.getter.trouble == "the first"

    play(steps)


def test_a_first_request_that_fails_leaves_the_second() -> None:
    async def steps(mount: Mount) -> None:
        took_s = await mount.answers(Reply(SECOND_S + 0.1, UnavailableError("not now")), Reply(0.5))
        assert took_s == pytest.approx(SECOND_S + 0.5)
        assert len(mount.link.asked) == 2

    play(steps)


def test_few_second_requests_are_under_way_at_once() -> None:
    async def steps(mount: Mount) -> None:
        mount.link.replies = [Reply(3.0)] * (HEDGES + 2) + [Reply(0.7)] * HEDGES
        async with trio.open_nursery() as nursery:
            for _ in range(HEDGES + 2):
                nursery.start_soon(mount.get)
            await trio.sleep(SECOND_S + 0.2)
            assert len(mount.link.asked) == 2 * HEDGES + 2
            await trio.sleep(1)
            assert len(mount.link.asked) == 2 * HEDGES + 4, "when these have come, the others"
        assert mount.recorder.hedges == HEDGES + 2

    play(steps)


# Of the room, that of two blocks is for readers' first requests alone.
@pytest.mark.parametrize(("room", "hedges"), [(4 * SIZE - 1, 0), (4 * SIZE, 1)])
def test_a_second_request_needs_room_of_its_own(room: int, hedges: int) -> None:
    async def steps(mount: Mount) -> None:
        await mount.answers(Reply(3.0))
        assert mount.recorder.hedges == hedges

    play(steps, memory_bytes=room)


@pytest.mark.parametrize("reader", [True, False])
def test_on_a_dead_connection_a_reader_gets_the_room_of_what_was_prefetched(reader: bool) -> None:
    """Otherwise it would wait for as long as a full memory stays full."""

    async def steps(mount: Mount) -> None:
        mount.blocks.add_file(FILE.inode, FILE.size_bytes)
        mount.link.replies = [Reply(10.0)]
        took_s = 0.0

        async def get() -> None:
            nonlocal took_s
            took_s = await mount.get(reader=reader)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(get)
            await trio.sleep(0.1)
            for number in range(1, 10):
                block = BlockId(FILE.inode, number)
                mount.memory.reserve(SIZE)
                mount.memory.hold(block, Held(FILE, memoryview(bytes(SIZE)), unread=1))
                mount.blocks.moved(block, Place.LOCAL)
        mount.held_bytes = (8 if reader else 9) * SIZE
        assert took_s == pytest.approx(SILENT_S + USUAL_S if reader else 10)

    play(steps, memory_bytes=10 * SIZE)


def test_connections_that_are_idle_when_all_is_silent_are_not_used_again() -> None:
    """They have died with the others."""

    async def steps(mount: Mount) -> None:
        await mount.answers(Reply(NEVER_S))
        assert mount.link.closed == [], "others may be well"
        mount.link.replies = [Reply(NEVER_S)] * (2 * HEDGES + 1)
        began_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(HEDGES + 1):
                nursery.start_soon(mount.get)
            await trio.sleep(SILENT_S + SECOND_S)
            assert mount.link.closed
            assert mount.link.closed[0] - began_s == pytest.approx(SILENT_S)
            assert len(mount.link.asked) == 2 + 2 * (HEDGES + 1)
            nursery.cancel_scope.cancel()

    play(steps)


def test_what_is_no_block_says_nothing_about_what_is_usual() -> None:
    async def steps(mount: Mount) -> None:
        mount.link.replies = [Reply(0.9)]
        await mount.get(length=1, is_block=False)
        assert await mount.answers(Reply(NEVER_S)) == pytest.approx(SECOND_S + USUAL_S)
        for _ in range(8):
            await mount.answers(Reply(0.9))
        assert await mount.answers(Reply(NEVER_S)) > 1.5 * SECOND_S

    play(steps)


def test_a_time_that_a_dead_connection_took_says_nothing_about_what_is_usual() -> None:
    async def steps(mount: Mount) -> None:
        for _ in range(5):
            assert await mount.answers(Reply(NEVER_S)) == pytest.approx(SECOND_S + USUAL_S)

    play(steps)


def test_requests_keep_to_the_rate() -> None:
    async def steps(mount: Mount) -> None:
        async with trio.open_nursery() as nursery:
            for start in (0, SIZE, 2 * SIZE):
                nursery.start_soon(mount.get, start)
        first = mount.link.asked[0]
        assert [each - first for each in mount.link.asked] == pytest.approx([0, 2, 4])

    play(steps, warm=False, bandwidth_limit=SIZE // 2)


def test_a_request_says_when_it_pauses_and_when_it_goes_on() -> None:
    async def steps(mount: Mount) -> None:
        heard: list[tuple[bool, int]] = []

        def pauses(does: bool) -> None:
            heard.append((does, len(mount.link.asked)))

        mount.link.replies = [Reply(0.1, UnavailableError("not now"))] * 2
        await mount.get(pauses=pauses)
        assert heard == [(True, 1), (False, 1), (True, 2), (False, 2)]
        heard.clear()
        mount.link.asked.clear()
        mount.link.replies = [Reply(0.1, UnavailableError("not now"))]
        with trio.move_on_after(0.15):
            await mount.get(pauses=pauses)
        assert heard == [(True, 1), (False, 1)], "when it is not wanted any more, too"

    play(steps)


def test_trouble_is_that_of_all_objects_that_cannot_be_read() -> None:
    async def steps(mount: Mount) -> None:
        for file, text in ((FILE, "one"), (OTHER, "two")):
            mount.link.replies = [Reply(0.1, AccessDeniedError(text))]
            with pytest.raises(AccessDeniedError):
                await mount.get(file=file)
        assert mount.getter.trouble == "two (and 1 more objects)"
        await mount.get(file=OTHER)
        assert mount.getter.trouble == "one"
        await mount.get()
        assert mount.getter.trouble is None

    play(steps)


def test_a_block_that_is_asked_for_again_is_named() -> None:
    async def steps(mount: Mount) -> None:
        mount.link.replies = [Reply(0.1, ThrottledError("busy"))]
        limit = mount.getter.limit
        await mount.get(7 * SIZE)
        (retried,) = (
            each for each in mount.recorder.events.newest_first() if each.kind == EventKind.RETRIED
        )
        assert (retried.block, retried.detail) == (7, Cause.THROTTLED)
        assert mount.getter.limit == limit // 2

    play(steps)
