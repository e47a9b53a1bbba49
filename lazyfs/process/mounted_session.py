"""The mount of a supervisor: its session with the kernel, and what the keeper holds of it.

The descriptors are held here as well as in the keeper, so that a replaced keeper can be given them
again, and so that the mount ends when neither has them any more.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

from lazyfs.errors import MountError
from lazyfs.fuse import mount_syscalls
from lazyfs.handover.handover import FUSE, IN_HAND, is_complete
from lazyfs.handover.keeper import KeeperClient
from lazyfs.handover.pending_requests import note_death

log = logging.getLogger(__name__)

# How often requests are refused while a mount is taken away.
REFUSE_S = 0.1


class MountedSession:
    """One mount: made, kept, found again, taken away. Thread-safe.

    Args:
        mountpoint: its place, and its name in the keeper.
        connect: returns a new connection to the keeper; raises KeeperError if there is none.

    Attributes:
        device: the mount's device number, `major:minor`; None while it was never mounted.
    """

    def __init__(self, mountpoint: Path, connect: Callable[[], socket.socket]) -> None:
        self._mountpoint = mountpoint
        self._name = str(mountpoint)
        self._connect = connect
        self._kept: dict[str, int] = {}
        self._kept_lock = threading.Lock()
        # Several threads may unmount.
        self._unmounting = threading.Lock()
        self.device: str | None = None

    def begin(self, source: str, *, allow_other: bool, read_ahead_bytes: int) -> tuple[int, bytes]:
        """Mount; returns the descriptor of `/dev/fuse`, which stays ours, and FUSE_INIT.

        Raises:
            MountError: it is not possible.
        """
        descriptor, init_message = mount_syscalls.begin_mount(
            source, self._mountpoint, allow_other=allow_other
        )
        with self._kept_lock:
            self._kept[FUSE] = descriptor
        self.find_device()
        if self.device:
            # Before the worker answers FUSE_INIT: the kernel uses the smaller of both values.
            mount_syscalls.set_read_ahead(self.device, read_ahead_bytes)
        return descriptor, init_message

    def find_device(self) -> None:
        """Look the device number up."""
        entry = mount_syscalls.find_mount(self._mountpoint)
        # No entry: it was detached, and its users are still served. It must not be looked up later,
        # because another mount may be there by then.
        self.device = entry.device if entry else None

    @property
    def is_there(self) -> bool:
        """Whether this mount is at the mountpoint."""
        entry = mount_syscalls.find_mount(self._mountpoint)
        return entry is not None and entry.device == self.device

    @property
    def has_ended(self) -> bool:
        """Whether there is no session, or the kernel has ended it, or is about to."""
        return FUSE not in self._kept or mount_syscalls.session_ended(self._kept[FUSE])

    @property
    def can_be_resumed(self) -> bool:
        """Whether a worker can go on with the session."""
        return is_complete(self._kept) and not self.has_ended

    def fetch(self) -> None:
        """Fetch the kept descriptors from the keeper and hold them. Raises KeeperError."""
        with self._keeper() as keeper:
            kept = keeper.fetch(self._name)
        self._hold(kept)

    def store(self, descriptors: Mapping[str, int]) -> None:
        """Have the keeper keep more descriptors. Raises KeeperError."""
        with self._keeper() as keeper:
            keeper.store(self._name, descriptors)

    def give_back(self) -> None:
        """Give a replaced keeper the descriptors of the former one. Raises KeeperError."""
        with self._keeper() as keeper, self._kept_lock:
            if FUSE in self._kept and self._name not in keeper.names():
                log.warning("%s: the keeper was replaced: gave it the session", self._mountpoint)
                keeper.store(self._name, self._kept)

    def note_death(self) -> None:
        """Record that a worker died, perhaps of a request that it had in hand."""
        try:
            with self._kept_lock:
                if IN_HAND in self._kept:
                    note_death(self._kept[IN_HAND])
        except OSError as error:
            log.warning("%s: its death cannot be counted: %s", self._mountpoint, error)

    def let_go(self) -> None:
        """Close our descriptors; the keeper's stay."""
        self._hold({})

    def drop(self) -> None:
        """Close our descriptors, and the keeper's. Raises KeeperError."""
        self.let_go()
        with self._keeper() as keeper:
            keeper.drop(self._name)

    def unmount(self) -> None:
        """Unmount, if it is still this mount that is at the mountpoint.

        Even if this fails, the session ends with its descriptor.
        """
        with self._unmounting:
            for lazy in (False, True):
                entry = mount_syscalls.find_mount(self._mountpoint)
                if FUSE not in self._kept or entry is None or not self._is_ours(entry):
                    return
                try:
                    mount_syscalls.unmount(self._mountpoint, lazy=lazy)
                except MountError as error:
                    if lazy and mount_syscalls.find_mount(self._mountpoint) is not None:
                        log.error("%s", error)

    def end(self) -> None:
        """Unmount after the last worker has ended, also if it left requests unanswered.

        Users of the mount get an error.
        """
        self._refuse_requests()
        ended = threading.Event()
        refusing = threading.Thread(target=self._refuse_until, args=[ended], daemon=True)
        with contextlib.suppress(RuntimeError):  # no more threads are allowed
            refusing.start()
        try:
            self.unmount()
        finally:
            ended.set()
            if refusing.is_alive():
                refusing.join()
        self._abort()

    def _refuse_until(self, ended: threading.Event) -> None:
        """Refuse what readers ask for until the mount has ended."""
        while not ended.wait(REFUSE_S):
            self._refuse_requests()

    def _refuse_requests(self) -> None:
        with self._kept_lock:
            if FUSE in self._kept:
                mount_syscalls.refuse_requests(self._kept[FUSE])

    def _abort(self) -> None:
        """Give remaining users of the mount an error, and end threads of a killed worker."""
        # After the session has ended, another mount may have its device number.
        if self.device is not None and not self.has_ended:
            mount_syscalls.abort(self.device)

    def _is_ours(self, entry: mount_syscalls.MountEntry) -> bool:
        is_of_type = entry.filesystem_type == mount_syscalls.FILESYSTEM_TYPE
        return is_of_type and self.device in (None, entry.device)

    def _hold(self, kept: dict[str, int]) -> None:
        with self._kept_lock:
            for descriptor in self._kept.values():
                os.close(descriptor)
            self._kept = kept

    def _keeper(self) -> closing[KeeperClient]:
        return closing(KeeperClient(self._connect()))
