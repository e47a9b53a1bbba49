"""Bind mounts of a volume at requested paths, and checks of these paths.

Nothing here accesses the mounted filesystem: its daemon may be down, and then the access would
wait. `/proc/self/mountinfo` says what is mounted where. Nothing here deletes a file either: a path
is unmounted, and then rmdir(2) removes the directory if it is empty.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from pathlib import Path

from csi.errors import InvalidArgumentError
from lazyfs.errors import MountError
from lazyfs.fuse import mount_syscalls

# linux/mount.h
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND = 1, 2, 4, 8, 32, 4096
# A model is data. Every bind mount of a volume has these flags, whatever was requested.
FLAGS = _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
# On all architectures since Linux 5.12 (asm-generic/unistd.h); the C library may lack it.
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
# linux/mount.h, linux/fcntl.h
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 1, 4
_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000
_ATTRIBUTES = 1 | 2 | 4 | 8  # MOUNT_ATTR_RDONLY, _NOSUID, _NODEV, _NOEXEC
# limits.h: PATH_MAX, with its ending zero byte.
LONGEST_PATH_BYTES = 4095
# More mounts at one path than can happen by mistake.
_MOST_LAYERS = 32

_libc = ctypes.CDLL(None, use_errno=True)


def safe_path(what: str, text: str) -> Path:
    """A path of a request, with the links in its directories followed, as the kernel names mounts.

    Args:
        what: names the field in messages.

    Raises:
        InvalidArgumentError: it is missing, relative, too long, not plain, or a symbolic link.
    """
    if not text:
        raise InvalidArgumentError(f"{what} is missing")
    if len(os.fsencode(text)) > LONGEST_PATH_BYTES:
        raise InvalidArgumentError(f"{what} is longer than {LONGEST_PATH_BYTES} bytes")
    if not text.isprintable():
        raise InvalidArgumentError(f"{what} has control characters: {text!r}")
    parts = text.rstrip("/").split("/")
    if parts[0] != "" or len(parts) < 2 or any(part in (".", "..") for part in parts):
        raise InvalidArgumentError(
            f"{what}: {text!r} is not allowed: an absolute path without '.' and '..'"
        )
    path = Path("/".join(parts))
    path = Path(os.path.realpath(path.parent), path.name)
    # lstat(2) of a mountpoint asks what is mounted there.
    if not is_mountpoint(path) and path.is_symlink():
        raise InvalidArgumentError(f"{what}: {text!r} is a symbolic link")
    return path


def is_mountpoint(path: Path) -> bool:
    """Whether anything is mounted there."""
    return mount_syscalls.find_mount(path) is not None


def shows(path: Path, device: str) -> bool:
    """Whether the topmost mount there is the filesystem of that device number."""
    entry = mount_syscalls.find_mount(path)
    return entry is not None and entry.device == device


def bind(source: Path, target: Path, device: str) -> None:
    """Bind-mount `source` at `target`, read-only; does nothing if it is mounted there already.

    A dead lazyfs mount at `target` is unmounted first.

    Args:
        target: created if it is missing; its parent must exist.
        device: of the filesystem at `source`; another filesystem there is refused.

    Raises:
        MountError: it is not possible; then no new mount is left.
    """
    if shows(target, device):
        return
    unbind(target)
    if entry := mount_syscalls.find_mount(target):
        raise MountError(
            f"{target}: {entry.source} ({entry.filesystem_type}) is mounted there already"
        )
    try:
        target.mkdir(mode=0o750, exist_ok=True)
        if not stat.S_ISDIR(target.lstat().st_mode):
            raise MountError(f"{target}: exists and is not a directory")
    except OSError as error:
        raise MountError(f"{target}: cannot be made: {error.strerror}") from error
    is_guarded = _bind_guarded(source, target)
    if not is_guarded:
        _mount(source, target, _MS_BIND)
    try:
        if not shows(target, device):
            raise MountError(f"{source}: the volume is no longer mounted there")
        if not is_guarded:
            _mount(None, target, _MS_REMOUNT | _MS_BIND | FLAGS)
    except MountError:
        mount_syscalls.unmount(target, lazy=True)
        raise


def unbind(target: Path) -> None:
    """Unmount lazyfs mounts at `target`, even if they are in use, and leave the directory.

    Other filesystems mounted there stay, and everything below them.

    Raises:
        MountError: it is not possible.
    """
    for _ in range(_MOST_LAYERS):
        entry = mount_syscalls.find_mount(target)
        if entry is None or entry.filesystem_type != mount_syscalls.FILESYSTEM_TYPE:
            return
        try:
            mount_syscalls.unmount(target)
        except MountError:
            mount_syscalls.unmount(target, lazy=True)
    raise MountError(f"{target}: more than {_MOST_LAYERS} mounts are there")


def detach(mountpoint: Path) -> None:
    """Remove a mount of ours that has no daemon; processes that wait for it get an error."""
    entry = mount_syscalls.find_mount(mountpoint)
    if entry is not None and entry.filesystem_type == mount_syscalls.FILESYSTEM_TYPE:
        mount_syscalls.abort(entry.device)  # after the unmount it may be another mount's
        mount_syscalls.unmount(mountpoint, lazy=True)


def remove_directory(path: Path) -> None:
    """Remove an empty directory where nothing is mounted; does nothing if it does not exist.

    Raises:
        MountError: it is not empty, or something is mounted there.
    """
    if is_mountpoint(path):
        raise MountError(f"{path}: is still a mountpoint")
    try:
        path.rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        raise MountError(f"{path}: cannot be removed: {error.strerror}") from error


def _bind_guarded(source: Path, target: Path) -> bool:
    """Bind-mount with all flags from the start; False if the kernel is older than 5.12.

    Mount propagation copies a mount as it is when it is attached. Changes by a later remount stay
    in this mount namespace: the node and its pods would see the mount without them.
    """
    try:
        tree = _syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(source), _OPEN_TREE_CLONE | os.O_CLOEXEC)
        try:
            # struct mount_attr: set, clear, propagation, user namespace.
            wanted = struct.pack("4Q", _ATTRIBUTES, 0, 0, 0)
            _syscall(_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, wanted, len(wanted))
            _syscall(
                _MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH
            )
        finally:
            os.close(tree)
    except OSError as error:
        if error.errno == errno.ENOSYS:
            return False
        raise _bind_error(target, error.errno or 0) from error
    return True


def _syscall(number: int, *arguments: int | bytes) -> int:
    """Raises OSError."""
    wide = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    result: int = _libc.syscall(ctypes.c_long(number), *wide)
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result


def _mount(source: Path | None, target: Path, flags: int) -> None:
    encoded = None if source is None else os.fsencode(source)
    if _libc.mount(encoded, os.fsencode(target), None, ctypes.c_ulong(flags), None) != 0:
        raise _bind_error(target, ctypes.get_errno())


def _bind_error(target: Path, number: int) -> MountError:
    hint = "; CAP_SYS_ADMIN is needed" if number == errno.EPERM else ""
    return MountError(f"{target}: bind mount failed: {os.strerror(number)}{hint}")
