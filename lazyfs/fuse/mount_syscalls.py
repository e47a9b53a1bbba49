"""Mount system calls and what `/proc` says of mounts. Only the standard library.

Root mounts with mount(2), other users with fusermount3, which is setuid root.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import select
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from lazyfs.errors import MountError

log = logging.getLogger(__name__)

# linux/mount.h
MS_RDONLY, MS_NOSUID, MS_NODEV = 1, 2, 4
# A mount has no links. If its worker is taken over, it could make some for root to follow. Linux
# before 5.10 ignores the flag.
MS_NOSYMFOLLOW = 256
MNT_DETACH = 2
FILESYSTEM_TYPE = "fuse.lazyfs"
# The first kernel that can resend the requests of a dead worker (FUSE_NOTIFY_RESEND).
RESEND_SINCE = (6, 9)

# linux/fuse.h: struct fuse_out_header with FUSE_NOTIFY_RESEND in place of an error.
RESEND = struct.pack("<IiQ", 16, 7, 0)
# The kernel requires room for the longest write that was negotiated, 1 MiB, and its header.
REQUEST_BYTES = (1 << 20) + (64 << 10)
# umount(2) waits for pushes into the page cache. This is long for one that no read holds up.
UNMOUNT_PATIENCE_S = 2.0
# Requests without an answer: FUSE_FORGET, FUSE_INTERRUPT, FUSE_BATCH_FORGET.
_WITHOUT_ANSWER = (2, 36, 42)

# The kernel refuses reads with smaller buffers (FUSE_MIN_READ_BUFFER).
INIT_BUFFER = 1 << 16

IN_USE = "in use; end the processes that use it, or detach it with --lazy"
# A helper process of the mount may have a file open for some milliseconds (`pagecache/`).
BUSY_PATIENCE_S = 0.3

_libc = ctypes.CDLL(None, use_errno=True)


class MountEntry:
    """One line of `/proc/self/mountinfo` (proc(5))."""

    def __init__(self, line: str) -> None:
        fields, _, rest = line.partition(" - ")
        self.mount_id = fields.split()[0]
        self.device = fields.split()[2]
        self.mountpoint = Path(_unescape(fields.split()[4]))
        self.filesystem_type, self.source = (_unescape(part) for part in rest.split()[:2])


def mounts(process: int | None = None) -> list[MountEntry]:
    """All mounts of the mount namespace of a process, by default of this one, oldest first.

    Raises:
        OSError: there is no such process, or it is another user's.
    """
    # Names are bytes, and may contain Unicode line ends.
    path = Path(f"/proc/{process or 'self'}/mountinfo")
    text = path.read_text(errors="surrogateescape")
    return [MountEntry(line) for line in text.split("\n") if line]


def find_mount(mountpoint: Path, process: int | None = None) -> MountEntry | None:
    """The topmost mount there, found without access to the filesystem itself.

    Raises:
        OSError: as of `mounts`.
    """
    entries = reversed(mounts(process))
    return next((entry for entry in entries if entry.mountpoint == mountpoint), None)


def check_fuse() -> None:
    """Raises MountError if this machine has no FUSE."""
    if not Path("/dev/fuse").exists():
        raise MountError(
            "/dev/fuse is missing: load the kernel module (modprobe fuse), or give the container "
            "the device"
        )


def check_mountpoint(mountpoint: Path) -> None:
    """Raises MountError if the path cannot be mounted on."""
    check_fuse()
    entry = find_mount(mountpoint)
    if entry is not None:
        raise MountError(
            f"{mountpoint}: {entry.source} ({entry.filesystem_type}) is mounted there already; "
            f"unmount it first: lazyfs umount {mountpoint}"
        )
    try:
        if not mountpoint.is_dir():
            what = "is not a directory" if mountpoint.exists() else "does not exist: mkdir it first"
            raise MountError(f"{mountpoint}: {what}")
        if any(mountpoint.iterdir()):
            raise MountError(f"{mountpoint}: is not empty; mount on an empty directory")
    except OSError as error:
        raise MountError(f"{mountpoint}: {error.strerror}") from error


def mount(source: str, mountpoint: Path, *, allow_other: bool) -> int:
    """Mount a new FUSE filesystem, read-only; returns its descriptor of `/dev/fuse`.

    Args:
        source: shown as the device in `/proc/mounts`.

    Raises:
        MountError: it is not possible; the message says why and what to do.
    """
    how = _mount_as_root if os.geteuid() == 0 else _mount_with_helper
    return how(source, mountpoint, allow_other)


def begin_mount(source: str, mountpoint: Path, *, allow_other: bool) -> tuple[int, bytes]:
    """Mount, and read the kernel's first message; returns the descriptor and FUSE_INIT.

    Raises:
        MountError: it is not possible; then nothing is mounted.
    """
    check_mountpoint(mountpoint)
    descriptor = mount(source, mountpoint, allow_other=allow_other)
    try:
        return descriptor, os.read(descriptor, INIT_BUFFER)
    except OSError as error:
        unmount(mountpoint, lazy=True)
        os.close(descriptor)
        raise MountError(f"{mountpoint}: the kernel sent no FUSE_INIT: {error}") from error


def set_read_ahead(device: str, read_ahead_bytes: int) -> None:
    """Set the read-ahead of a mount, which needs root and a writable `/sys`.

    With the default of 128 KiB page faults request little, and mapped reads run at a third of the
    speed. Without permission to set it the mount works, but slower. The answer to FUSE_INIT must
    allow as much: the kernel uses the lesser of both (`process_init_reply`).

    Args:
        device: the mount's device number, `major:minor`.
    """
    path = Path(f"/sys/class/bdi/{device}/read_ahead_kb")
    wanted = str(read_ahead_bytes // 1024)
    try:
        path.write_text(wanted)
        is_now = path.read_text().strip()
    except OSError as error:
        log.debug("%s stays as it is: %s", path, error.strerror)
        return
    if is_now != wanted:
        log.debug("%s is %s, not %s as it was set", path, is_now, wanted)


def session_ended(descriptor: int) -> bool:
    """Whether the kernel has ended the session of this descriptor of `/dev/fuse`.

    It does that after an unmount, and when the connection is aborted.
    """
    watch = select.poll()
    watch.register(descriptor, select.POLLIN)
    return any(events & select.POLLERR for _, events in watch.poll(0))


def refuse_requests(descriptor: int) -> None:
    """Answer all requests with ENOTCONN, also those that a worker took and did not answer.

    A page is locked until the read that wants it is answered. A thread of the worker that puts this
    page into the page cache waits for that, cannot be killed, and umount(2) waits for the thread.
    Needs `RESEND_SINCE`. Only after the worker has ended.

    Args:
        descriptor: of `/dev/fuse`.
    """
    buffer = bytearray(REQUEST_BYTES)
    with contextlib.suppress(OSError):  # BlockingIOError: all are answered
        os.set_blocking(descriptor, False)
        with contextlib.suppress(OSError):
            os.write(descriptor, RESEND)
        while True:
            try:
                os.readv(descriptor, [buffer])
                _, operation, unique = struct.unpack_from("<IIQ", buffer)
                if operation not in _WITHOUT_ANSWER:
                    os.write(descriptor, struct.pack("<IiQ", 16, -errno.ENOTCONN, unique))
            except OSError as error:
                if error.errno != errno.ENOENT:  # a request that was withdrawn meanwhile
                    raise


def abort(device: str) -> None:
    """Have the kernel end a FUSE connection: waiting processes get an error at once.

    This needs fusectl, which is mounted nearly everywhere. Without it the kernel does the same when
    the last descriptor is closed.

    Args:
        device: the mount's device number, `major:minor`.
    """
    with contextlib.suppress(OSError):  # it has ended already, or there is no fusectl
        Path("/sys/fs/fuse/connections", device.partition(":")[2], "abort").write_text("1")


def clear_stale(mountpoint: Path) -> bool:
    """Unmount a lazyfs mount whose daemon is gone; returns whether there was one.

    The kernel's answer shows it: "transport endpoint is not connected".

    Raises:
        MountError: it cannot be unmounted.
    """
    entry = find_mount(mountpoint)
    if entry is None or entry.filesystem_type != FILESYSTEM_TYPE:
        return False
    try:
        os.statvfs(mountpoint)
    except OSError as error:
        if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
            unmount(mountpoint, lazy=True)
            return True
    return False


def unmount(mountpoint: Path, *, lazy: bool = False) -> None:
    """Unmount, even if the daemon is dead.

    Args:
        lazy: detach it even if it is in use; it ends with its last user.

    Raises:
        MountError: it is in use, or not permitted, or not mounted.
    """
    deadline_s = time.monotonic() + BUSY_PATIENCE_S
    while (hint := _try_unmount(mountpoint, lazy=lazy)) is not None:
        if hint != IN_USE or time.monotonic() > deadline_s:
            raise MountError(f"{mountpoint}: {hint}")
        time.sleep(0.02)


def _try_unmount(mountpoint: Path, *, lazy: bool) -> str | None:
    """Try to unmount once; returns None, or why it is not possible."""
    if os.geteuid() == 0:
        if _libc.umount2(os.fsencode(mountpoint), MNT_DETACH if lazy else 0) == 0:
            return None
        return _unmount_hint(ctypes.get_errno())
    answer = _run_helper([*_helper(), "-u", *(["-z"] if lazy else []), str(mountpoint)])
    if answer.returncode == 0:
        return None
    busy = "busy" in answer.stderr.lower()
    return IN_USE if busy else answer.stderr.strip()


def _unmount_hint(number: int) -> str:
    if number == errno.EBUSY:
        return IN_USE
    if number == errno.EINVAL:
        return "nothing is mounted there"
    return os.strerror(number)


def _mount_as_root(source: str, mountpoint: Path, allow_other: bool) -> int:
    try:
        descriptor = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise MountError(f"/dev/fuse: {error.strerror}; is the device allowed here?") from error
    options = [f"fd={descriptor}", "rootmode=40000", "user_id=0", "group_id=0"]
    options += ["default_permissions", *(["allow_other"] if allow_other else [])]
    flags = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOSYMFOLLOW
    arguments = (source, mountpoint, FILESYSTEM_TYPE)
    encoded = [os.fsencode(argument) for argument in arguments]
    if _libc.mount(*encoded, ctypes.c_ulong(flags), ",".join(options).encode()) != 0:
        number = ctypes.get_errno()
        os.close(descriptor)
        hint = "; CAP_SYS_ADMIN is needed" if number == errno.EPERM else ""
        raise MountError(f"{mountpoint}: mount failed: {os.strerror(number)}{hint}")
    return descriptor


def _mount_with_helper(source: str, mountpoint: Path, allow_other: bool) -> int:
    """Mount with fusermount3, which is setuid root, and receive the descriptor from it.

    It sends the descriptor over the socket whose number is in `_FUSE_COMMFD` (libfuse, mount.c).
    """
    options = ["ro", "nosuid", "nodev", "default_permissions", "subtype=lazyfs"]
    options += [f"fsname={_escape(source)}", *(["allow_other"] if allow_other else [])]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        answer = _run_helper(
            [*_helper(), "-o", ",".join(options), "--", str(mountpoint)],
            descriptors=[theirs.fileno()],
            environment={"_FUSE_COMMFD": str(theirs.fileno())},
        )
        if answer.returncode != 0:
            raise MountError(f"{mountpoint}: {answer.stderr.strip() or 'fusermount3 failed'}")
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]


def _helper() -> list[str]:
    path = shutil.which("fusermount3")
    if path is None:
        raise MountError("fusermount3 is missing, which users need to mount: install package fuse3")
    return [path]


def _run_helper(
    command: list[str],
    *,
    descriptors: Sequence[int] = (),
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            pass_fds=descriptors,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise MountError(f"{command[0]} did not end within 30 s") from error


def _escape(text: str) -> str:
    """Escape commas and backslashes in a value for fusermount3's `-o` (fuse_opt.h)."""
    return text.replace("\\", "\\\\").replace(",", "\\,")


def _unescape(text: str) -> str:
    """Decode the octal escapes of mountinfo: space, tab, newline, backslash."""
    for code, letter in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, letter)
    return text
