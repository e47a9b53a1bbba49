"""Where block caches are, and which processes may use them.

A cache belongs to one user. Root's is shared by its workers, each of which is a user of its own:
then the directory is root's, and its group is one that only workers have (`user.cache_group`). What
is made in it gets that group, because the directory has the set-group-ID bit (inode(7)). So all
workers of root read, write and remove each other's blocks, and nobody else does.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import stat
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from lazyfs import user
from lazyfs.errors import CacheError
from lazyfs.patience import in_child

_SHARED = stat.S_ISGID | stat.S_IRWXU | stat.S_IRWXG
# Of a cache: folders of blocks, blocks, and other files.
_FOLDER, _BLOCK = re.compile("[0-9a-f]{2}"), re.compile("[0-9a-f]{30}")
_FILE = re.compile("cache\\.db(-wal|-shm)?|claims|waiting|loading|care|opening")


def default_directory() -> Path:
    """The default cache directory, for root and for other users."""
    if user.uid() == 0:
        return Path("/var/cache/lazyfs")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "lazyfs"


def directories(cache_dir: tuple[Path, ...] | Literal["none"] | None) -> tuple[Path, ...]:
    """The directories that the option names; empty if there is no cache."""
    if cache_dir == "none":
        return ()
    return cache_dir or (default_directory(),)


def is_shared(status: os.stat_result) -> bool:
    """Whether a directory is shared by workers of root, and no other user can write to it."""
    is_roots = (status.st_uid, status.st_gid) == (0, user.cache_group())
    return is_roots and status.st_mode & (_SHARED | stat.S_IWOTH) == _SHARED


def make(directory: Path) -> None:
    """Make a cache directory if it is missing; a worker of root cannot make root's.

    Raises:
        OSError: it is missing, and cannot be made.
    """
    if user.is_worker_of_another():
        directory.stat()
    else:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)


def check(directory: Path) -> None:
    """Make a cache directory if necessary, and refuse one that others can write to.

    Workers of root share root's directory, so they do not count as others.

    Raises:
        CacheError: it cannot be made, written, or trusted.
    """
    try:
        make(directory)
        status = directory.stat()
    except OSError as error:
        raise CacheError(
            f"--cache-dir: {directory}: cannot be made: {error.strerror}; name another or 'none'"
        ) from error
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        raise CacheError(
            f"--cache-dir: {directory}: not writable; name another directory or 'none'"
        )
    if is_shared(status):
        return
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CacheError(
            f"--cache-dir: {directory}: other users could put bytes into it; "
            f"chown it to this user and chmod go-w"
        )


def check_disks(directories: Iterable[Path]) -> None:
    """Refuse to wait for a disk that hangs. For commands: no other thread may run.

    Raises:
        CacheError: a disk does not answer.
    """
    for directory in directories:
        if not in_child(partial(read_disk, directory)):
            raise CacheError(
                f"--cache-dir: {directory}: its disk does not answer; try again when it does"
            )


def read_disk(directory: Path) -> None:
    """Read from the disk of a cache, past the page cache, if there is something to read."""
    flags = os.O_RDONLY | os.O_DIRECT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with contextlib.suppress(OSError):  # there is no cache yet, or no direct I/O
        descriptor = os.open(directory / "cache.db", flags)
        try:
            os.preadv(descriptor, [mmap.mmap(-1, mmap.PAGESIZE)], 0)
        finally:
            os.close(descriptor)


def share_all(directories: Iterable[Path]) -> None:
    """Have workers of root share these directories, where this process is root's and can do that.

    Those that cannot be shared stay as they are.
    """
    if user.worker_ids() is not None:
        for directory in directories:
            with contextlib.suppress(OSError):
                share(directory)


def folder_mode(directory: Path) -> int:
    """The mode of new folders in a cache directory. Raises OSError."""
    return _SHARED if is_shared(directory.stat()) else 0o700


class UnusableError(PermissionError):
    """No worker can use the directory as a cache."""


def share(directory: Path) -> None:
    """Let workers of root share a directory, which is made if it is missing. Only root can do this.

    They also get the files of a cache that is already there. Other files are not touched, and users
    who could list the directory still can.

    Raises:
        UnusableError: it cannot be made, or others than root can write to it.
        OSError: a group uses it, or it keeps no groups and modes.
    """
    group = user.cache_group()
    if group is None:
        raise PermissionError(f"{directory}: this process cannot change groups")
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = directory.stat()
    except OSError as error:
        raise UnusableError(f"{directory}: {error.strerror}") from error
    if is_shared(status):
        return
    if status.st_uid != 0 or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnusableError(f"{directory}: is not a directory that only root can write to")
    if status.st_gid not in (0, group) and status.st_mode & stat.S_IRWXG:
        raise PermissionError(f"{directory}: is used by the group {status.st_gid}")
    # Until the last step, no other user can change anything here.
    for path in _content(directory):
        _give(path, group)
    os.chown(directory, -1, group)
    directory.chmod(_SHARED | status.st_mode & (stat.S_IROTH | stat.S_IXOTH))
    if not is_shared(directory.stat()):  # without CAP_FSETID the kernel drops a bit silently
        directory.chmod(stat.S_IMODE(status.st_mode))
        os.chown(directory, -1, status.st_gid)
        raise PermissionError(f"{directory}: group and mode cannot be set (needs CAP_FSETID)")


def _give(path: Path, group: int) -> None:
    """Have a group use a file or a folder. Raises OSError, also if it has become a link."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags)
    try:
        os.fchown(descriptor, -1, group)
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        os.fchmod(descriptor, _SHARED if is_folder else 0o660)
    finally:
        os.close(descriptor)


def _content(directory: Path) -> Iterator[Path]:
    """Files and folders of a cache (`cache/directory.py`), and nothing that links lead to."""
    for path in directory.iterdir():
        if path.is_symlink():
            continue
        if path.is_dir() and _FOLDER.fullmatch(path.name):
            blocks = (inner for inner in path.iterdir() if _BLOCK.fullmatch(inner.name))
            yield from (inner for inner in blocks if inner.is_file() and not inner.is_symlink())
            yield path
        elif path.is_file() and _FILE.fullmatch(path.name):
            yield path
