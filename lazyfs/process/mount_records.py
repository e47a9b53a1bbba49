"""Which mounts run on this machine: one record each, locked by the daemon for as long as it lives.

A record is a small JSON file in a directory that only its owner can read. The lock on it, not the
file, says that the daemon runs: it ends with the process, however that ended.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from lazyfs.errors import MountError
from lazyfs.handover.keeper import private_directory


@dataclass(frozen=True, slots=True)
class MountRecord:
    """What is known of a mount that is served.

    Attributes:
        supervisor: the process that looks after the worker.
        worker: the process that serves; None: none does at the moment.
        version: of lazyfs, in the worker.
        restarts: how many workers ended before this one.
    """

    mountpoint: str
    source: str
    supervisor: int
    worker: int | None = None
    version: str = ""
    restarts: int = 0


class RunningMount:
    """The right to serve a mountpoint, and the record of it, until it is closed.

    Raises:
        MountError: another process has it.
    """

    def __init__(self, record: MountRecord) -> None:
        self._path = _path(Path(record.mountpoint))
        check_runtime_directory()
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            source = _read(self._path).source
            os.close(self._descriptor)
            raise MountError(
                f"{record.mountpoint}: {source} is mounted there already; "
                f"unmount it first: lazyfs umount {record.mountpoint}"
            ) from None
        self.write(record)

    def write(self, record: MountRecord) -> None:
        """Replace the record."""
        content = json.dumps(asdict(record)).encode()
        # Longer than before or padded, so that who reads at the same time reads one of the two.
        size = os.fstat(self._descriptor).st_size
        os.pwrite(self._descriptor, content.ljust(size), 0)

    @property
    def descriptor(self) -> int:
        """What another process must hold for the mount to count as served while it lives."""
        return self._descriptor

    def close(self) -> None:
        """The mount ends: take the record away."""
        self._path.unlink(missing_ok=True)
        self._path.with_suffix(".sock").unlink(missing_ok=True)
        os.close(self._descriptor)


def record_of(mountpoint: Path) -> MountRecord | None:
    """The record of the mount that is served there; None if no daemon does."""
    path = _path(mountpoint)
    if DaemonWatch(mountpoint).wait(timeout_s=0):
        return None
    return _read(path)


def last_record(mountpoint: Path) -> MountRecord | None:
    """The record of a mount that is served, or was by a supervisor that was killed."""
    try:
        return _read(_path(mountpoint))
    except (OSError, ValueError, TypeError):
        return None  # none, or one that was just being made


def records() -> list[MountRecord]:
    """Of all mounts of this user that are served now."""
    served = (
        record_of(Path(_read(path).mountpoint))
        for path in sorted(runtime_directory().glob("*.json"))
    )
    return [record for record in served if record is not None]


def restarts_of(mountpoint: Path) -> int:
    """How many workers of a mount ended before the one that asks; for the worker itself."""
    try:
        return _read(_path(mountpoint)).restarts
    except FileNotFoundError:
        return 0  # nobody looks after this worker any more


class DaemonWatch:
    """Sees when the daemon that serves a mountpoint now has ended, however it ends."""

    def __init__(self, mountpoint: Path) -> None:
        self._path = _path(mountpoint)
        try:
            self._descriptor: int | None = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            self._descriptor = None  # there is none

    def wait(self, timeout_s: float) -> bool:
        """Wait until it has ended; False if it has not."""
        if self._descriptor is None:
            return True
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(0.01)
        # Left behind by a daemon that was killed.
        self._path.unlink(missing_ok=True)
        self._path.with_suffix(".sock").unlink(missing_ok=True)
        os.close(self._descriptor)
        return True


def runtime_directory() -> Path:
    """Where records are: `/run/lazyfs` for root, below `$XDG_RUNTIME_DIR` for others.

    `$LAZYFS_RUNTIME_DIR` names another place, which must be short: sockets are in it.
    """
    if chosen := os.environ.get("LAZYFS_RUNTIME_DIR"):
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/run/lazyfs")
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base, "lazyfs") if base else Path(f"/tmp/lazyfs-{os.geteuid()}")  # noqa: S108


def check_runtime_directory() -> None:
    """Make the directory of records if it is missing.

    Raises:
        MountError: it cannot be made, or others can write to it.
    """
    try:
        private_directory(runtime_directory())
    except OSError as error:
        raise MountError(str(error)) from error


def control_socket(mountpoint: Path) -> Path:
    """Where the worker that serves a mountpoint can be asked and told (`lazyfs/control/`)."""
    return _path(mountpoint).with_suffix(".sock")


def default_log_file(mountpoint: Path) -> Path:
    """Where a background daemon logs when no option says."""
    name = "-".join(mountpoint.parts[1:]) or "root"
    if os.geteuid() == 0:
        return Path("/var/log/lazyfs") / f"{name}.log"
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "lazyfs" / f"{name}.log"


def _read(path: Path) -> MountRecord:
    return MountRecord(**json.loads(path.read_text()))


def _path(mountpoint: Path) -> Path:
    digest = hashlib.blake2b(os.fsencode(mountpoint), digest_size=8).hexdigest()
    return runtime_directory() / f"{digest}.json"
