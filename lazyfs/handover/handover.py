"""What one daemon leaves to the next, as descriptors in a keeper.

    fuse      the kernel's side of the mount
    session   how the conversation with the kernel began, and what must not change with a restart
    listing   what was listed (`lazyfs/namespace/listing_log.py`)
    carried   what was changed while it runs (`lazyfs/handover/runtime_changes.py`)
    near      what was put into the page cache (`lazyfs/pagecache/page_map.py`)
    in_hand   which requests were taken and not answered (`lazyfs/handover/in_hand.py`)

Beside them the supervisor keeps `spec` (`lazyfs/spec.py`), and by hand what a worker holds as long
as it lives: `log`, and `lock`, by which others see that the mount is served.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from lazyfs.handover.keeper import KeeperClient
from lazyfs.memory_file import memory_file, read_whole

SPEC, LOG, LOCK = "spec", "log", "lock"
FUSE = "fuse"
IN_HAND = "in_hand"
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
    in_hand: int
    beginning: Beginning
    lock: int | None = None

    @classmethod
    def fetch(cls, keeper: KeeperClient, name: str) -> Handover | None:
        """What is kept of that mount; None if it was not mounted yet."""
        kept = keeper.fetch(name)
        if not is_complete(kept):
            return None
        beginning = Beginning(**json.loads(read_whole(kept[_SESSION])))
        later = ((_CARRIED, new_carried), (_NEAR, new_near), (IN_HAND, new_in_hand))
        for label, new in later:
            if label not in kept:  # the mount began with a version that knew of nothing such
                kept[label] = new()
                keeper.store(name, {label: kept[label]})
        return cls(
            kept[FUSE], kept[_LISTING], kept[_CARRIED], kept[_NEAR], kept[IN_HAND], beginning,
            kept.get(LOCK),
        )  # fmt: skip

    def store(self, keeper: KeeperClient, name: str) -> None:
        """Have it kept. Raises KeeperError."""
        session = memory_file("lazyfs-session", json.dumps(asdict(self.beginning)).encode())
        kept = {_SESSION: session, _LISTING: self.listing, _CARRIED: self.carried}
        kept |= {_NEAR: self.near, IN_HAND: self.in_hand}
        try:
            keeper.store(name, {FUSE: self.fuse, **kept})
        finally:
            os.close(session)


def is_complete(kept: Mapping[str, int]) -> bool:
    """Whether what is kept of a mount is enough for another worker to go on with it."""
    return FUSE in kept and _SESSION in kept


def new_carried() -> int:
    """A memory file for `RuntimeChanges`, of a mount to which nothing was done."""
    return memory_file("lazyfs-carried", b"")


def new_near() -> int:
    """A memory file for `PageMap`, of a mount of which nothing is in the page cache."""
    return memory_file("lazyfs-near", b"")


def new_in_hand() -> int:
    """A memory file for `InHand`, of a mount of which no request was taken yet."""
    return memory_file("lazyfs-in-hand", b"")
