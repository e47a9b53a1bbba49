"""The state that one worker leaves to the next, as descriptors in a keeper.

    fuse      the kernel's side of the mount
    session   the FUSE_INIT exchange, and other values that must not change with a restart
    listing   the listings so far (`lazyfs/namespace/listing_log.py`)
    carried   changes at run time (`lazyfs/handover/runtime_changes.py`)
    near      blocks in the page cache (`lazyfs/pagecache/page_map.py`)
    in_hand   requests that were taken and not answered (`lazyfs/handover/pending_requests.py`)

The supervisor also keeps `spec` (`lazyfs/process/mount_spec.py`). For mounts without the CSI driver
it keeps two descriptors that a worker holds as long as it lives: `log`, and `lock`, which shows
others that the mount is served.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from lazyfs.handover.keeper import KeeperClient
from lazyfs.known_fields import known_fields
from lazyfs.memory_file import memory_file, read_whole

# Only the supervisor stores these. It obeys the spec, which names files and rights.
OF_SUPERVISOR = SPEC, LOG, LOCK = "spec", "log", "lock"
FUSE = "fuse"
IN_HAND = "in_hand"
_SESSION, _LISTING, _CARRIED, _NEAR = "session", "listing", "carried", "near"


@dataclass(frozen=True, slots=True)
class Beginning:
    """The values with which a mount began.

    Attributes:
        init_message: the kernel's FUSE_INIT, as hexadecimal digits.
        init_answer: libfuse's answer to it, as hexadecimal digits.
        region: the region of the bucket.
        mounted_ns: nanoseconds since the epoch; shown as the time of directories.
    """

    init_message: str
    init_answer: str
    region: str
    mounted_ns: int


@dataclass(frozen=True, slots=True)
class Handover:
    """A session that another worker can resume. The descriptors belong to the caller of `fetch`."""

    fuse: int
    listing: int
    carried: int
    near: int
    in_hand: int
    beginning: Beginning
    lock: int | None = None

    @classmethod
    def fetch(cls, keeper: KeeperClient, name: str) -> Handover | None:
        """The kept session of that mount; None if it was not mounted yet."""
        kept = keeper.fetch(name)
        if not is_complete(kept):
            return None
        session = json.loads(read_whole(kept[_SESSION]))
        beginning = Beginning(**known_fields(Beginning, session))
        later = ((_CARRIED, new_carried), (_NEAR, new_near), (IN_HAND, new_in_hand))
        for label, new in later:
            if label not in kept:  # the mount began with a version that did not have this
                kept[label] = new()
                keeper.store(name, {label: kept[label]})
        return cls(
            kept[FUSE], kept[_LISTING], kept[_CARRIED], kept[_NEAR], kept[IN_HAND], beginning,
            kept.get(LOCK),
        )  # fmt: skip

    def store(self, keeper: KeeperClient, name: str) -> None:
        """Store the session in the keeper. Raises KeeperError."""
        session = memory_file("lazyfs-session", json.dumps(asdict(self.beginning)).encode())
        kept = {_SESSION: session, _LISTING: self.listing, _CARRIED: self.carried}
        kept |= {_NEAR: self.near, IN_HAND: self.in_hand}
        try:
            keeper.store(name, {FUSE: self.fuse, **kept})
        finally:
            os.close(session)


def is_complete(kept: Mapping[str, int]) -> bool:
    """Whether the kept descriptors suffice for another worker to resume the mount."""
    return FUSE in kept and _SESSION in kept


def new_carried() -> int:
    """A memory file for `RuntimeChanges`, without changes."""
    return memory_file("lazyfs-carried", b"")


def new_near() -> int:
    """A memory file for `PageMap`, without blocks."""
    return memory_file("lazyfs-near", b"")


def new_in_hand() -> int:
    """A memory file for `InHand`, without requests."""
    return memory_file("lazyfs-in-hand", b"")
