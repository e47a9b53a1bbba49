"""The start of a daemon, which may take longer than the call that wants it.

kubelet shows no event while a call waits, and retries a failed call after pauses of up to two
minutes. So a call waits a few seconds for a start and then says what the start is waiting for. The
start continues, and a later call finds the daemon ready as soon as S3 answers.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable

from grpc import StatusCode

from csi.errors import RpcError, code_of
from lazyfs.errors import LazyfsError, MountError
from lazyfs.handover.keeper import KeeperError
from lazyfs.process.supervisor import Supervisor
from lazyfs.store.credentials import Credentials

log = logging.getLogger(__name__)

# How long a call of kubelet waits: an event should appear within ten seconds.
PATIENCE_S = 8.0
# Pauses between attempts of a start that may succeed later.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 15.0
# The reason of a failed start is reported for this long; after that a new start is tried.
TOLD_FOR_S = 3.0


class StillStartingError(RpcError):
    """A daemon is not ready yet; its start continues."""

    def __init__(self, message: str) -> None:
        super().__init__(StatusCode.UNAVAILABLE, message)


class Start:
    """Starts a daemon in its own thread, and retries while waiting may help.

    Args:
        source: the daemon's, for messages.
        credentials: the daemon's.
        supervise: makes a supervisor for an attempt.
        on_ready: called from the thread with the supervisor that succeeded.

    Attributes:
        began_s: when, by the monotonic clock.
    """

    def __init__(
        self,
        source: str,
        credentials: Credentials | None,
        supervise: Callable[[], Supervisor],
        on_ready: Callable[[Supervisor], None],
    ) -> None:
        self.credentials = credentials
        self.began_s = time.monotonic()
        self._source = source
        self._supervise = supervise
        self._on_ready = on_ready
        self._changed = threading.Condition()
        self._supervisor: Supervisor | None = None
        self._is_given_up = False
        self._is_ready = False
        # Why the last attempt failed.
        self._why: LazyfsError | KeeperError | None = None
        self._ended_s: float | None = None
        # Log lines have the same context as in the call.
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=[self._run], daemon=True).start()

    @property
    def is_over(self) -> bool:
        """Whether it failed too long ago for the reason to be reported."""
        ended_s = self._ended_s
        return ended_s is not None and time.monotonic() - ended_s > TOLD_FOR_S

    def wait(self, timeout_s: float) -> None:
        """Return when the daemon is ready.

        Raises:
            StillStartingError: it is not ready yet; the message says why, and the start continues.
            LazyfsError, KeeperError: it cannot be started.
        """
        with self._changed:
            told = self._why
            self._changed.wait_for(
                lambda: self._is_done or self._why is not told, max(0.0, timeout_s)
            )
            why, is_final, is_ready = self._why, self._ended_s is not None, self._is_ready
        if is_ready:
            return
        if why is None:
            raise StillStartingError(
                f"{self._source}: is not mounted yet: S3 has not answered, or this node is very "
                "busy; lazyfs keeps trying"
            )
        raise why if is_final else StillStartingError(str(why))

    def give_up(self) -> None:
        """End the start; on return the daemon is ready, or nothing of it is left."""
        with self._changed:
            self._is_given_up = True
            if self._supervisor is not None:
                self._supervisor.give_up()
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_done)

    @property
    def _is_done(self) -> bool:
        return self._is_ready or self._ended_s is not None

    def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._attempt():
            with self._changed:
                self._changed.wait_for(lambda: self._is_given_up, pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _attempt(self) -> bool:
        """Try once; returns whether the start is over, successful or not."""
        try:
            with self._changed:
                if not self._is_given_up:
                    self._supervisor = self._supervise()
            if self._is_given_up or self._supervisor is None:
                raise MountError(f"{self._source}: its start was given up")
            self._supervisor.start()
            self._on_ready(self._supervisor)
        except (LazyfsError, KeeperError) as error:
            return self._has_failed(error)
        except Exception as error:
            log.exception("%s: cannot be started", self._source)
            return self._has_failed(MountError(f"{self._source}: {type(error).__name__}"))
        with self._changed:
            self._is_ready = True
            self._changed.notify_all()
        return True

    def _has_failed(self, why: LazyfsError | KeeperError) -> bool:
        """Record the reason; returns whether it is final."""
        with self._changed:
            self._why = why  # the call that gets it logs it
            if code_of(why) is not StatusCode.UNAVAILABLE or self._is_given_up:
                self._ended_s = time.monotonic()
            self._changed.notify_all()
            return self._ended_s is not None
