"""Which mounts run on this machine: one record each, locked by the daemon for as long as it lives.

A record is a small JSON file in a directory that only its owner can read. The lock on it, not the
file, says that the daemon runs: it ends with the process, however that ended.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from lazyfs import __version__
from lazyfs.errors import MountError


@dataclass(frozen=True, slots=True)
class MountRecord:
    """What is known of a running daemon."""

    mountpoint: str
    source: str
    pid: int
    version: str = __version__


class RunningMount:
    """This process's own record, until it is closed."""

    def __init__(self, record: MountRecord) -> None:
        self._path = _path(Path(record.mountpoint))
        _make_directory(self._path.parent)
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise MountError(
                f"{record.mountpoint}: another lazyfs daemon still serves it; "
                f"wait for it, or lazyfs umount {record.mountpoint}"
            ) from None
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, json.dumps(asdict(record)).encode())

    def close(self) -> None:
        """The mount ends: take the record away. The lock stays until the process is gone."""
        self._path.unlink(missing_ok=True)


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
        self._path.unlink(missing_ok=True)  # left behind by a daemon that was killed
        return True


def _make_directory(directory: Path) -> None:
    """Raises MountError if others could have put something there."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise MountError(f"{directory}: is not a directory of this user alone; remove it")


def runtime_directory() -> Path:
    """Where records are: `/run/lazyfs` for root, below `$XDG_RUNTIME_DIR` for others."""
    if os.geteuid() == 0:
        return Path("/run/lazyfs")
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base, "lazyfs") if base else Path(f"/tmp/lazyfs-{os.geteuid()}")  # noqa: S108


def default_log_file(mountpoint: Path) -> Path:
    """Where a background daemon logs when no option says."""
    name = "-".join(mountpoint.parts[1:]) or "root"
    if os.geteuid() == 0:
        return Path("/var/log/lazyfs") / f"{name}.log"
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "lazyfs" / f"{name}.log"


def _path(mountpoint: Path) -> Path:
    digest = hashlib.blake2b(os.fsencode(mountpoint), digest_size=8).hexdigest()
    return runtime_directory() / f"{digest}.json"
