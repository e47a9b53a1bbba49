"""In the place of `Threads`: calls run in the trio thread, so tests decide what happens when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import trio

from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.memory import BlockMemory
from lazyfs.cache.disk_calls import DiskCalls
from lazyfs.threads import Threads


class InlineThreads:
    """Runs calls at once, or only when a test lets them.

    Attributes:
        gate: calls wait for it; set to begin with.
        running: how many calls wait.
        most: how many waited at once, at most.
    """

    def __init__(self) -> None:
        self.gate = trio.Event()
        self.gate.set()
        self.running = self.most = 0

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """In the place of `Threads.run`."""
        await trio.lowlevel.checkpoint()
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.gate.wait()
            return function(*arguments)
        finally:
            self.running -= 1

    def hold(self) -> None:
        """Calls wait from now on."""
        self.gate = trio.Event()

    @property
    def calls(self) -> DiskCalls:
        """Calls of a disk, which are made so."""
        memory = BlockMemory(1 << 30, 1 << 20, BlockMap(1 << 20), lambda: 1)
        return DiskCalls(self.threads, memory, "/cache")

    @property
    def threads(self) -> Threads:
        """This, for whoever wants `Threads`."""
        return cast(Threads, self)
