"""Writing what is not on the disk yet before a mount ends, asked for at its control socket.

An orderly unmount asks first (`lazyfs/process/before_unmount.py`): once the mount is gone, the
kernel has dropped the pages that are the only copy on this machine.
"""

from __future__ import annotations

from typing import Any

import trio

from lazyfs.cache.late_writer import LateWriter
from lazyfs.control import Route
from lazyfs.faults import contained
from lazyfs.fetch.scheduler import BlockFetcher
from lazyfs.handover.runtime_changes import RuntimeChanges
from lazyfs.observe.recorder import Recorder

# Handles of a reader that has just ended are given back by then.
LAST_CLOSES_S = 0.3
# An answer comes before the patience of a server ends.
LONGEST_S = 5.0


class Saving:
    """Saves when it is asked to, with `PUT /save`; meanwhile nothing is fetched ahead.

    Args:
        salvage: of the mount.
        fetcher: of the mount.
        recorder: knows how many files are open.
        carried: knows whether somebody paused the mount.
        nursery: ends with the mount.
    """

    def __init__(
        self,
        salvage: LateWriter,
        fetcher: BlockFetcher,
        recorder: Recorder,
        carried: RuntimeChanges,
        nursery: trio.Nursery,
    ) -> None:
        self._salvage = salvage
        self._fetcher = fetcher
        self._recorder = recorder
        self._carried = carried
        self._nursery = nursery
        self._scope = trio.CancelScope()
        self._ended: trio.Event | None = None

    def routes(self) -> dict[tuple[str, str], Route]:
        """What it answers at the control socket."""
        return {("PUT", "/save"): self.save}

    async def save(self, body: dict[str, Any]) -> dict[str, Any]:
        """Save, and tell when all is saved, or after `for_s` seconds; it goes on then.

        With `stop` it ends what is being saved instead. With `unless_in_use` it does not begin
        while files are open.

        Returns:
            `left_bytes`: at most, of what is to be saved; `in_use`: it did not begin.
        """
        for_s = min(float(body.get("for_s", 0)), LONGEST_S)
        in_use = False
        if body.get("stop"):
            self._scope.cancel()
            for_s = LONGEST_S
        elif self._ended is None and self._salvage.unsaved_bytes():
            in_use = bool(body.get("unless_in_use")) and await self._is_in_use()
            if not in_use:
                self._begin()
        if self._ended is not None:
            with trio.move_on_after(for_s):
                await self._ended.wait()
        return {"left_bytes": self._salvage.unsaved_bytes(), "in_use": in_use}

    async def _is_in_use(self) -> bool:
        self._salvage.give_way()
        with trio.move_on_after(LAST_CLOSES_S):
            while self._recorder.open_files:
                await trio.sleep(0.01)
        return bool(self._recorder.open_files)

    def _begin(self) -> None:
        if self._ended is None:  # nobody else has meanwhile
            self._scope, self._ended = trio.CancelScope(), trio.Event()
            self._nursery.start_soon(contained, "saving", self._run, self._scope, self._ended)

    async def _run(self, scope: trio.CancelScope, ended: trio.Event) -> None:
        try:
            self._fetcher.pause(True)
            with scope:
                await self._salvage.save()
        finally:
            self._fetcher.pause(self._carried.paused)
            self._ended = None
            ended.set()
