"""Threads for blocking calls, and their priorities."""

from __future__ import annotations

import gc
import os
import threading
import weakref

import pytest
import trio

from lazyfs.threads import NICER, Threads


class Given:
    """An argument."""


def nice() -> int:
    """Of the calling thread."""
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_writes_have_the_priority_of_the_trio_thread_and_all_else_a_lower_one() -> None:
    async def main() -> None:
        threads = Threads(1)
        assert await threads.run(nice) == nice() + NICER
        assert await threads.run_first(nice) == nice()

    trio.run(main)


def test_a_call_returns_or_raises_what_the_function_does() -> None:
    async def main() -> None:
        threads = Threads(1)
        for run in (threads.run, threads.run_first):
            assert await run(divmod, 7, 2) == (3, 1)
            with pytest.raises(ZeroDivisionError):
                await run(divmod, 7, 0)

    trio.run(main)


def test_a_thread_is_used_again_and_calls_at_the_same_time_have_one_each() -> None:
    def meet(barrier: threading.Barrier) -> int:
        barrier.wait(20)
        return threading.get_ident()

    async def main() -> None:
        threads, seen = Threads(1), []

        async def call(barrier: threading.Barrier) -> None:
            seen.append(await threads.run_first(meet, barrier))

        for together in (1, 1, 3, 2, 3):
            barrier = threading.Barrier(together)
            async with trio.open_nursery() as nursery:
                for _ in range(together):
                    nursery.start_soon(call, barrier)
        assert len(seen) == 10
        assert len(set(seen)) == 3

    trio.run(main)


def test_a_call_that_is_left_keeps_its_thread_until_it_ends() -> None:
    async def main() -> None:
        threads, may_end = Threads(1), threading.Event()
        with trio.move_on_after(0.05):
            await threads.run_first(may_end.wait, 20)
        assert not may_end.is_set()
        with trio.fail_after(10):
            assert await threads.run_first(divmod, 7, 2) == (3, 1), "in another thread"
        may_end.set()

    trio.run(main)


def test_what_a_call_was_given_is_freed_when_it_is_over() -> None:
    async def main() -> None:
        threads, given, failing = Threads(1), Given(), Given()
        refs = [weakref.ref(given), weakref.ref(failing)]
        await threads.run_first(id, given)
        with pytest.raises(TypeError):
            await threads.run_first(len, failing)  # type: ignore[arg-type]
        del given, failing
        with trio.fail_after(10):
            while any(ref() is not None for ref in refs):
                await trio.sleep(0.01)

    gc.disable()
    try:
        trio.run(main)
    finally:
        gc.enable()


def test_a_call_may_outlast_the_loop() -> None:
    may_end, ended = threading.Event(), threading.Event()

    def wait() -> None:
        may_end.wait(20)
        ended.set()

    async def main() -> None:
        with trio.move_on_after(0.05):
            await Threads(1).run_first(wait)

    trio.run(main)
    may_end.set()
    assert ended.wait(20)
