"""Records of the mounts on this machine, each locked by its daemon while the daemon runs.

A record is a small JSON file in a directory that only its owner can read. The lock on it, not the
file, shows that the daemon runs: the lock ends with the process, however it ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from lazyfs.errors import MountError
from lazyfs.fuse.mount_syscalls import find_mount
from lazyfs.handover.keeper import is_private, private_directory
from lazyfs.known_fields import known_fields
from lazyfs.process.worker_process import is_over

# unix(7): sun_path has 108 bytes, the last of which is zero.
LONGEST_SOCKET_PATH = 107
# A lock that is held longer belongs to a daemon.
LOOKING_S = 0.2
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class MountRecord:
    """The record of a served mount.

    Attributes:
        supervisor: the process id of the supervisor.
        worker: the process id of the worker; None: none runs at the moment.
        version: the worker's version of lazyfs.
        restarts: how many workers died before this one.
        device: the device number, `major:minor`; empty until it is mounted.
    """

    mountpoint: str
    source: str
    supervisor: int
    worker: int | None = None
    version: str = ""
    restarts: int = 0
    device: str = ""


class RunningMount:
    """The right to serve a mountpoint, with its record, until closed.

    Attributes:
        former: the previous record, if its supervisor was killed; None otherwise.

    Raises:
        MountError: another process has the right.
    """

    def __init__(self, record: MountRecord) -> None:
        mountpoint = Path(record.mountpoint)
        self._path = _path(mountpoint)
        check_runtime_directory()
        try:
            with _alone(self._path.parent):
                _forget_detached(self._path)
                descriptor = _lock_patiently(self._path)
                holder = _read(self._path) if descriptor is None else None
                if holder is not None and has_ended(holder):
                    self._path.unlink(missing_ok=True)
                    descriptor = _lock(self._path)
        except OSError as error:
            raise MountError(f"{self._path}: {error.strerror}") from error
        if descriptor is None:
            there = last_record(mountpoint)
            raise MountError(
                f"{mountpoint}: {there.source if there else 'another source'} is mounted there "
                f"already; unmount it first: lazyfs umount {mountpoint}"
            )
        self._descriptor = descriptor
        self.former = _read(self._path)
        self.write(record)

    def write(self, record: MountRecord) -> None:
        """Replace the record, unless it was removed or replaced: this mount was detached.

        Raises:
            OSError: it cannot be written.
        """
        content = json.dumps(asdict(record)).encode()
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            if os.path.samestat(os.fstat(descriptor), os.fstat(self._descriptor)):
                # Longer than before or padded: a concurrent reader gets one of the two records.
                os.pwrite(descriptor, content.ljust(os.fstat(descriptor).st_size), 0)
        finally:
            os.close(descriptor)

    @property
    def is_current(self) -> bool:
        """Whether the mountpoint is still this mount's: it may be detached and used again."""
        return _is_at(self._path, self._descriptor)

    @property
    def descriptor(self) -> int:
        """The lock's descriptor. While any process holds it, the mount counts as served."""
        return self._descriptor

    def close(self) -> None:
        """Remove the record, because the mount ends.

        A worker that a disk keeps from ending may have the descriptor, too: it must not hold the
        lock.
        """
        _remove(self._path, self._descriptor)
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)


def record_of(mountpoint: Path) -> MountRecord | None:
    """The record of the mount that is served there; None if there is none."""
    with closing(DaemonWatch(mountpoint)) as watch:
        return None if watch.wait(timeout_s=0) else last_record(mountpoint)


def last_record(mountpoint: Path) -> MountRecord | None:
    """The record of a mount that is served, or whose supervisor was killed."""
    return _read(_path(mountpoint))


def records() -> list[MountRecord]:
    """The records of all mounts of this user that are served now."""
    known = map(_read, sorted(runtime_directory().glob("*.json")))
    served = (record_of(Path(record.mountpoint)) for record in known if record is not None)
    return [record for record in served if record is not None]


def is_detached(record: MountRecord) -> bool:
    """Whether a mount is still served, but no longer at its mountpoint in its own namespace.

    It was detached while in use, or unmounted while another mount namespace had a copy. Its daemon
    keeps serving its users, and the mountpoint is free.
    """
    if not record.device:
        return False  # it is just being mounted
    for process in (record.supervisor, record.worker):
        try:
            entry = find_mount(Path(record.mountpoint), process)
        except OSError:
            continue  # it has ended
        return entry is None or entry.device != record.device
    return False


def has_ended(record: MountRecord) -> bool:
    """Whether no process of a mount runs any more, though a disk may keep one from ending."""
    processes = [record.supervisor, *([record.worker] if record.worker else [])]
    return all(map(is_over, processes))


