"""Retries requests to S3 while waiting can help."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from lazyfs.errors import SourceError

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_PAUSE_S = 0.1
# Shorter than readers may wait after the trouble is over (`docs/RELIABILITY.md`).
LONGEST_PAUSE_S = 3.0
# The longest pause that S3 may ask for.
LONGEST_TOLD_S = 30.0
# In a pause, so often it is asked whether the time is over by now.
LOOK_S = 1.0
LOG_AFTER_S = 3.0


async def patiently(
    ask: Callable[[], Awaitable[T]],
    *,
    what: str,
    timeout_s: Callable[[], float],
    on_retry: Callable[[SourceError], None] = lambda error: None,
) -> T:
    """The result of `ask`, which is called again after transient errors.

    Pauses double from 0.1 s to 3 s with full jitter, so that many mounts that failed together do
    not come back together
    (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/). If S3 says how
    long to wait (`Retry-After`), they begin after that time, at most 30 s later.

    Args:
        what: the name of the object, for the log.
        timeout_s: returns how long to retry after the first attempt; called every second of a
            pause, because it changes once a reader waits for a prefetch.
        on_retry: called with each error that is followed by another attempt.

    Raises:
        SourceError: the last error, if it is final or the time is over.
    """
    began = trio.current_time()
    pause_s = FIRST_PAUSE_S
    logged = False
    while True:
        try:
            answer = await ask()
        except SourceError as error:
            waited = trio.current_time() - began
            if not error.transient or waited >= timeout_s():
                raise
            on_retry(error)
            if waited >= LOG_AFTER_S and not logged:
                logged = True
                log.warning("still waiting for %s after %.0f s: %s", what, waited, error)
            told_s = min(error.retry_after_s, LONGEST_TOLD_S)
            until_s = trio.current_time() + told_s + pause_s * random.random()  # noqa: S311
            while (left_s := min(until_s, began + timeout_s()) - trio.current_time()) > 0:
                await trio.sleep(min(left_s, LOOK_S))
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
        else:
            if logged:
                log.info("%s answered after %.1f s", what, trio.current_time() - began)
            return answer
