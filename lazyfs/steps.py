"""Long work in short steps, so that the event loop answers requests in between.

A generator that yields between its steps can be run at once, or in turn with other tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

import trio

T = TypeVar("T")


def at_once(steps: Generator[None, None, T]) -> T:
    """The result of all steps."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


async def in_turn(
    steps: Generator[None, None, T], between: Callable[[], object] = lambda: None
) -> T:
    """The same, with other tasks between two steps. If it is cancelled, the generator is closed.

    Args:
        between: called after each step but the last.
    """
    try:
        while True:
            try:
                next(steps)
            except StopIteration as end:
                result: T = end.value
                return result
            between()
            await trio.lowlevel.checkpoint()
    finally:
        steps.close()
