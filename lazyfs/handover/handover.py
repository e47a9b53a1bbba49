"""What one daemon leaves to the next, as descriptors in a keeper.

    fuse      the kernel's side of the mount
    session   how the conversation with the kernel began, and what must not change with a restart
    listing   what was listed (`lazyfs/namespace/listing_log.py`)
    carried   what was changed while it runs (`lazyfs/handover/runtime_changes.py`)
    near      what was put into the page cache (`lazyfs/handover/page_map.py`)

Beside them the supervisor keeps `spec` (`lazyfs/spec.py`), and by hand what a worker holds as long
as it lives: `log`, and `lock`, by which others see that the mount is served.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from lazyfs.handover.keeper import KeeperClient
from lazyfs.memory_file import memory_file, read_whole

SPEC, LOG, LOCK = "spec", "log", "lock"
FUSE = "fuse"
_SESSION, _LISTING, _CARRIED, _NEAR = "session", "listing", "carried", "near"


@dataclass(frozen=True, slots=True)
class Beginning:
    """How a mount began.

    Attributes:
        init_message: the kernel's FUSE_INIT, as hexadecimal digits.
        init_answer: what libfuse answered to it, likewise.
        region: of the bucket.
        mounted_ns: since the epoch; what directories show as their time.
    """

    init_message: str
    init_answer: str
    region: str
    mounted_ns: int


@dataclass(frozen=True, slots=True)
class Handover:
    """A session that another daemon can go on with. The descriptors belong to who fetched it."""

    fuse: int
    listing: int
    carried: int
    near: int
    beginning: Beginning

    @classmethod
    def fetch(cls, keeper: KeeperClient, name: str) -> Handover | None:
        """What is kept of that mount; None if it was not mounted yet."""
        kept = keeper.fetch(name)
        if FUSE not in kept:
            return None
        beginning = Beginning(**json.loads(read_whole(kept[_SESSION])))
        for label, new in ((_CARRIED, new_carried), (_NEAR, new_near)):
            if label not in kept:  # the mount began with a version that knew of nothing such
                kept[label] = new()
                keeper.store(name, {label: kept[label]})
        return cls(kept[FUSE], kept[_LISTING], kept[_CARRIED], kept[_NEAR], beginning)

    def store(self, keeper: KeeperClient, name: str) -> None:
        """Have it kept. Raises KeeperError."""
        session = memory_file("lazyfs-session", json.dumps(asdict(self.beginning)).encode())
        labels = {_SESSION: session, _LISTING: self.listing, _CARRIED: self.carried}
        keeper.store(name, {FUSE: self.fuse, **labels, _NEAR: self.near})


def new_carried() -> int:
    """A memory file for `RuntimeChanges`, of a mount to which nothing was done."""
    return memory_file("lazyfs-carried", b"")


def new_near() -> int:
    """A memory file for `PageMap`, of a mount of which nothing is in the page cache."""
    return memory_file("lazyfs-near", b"")
