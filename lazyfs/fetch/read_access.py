"""Whether S3 allows the mount to read an object.

Blocks on the disk may have been fetched with other credentials. A mount that may list a bucket but
not read it must not get them. So before a block is served from the disk, S3 is asked for one byte
of the object, unless S3 gave this mount bytes of it a short while ago.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

import trio

from lazyfs.errors import AccessDeniedError, SourceError, UnavailableError
from lazyfs.listed_object import File

log = logging.getLogger(__name__)

# Objects that are asked about concurrently, before a reader needs them. An answer takes 30 to 100
# ms and has no content; the shards of a load are needed some milliseconds after each other.
AHEAD = 64
# How long a reader waits for the answer about an object that this mount could read before, and how
# long it is not asked again if there is none.
KNOWN_PATIENCE_S = 4.0
UNANSWERED_S = 30.0


@dataclass(slots=True)
class _Question:
    """A request that S3 has not answered yet."""

    answered: trio.Event = field(default_factory=trio.Event)
    error: SourceError | None = None


class ReadAccess:
    """What S3 allowed one mount to read.

    Args:
        lasts_s: how long an answer is valid; 0: S3 is never asked.
    """

    def __init__(self, lasts_s: float) -> None:
        self._lasts_s = lasts_s
        self._shown_at_s: dict[int, float] = {}
        # Until when objects that could be read before are not asked about again.
        self._rests_until_s: dict[int, float] = {}
        self._questions: dict[int, _Question] = {}

    def shown(self, file: File) -> None:
        """S3 gave bytes of an object to this mount."""
        self._shown_at_s[file.inode] = trio.current_time()

    async def check(self, file: File, ask: Callable[[], Awaitable[object]]) -> None:
        """Return when S3 allows the mount to read an object.

        If S3 does not answer within `KNOWN_PATIENCE_S`, a mount that could read the object before
        still can.

        Args:
            ask: gets a byte of the object from S3, with retries.

        Raises:
            SourceError: S3 refuses it to this mount.
        """
        while not self.is_fresh(file):
            question = self._questions.get(file.inode)
            if question is None:
                await self._ask(file, ask)
                return
            await question.answered.wait()
            if question.error is None:
                continue  # it was shown, or the one who asked went away
            if file.inode in self._shown_at_s:
                return
            if not question.error.transient:
                raise question.error

    async def check_ahead(
        self, files: Iterable[File], ask: Callable[[File], Awaitable[object]], at_once: int
    ) -> None:
        """Ask about objects in advance, so that readers do not wait for the answer.

        Args:
            at_once: how many requests may be in flight.
        """
        waiting = iter(files)

        async def work() -> None:
            for file in waiting:
                try:
                    await self.check(file, lambda file=file: ask(file))  # type: ignore[misc]
                except SourceError as error:
                    log.info("%s is not served from the disk: %s", file.key, error)

        async with trio.open_nursery() as nursery:
            for _ in range(min(AHEAD, at_once)):
                nursery.start_soon(work)

    def is_fresh(self, file: File) -> bool:
        """Whether the mount may read an object, without asking S3."""
        if not self._lasts_s:
            return True
        shown_at_s, now_s = self._shown_at_s.get(file.inode), trio.current_time()
        if shown_at_s is None:
            return False
        return now_s - shown_at_s < self._lasts_s or now_s < self._rests_until_s.get(file.inode, 0)

    async def _ask(self, file: File, ask: Callable[[], Awaitable[object]]) -> None:
        question = self._questions[file.inode] = _Question()
        known = file.inode in self._shown_at_s
        try:
            with trio.move_on_after(KNOWN_PATIENCE_S if known else math.inf) as patience:
                await ask()
                self.shown(file)
            if patience.cancelled_caught:
                raise UnavailableError(f"S3 did not answer within {KNOWN_PATIENCE_S:g} s")
        except SourceError as error:
            question.error = error
            if isinstance(error, AccessDeniedError):
                self._shown_at_s.pop(file.inode, None)
            if file.inode not in self._shown_at_s:
                raise
            self._rests_until_s[file.inode] = trio.current_time() + UNANSWERED_S
            log.info("%s is still served from the disk: %s", file.key, error)
        finally:
            del self._questions[file.inode]
            question.answered.set()
