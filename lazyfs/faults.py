"""What happens after an unexpected exception.

Expected failures are the errors of `lazyfs/errors.py`. Everything else is a fault: a bug, or input
that got past the checks. A fault costs one answer or one attempt, never the process:

    a request of the kernel           EIO for that request (`answered`)
    a background task of a worker     it runs again after a pause (`keep_running`)
    a job of a background task        it is given up (`contained`)
    a thread that looks after others  it runs again after a pause (`start_watching`)

Each fault is logged with its traceback the first time. Repeats are counted, and summed up in one
line a minute. Only the standard library is imported here, because supervisors import it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

# Between two lines about the same fault.
REPEAT_S = 60.0
# Different faults that are remembered, so that memory stays bounded.
MOST_FAULTS = 256
# Before a task or thread that failed runs again.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0


@dataclass(slots=True)
class _Seen:
    logged_s: float
    repeats: int = 0


class FaultLog:
    """Logs faults, each with one traceback. Safe to use from several threads.

    Args:
        clock: seconds, monotonic.

    Attributes:
        count: how many faults were reported.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.count = 0
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: dict[tuple[object, ...], _Seen] = {}

    def report(self, what: str, error: BaseException) -> None:
        """Note that something failed.

        Args:
            what: names what failed, in few words and without values that differ each time.
        """
        kind = (what, *_place(error))
        now_s = self._clock()
        with self._lock:
            self.count += 1
            seen = self._seen.get(kind)
            if seen is None:
                if len(self._seen) >= MOST_FAULTS:
                    self._seen.clear()
                self._seen[kind] = _Seen(now_s)
                repeats = 0
            else:
                seen.repeats += 1
                if now_s - seen.logged_s < REPEAT_S:
                    return
                repeats, seen.repeats, seen.logged_s = seen.repeats, 0, now_s
        if isinstance(the_error(error), MemoryError):
            log.error(
                "%s failed: this process has all the memory that it may have; raise --memory-"
                "limit, or mount less (%d times before)", what, repeats,
            )  # fmt: skip
        elif repeats:
            log.error("%s failed %d more times: %s", what, repeats, _described(error))
        else:
            log.error("%s failed; this is a bug of lazyfs", what, exc_info=error)


# Of this process.
FAULTS = FaultLog()


def report_fault(what: str, error: BaseException) -> None:
    """Note a fault in the log of this process; see `FaultLog.report`."""
    FAULTS.report(what, error)


async def contained(what: str, task: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
    """Run a task of a nursery, and report its fault instead of ending the nursery."""
    try:
        await task(*arguments)
    except Exception as error:
        report_fault(what, error)


async def keep_running(what: str, task: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
    """Run a task of a nursery until it returns; after a fault it runs again, after a pause."""
    import trio  # not for supervisors

    pause_s = 0.0
    while True:
        began_s = trio.current_time()
        try:
            await task(*arguments)
            return
        except Exception as error:
            report_fault(what, error)
            pause_s = _next_pause_s(pause_s, trio.current_time() - began_s)
        await trio.sleep(pause_s)


def start_watching(what: str, watch: Callable[[], None]) -> threading.Thread:
    """Start a daemon thread that looks after something; it ends when `watch` returns.

    Such a thread must not end silently, so after a fault it runs again, after a pause. `watch` must
    be able to start over at any moment.
    """
    thread = threading.Thread(target=_watch_on, args=[what, watch], name=what, daemon=True)
    thread.start()
    return thread


def _watch_on(what: str, watch: Callable[[], None]) -> None:
    pause_s = 0.0
    while True:
        began_s = time.monotonic()
        try:
            watch()
            return
        except Exception as error:
            report_fault(what, error)
            pause_s = _next_pause_s(pause_s, time.monotonic() - began_s)
        time.sleep(pause_s)


def _next_pause_s(before_s: float, ran_s: float) -> float:
    """The pause after a failure: it grows while one failure quickly follows another."""
    return (
        FIRST_PAUSE_S
        if ran_s > LONGEST_PAUSE_S
        else min(max(FIRST_PAUSE_S, 2 * before_s), LONGEST_PAUSE_S)
    )


def the_error(error: BaseException) -> BaseException:
    """The error itself where groups of tasks have wrapped it; the first one of several."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _place(error: BaseException) -> tuple[object, ...]:
    """The kind of error, and the line that raised it."""
    error = the_error(error)
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return type(error), at and (at.tb_frame.f_code.co_filename, at.tb_lineno)


def _described(error: BaseException) -> str:
    error = the_error(error)
    return f"{type(error).__name__}: {error}"