class DaemonWatch:
    """Waits for the end of the daemon that serves a mountpoint now, however it ends."""

    def __init__(self, mountpoint: Path) -> None:
        self._path = _path(mountpoint)
        try:
            self._descriptor: int | None = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            self._descriptor = None  # there is none

    def wait(self, timeout_s: float) -> bool:
        """Wait until it has ended; False after the timeout."""
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
        _remove(self._path, self._descriptor)  # left by a killed daemon
        self.close()
        return True

    def close(self) -> None:
        """Stop watching."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def runtime_directory() -> Path:
    """The directory of records: `/run/lazyfs` for root, below `$XDG_RUNTIME_DIR` for others.

    `$LAZYFS_RUNTIME_DIR` names another one. Its path must be short, because it contains sockets.
    """
    if chosen := os.environ.get("LAZYFS_RUNTIME_DIR"):
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/run/lazyfs")
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(base, "lazyfs")
    # Without a login session (su, cron, batch jobs). In /tmp another user could create it first.
    session, state = Path(f"/run/user/{os.geteuid()}"), Path("~/.local/state").expanduser()
    if is_private(session):
        return session / "lazyfs"
    if any(is_private(each) for each in (state, state.parent, state.parent.parent)):
        # A home may be shared by machines, and records are of one boot of one of them.
        return state / "lazyfs" / _BOOT_ID.read_text()[:8]
    return Path(f"/tmp/lazyfs-{os.geteuid()}")  # noqa: S108


def check_runtime_directory() -> None:
    """Create the directory of records if it is missing.

    Raises:
        MountError: it cannot be made, others can write to it, or its path is too long.
    """
    directory = runtime_directory()
    path = control_socket(Path("/"))  # all sockets' names have the same length
    too_long = len(os.fsencode(path)) - LONGEST_SOCKET_PATH
    if too_long > 0:
        raise MountError(
            f"{directory}: this path is {too_long} bytes too long for sockets in it; "
            "name a shorter one in $LAZYFS_RUNTIME_DIR"
        )
    try:
        private_directory(directory)
    except OSError as error:
        raise MountError(str(error)) from error


def control_socket(mountpoint: Path) -> Path:
    """The control socket of the worker that serves a mountpoint (`lazyfs/control/`)."""
    return _path(mountpoint).with_suffix(".sock")


def listen_at(path: Path) -> socket.socket:
    """Listen on a unix socket that only this user may connect to.

    Args:
        path: of the socket. An existing one is replaced, because this process holds the lock of the
            mount.

    Raises:
        MountError: it cannot be made.
    """
    listener = socket.socket(socket.AF_UNIX)
    try:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen()
    except OSError as error:
        listener.close()
        raise MountError(f"{path}: the control socket cannot be made: {error}") from error
    return listener


def default_log_file(mountpoint: Path) -> Path:
    """The default log file of a background daemon."""
    name = "-".join(mountpoint.parts[1:]) or "root"
    if os.geteuid() == 0:
        return Path("/var/log/lazyfs") / f"{name}.log"
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "lazyfs" / f"{name}.log"


def _read(path: Path) -> MountRecord | None:
    """The record in a file; None if there is none yet, or if others could have written it."""
    if not is_private(path.parent):
        return None
    try:
        return MountRecord(**known_fields(MountRecord, json.loads(path.read_bytes())))
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold the lock under which mountpoints are taken."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _forget_detached(path: Path) -> None:
    """Remove the record of a detached mount. Only one process may call this at a time."""
    record = _read(path)
    if record is not None and is_detached(record):
        path.unlink(missing_ok=True)


def _lock_patiently(path: Path) -> int | None:
    """`_lock`, with retries: a process that checks whether a daemon runs holds it briefly."""
    until_s = time.monotonic() + LOOKING_S
    while (descriptor := _lock(path)) is None and time.monotonic() < until_s:
        time.sleep(0.01)
    return descriptor


def _lock(path: Path) -> int | None:
    """A locked descriptor of the file at a path; None if another process has the lock.

    A process removes the file only while it holds the lock. So the lock is useless if the file was
    removed after it was opened here: then the file that is there now counts.

    Workers of root get the descriptor, and must not be able to write: root believes the record. For
    other users it is also open for writing, because NFS, where their homes may be, needs that for
    an exclusive lock (flock(2)).
    """
    access = os.O_RDONLY if os.geteuid() == 0 else os.O_RDWR
    while True:
        descriptor = os.open(path, access | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                return descriptor
        except BlockingIOError:
            if _is_at(path, descriptor):
                os.close(descriptor)
                return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether that file is still the one at the path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove(path: Path, descriptor: int) -> None:
    """Remove a record, whose lock this process holds, and its socket."""
    if _is_at(path, descriptor):
        path.with_suffix(".sock").unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def _path(mountpoint: Path) -> Path:
    digest = hashlib.blake2b(os.fsencode(mountpoint), digest_size=8).hexdigest()
    return runtime_directory() / f"{digest}.json"
