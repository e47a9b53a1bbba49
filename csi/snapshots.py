"""Which snapshot of a source a new pod gets.

A mount is a snapshot, and the pods of a node that use the same source share it. So while one of
them lived, each later one would see what S3 listed when the first one started. Therefore S3 is
asked for each new pod whether it still lists the same. If it does not, the pod gets a new daemon,
which later pods share. Older daemons end with their pods. Content that snapshots have in common is
in the node's cache once.

None of this fails a pod, or delays it for long. If S3 gives no answer, or the new snapshot cannot
be mounted, the pod gets the newest existing snapshot, and the volume's condition says why.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from csi.daemon import Daemon
from csi.errors import without_ids
from csi.start import StillStartingError
from lazyfs.control.client import ControlClient, ControlError
from lazyfs.process.mount_records import control_socket
from lazyfs.process.supervisor import MOST_ANSWERED_BYTES

log = logging.getLogger(__name__)

# How long S3 may take for a listing: a page takes a tenth of a second.
LOOK_S = 4.0
# A call that may not wait accepts an answer of this age; otherwise each call would ask again.
OLD_S = 2 * LOOK_S
# How long a worker has to answer a message that it may also read later.
SOON_S = 1.0
# Snapshots of one source with the same options and credentials: each has a daemon of its own, with
# memory and page cache.
MOST_SNAPSHOTS = 4
# A pod whose new snapshot is not mounted by then gets an older one. A busy node takes seconds.
FALL_BACK_AFTER_S = 20.0


@dataclass(frozen=True, slots=True)
class Look:
    """How a call for a new pod may ask S3 for the listing.

    Attributes:
        max_age_s: how old an answer may be.
        until_s: how long the call may wait, by the monotonic clock.
        in_haste: the call may not wait for S3; kubelet calls again.
    """

    max_age_s: float
    until_s: float
    in_haste: bool

    @classmethod
    def within(cls, max_age_s: float, timeout_s: float) -> Look:
        """Make one for a call that may wait this long from now on."""
        in_haste = timeout_s < LOOK_S
        oldest_s = max(max_age_s, OLD_S) if in_haste else max_age_s
        return cls(oldest_s, time.monotonic() + timeout_s, in_haste)

    @property
    def left_s(self) -> float:
        """The time for which the call may still wait."""
        return max(0.0, self.until_s - time.monotonic())

    def ask(self, daemon: Daemon) -> tuple[bool | None, str]:
        """Whether S3 lists what this daemon shows; or None, and why that is not known.

        Raises:
            StillStartingError: S3 has not answered yet, and this call may not wait.
        """
        if daemon.supervisor is None:
            return None, "its daemon has ended"
        timeout_s = min(self.left_s, LOOK_S + 1)
        client = ControlClient(control_socket(daemon.mountpoint), timeout_s, MOST_ANSWERED_BYTES)
        try:
            answer = client.put("/snapshot", {"max_age_s": self.max_age_s, "timeout_s": LOOK_S})
            return answer["same"], answer["why"]
        except ControlError as error:
            if self.in_haste:
                raise StillStartingError(
                    f"{daemon.spec.source}: is not mounted yet: S3 is asked what it lists now"
                ) from error
            return None, str(error)


def doubt(daemon: Daemon, why: str) -> None:
    """Record that a pod gets this snapshot although S3 may list something else."""
    log.warning("%s: a pod gets the snapshot of %s: %s", daemon.spec.source, daemon.name, why)
    if daemon.supervisor is None:
        return
    client = ControlClient(control_socket(daemon.mountpoint), SOON_S, MOST_ANSWERED_BYTES)
    try:
        # A stopped worker reads it when it continues.
        client.put("/doubt", {"why": without_ids(why)})
    except ControlError as error:
        log.debug("%s", error)  # the condition says that the worker does not answer


def told(snapshot: dict[str, Any]) -> str:
    """Since when a snapshot is served, for the condition of its volumes."""
    text = f"the volume is served as S3 listed it at {_time(snapshot['listed_at_s'])}"
    if not snapshot["same"]:
        text += f"; at {_time(snapshot['at_s'])} it listed other objects: new pods see those"
    return text


def doubts(snapshot: dict[str, Any]) -> str | None:
    """Why pods may have got an old snapshot; None if they did not."""
    if snapshot["doubt"] is None:
        return None
    text = (
        f"a pod that started at {_time(snapshot['doubt_at_s'])} got the snapshot of "
        f"{_time(snapshot['listed_at_s'])}, because: {snapshot['doubt']}"
    )
    if not snapshot["same"]:
        text += "; S3 lists other objects now: delete the pod so that the next one sees them"
    return text


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
