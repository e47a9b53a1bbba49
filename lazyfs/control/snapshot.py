"""The snapshot that a mount shows: its time, and whether S3 still lists the same objects.

A mount is a snapshot, and pods of a node share one. So before a new pod gets it, the CSI driver
asks here, with `PUT /snapshot`, whether a new mount would show something else. Later workers
inherit the result.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, fields
from typing import Any

import trio

from lazyfs.control import Route
from lazyfs.errors import SourceError
from lazyfs.handover.runtime_changes import RuntimeChanges
from lazyfs.namespace.catalog import Catalog
from lazyfs.namespace.relisting import lists_the_same

log = logging.getLogger(__name__)

# After a failure S3 is not asked again for this long, so that pods that start together wait once.
REST_S = 5.0
# While there is a doubt, S3 is asked again after each of these pauses.
PAUSE_S = 30.0
LONGEST_LOOK_S = 60.0


@dataclass(frozen=True, slots=True)
class Compared:
    """What the last comparisons showed.

    Attributes:
        at_s: when S3 answered last, in seconds since the epoch; None: it was not asked yet.
        same: whether it listed what the mount shows.
        doubt: why a pod got this snapshot although S3 may list something else; None if no pod did,
            or if S3 has listed the same since.
        doubt_at_s: the time of the doubt.
    """

    at_s: float | None = None
    same: bool = True
    doubt: str | None = None
    doubt_at_s: float | None = None


class Snapshot:
    """Compares one mount with S3.

    Args:
        catalog: the mount's.
        carried: what later workers know.
        listed_ns: when the mount was listed, in nanoseconds since the epoch.
        began_s: when this worker began, by the monotonic clock, if it has listed the source; None
            if it resumed a mount.
    """

    def __init__(
        self, catalog: Catalog, carried: RuntimeChanges, listed_ns: int, began_s: float | None
    ) -> None:
        self._catalog = catalog
        self._carried = carried
        self._listed_ns = listed_ns
        known = {each.name for each in fields(Compared)}
        self._compared = Compared(**{k: v for k, v in carried.compared.items() if k in known})
        self._looking = trio.Lock()
        # When the listings began that S3 answered and that failed last, by the monotonic clock.
        self._known_s = float("-inf") if began_s is None else began_s
        self._failed_s = float("-inf")
        self._failure = ""

    def routes(self) -> dict[tuple[str, str], Route]:
        """The requests that it answers on the control socket."""
        return {("PUT", "/snapshot"): self.compare, ("PUT", "/doubt"): self.note_doubt}

    def describe(self) -> dict[str, Any]:
        """For the status: when it was listed, and `Compared`."""
        return {"listed_at_s": self._listed_ns / 10**9, **asdict(self._compared)}

    async def compare(self, body: dict[str, Any]) -> dict[str, Any]:
        """Whether S3 lists what the mount shows: `same`, or None and `why` if that is not known.

        Args:
            body: `max_age_s`: how old an answer of S3 may be; `timeout_s`: how long to wait.

        Raises:
            ValueError: the body is invalid.
        """
        max_age_s, timeout_s = body.get("max_age_s"), body.get("timeout_s")
        if not isinstance(max_age_s, int | float) or not isinstance(timeout_s, int | float):
            raise ValueError("max_age_s, timeout_s")
        since_s = time.monotonic() - max_age_s
        with trio.move_on_after(timeout_s) as scope:
            async with self._looking:
                rested = time.monotonic() - self._failed_s >= REST_S
                if self._known_s < since_s and rested:
                    await self._look()
        if self._known_s >= since_s:
            return {"same": self._compared.same, "why": ""}
        if scope.cancelled_caught:
            self._has_failed(f"S3 has not answered within {timeout_s:g} s")
        return {"same": None, "why": self._failure}

    def note_doubt(self, body: dict[str, Any]) -> None:
        """Record that a pod gets this snapshot although S3 may list something else, and `why`.

        Raises:
            ValueError: the body is invalid.
        """
        why = body.get("why")
        if not isinstance(why, str):
            raise ValueError("why")
        log.warning("a pod gets this snapshot, although S3 may list something else: %s", why)
        self._save(self._compared.at_s, self._compared.same, why, time.time())

    async def settle(self) -> None:
        """Settle doubts, as long as the mount exists."""
        while True:
            await trio.sleep(PAUSE_S)
            if self._compared.doubt is not None:
                with trio.move_on_after(LONGEST_LOOK_S):
                    async with self._looking:
                        await self._look()

    async def _look(self) -> None:
        began_s = time.monotonic()
        try:
            same = await lists_the_same(self._catalog)
        except SourceError as error:
            self._has_failed(str(error))
            return
        self._known_s = began_s
        before = self._compared
        if before.same and not same:
            log.info("S3 lists other objects than this snapshot")
        doubt = (None, None) if same else (before.doubt, before.doubt_at_s)
        self._save(time.time(), same, *doubt)

    def _has_failed(self, why: str) -> None:
        self._failed_s, self._failure = time.monotonic(), why

    def _save(
        self, at_s: float | None, same: bool, doubt: str | None, doubt_at_s: float | None
    ) -> None:
        self._compared = Compared(at_s, same, doubt, doubt_at_s)
        self._carried.compared = asdict(self._compared)
        self._carried.save()
