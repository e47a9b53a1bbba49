"""Decides which rights a worker needs for the files that it uses.

A worker of root runs as another user. It reads the installation, the block cache, and the files
that botocore reads: configuration, credentials, tokens, certificates. If every user can read all of
them, the worker needs no rights of root. Otherwise it gets one capability: to read all files.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import lazyfs
from lazyfs import cache_place, user
from lazyfs.process.privileges import Rights, worker_user

if TYPE_CHECKING:
    from lazyfs.options.mount_options import MountOptions
    from lazyfs.process.mount_spec import MountSpec

# Variables of botocore (botocore/configprovider.py); these may name programs and further files.
_CONFIGURATION = {
    "AWS_CONFIG_FILE": "~/.aws/config",
    "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials",
}
_OTHER_FILES = (
    "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "AWS_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE",
)  # fmt: skip


def prepare_cache(cache: Iterable[Path]) -> bool:
    """Let workers of root share the directories of a cache; returns whether they can."""
    try:
        for directory in cache:
            cache_place.share(directory)
    except cache_place.UnusableError:
        return False  # the cache is refused later, with a reason
    except OSError as error:
        import logging

        logging.getLogger(__name__).warning("the worker runs as root: %s", error)
        return False
    return True


def become_worker(cache: Sequence[Path]) -> None:
    """Let this command of root go on as a user like a worker's, if that suffices for its caches.

    A worker that was taken over can put links and a forged index into a cache that workers share.
    Root would follow and change what they lead to; such a user cannot. The whole process changes.
    """
    if user.worker_ids() is None or not all(path.is_dir() for path in cache):
        return
    is_open = all(map(is_open_to_all, _installation())) and all(map(_is_reachable, cache))
    if not is_open or not all(cache_place.is_shared(path.stat()) for path in cache):
        return
    given = worker_user(Rights.NONE)
    if given.uid is None or given.group is None:
        return
    os.setgroups([given.group])
    os.setresgid(given.uid, given.uid, given.uid)
    os.setresuid(given.uid, given.uid, given.uid)
    user.works_for(0, 0, given.group)
    os.umask(0o007)


def rights_of(spec: MountSpec, options: MountOptions, *, cache_answers: bool) -> Rights:
    """What the worker of a mount needs; also prepares the directories of its cache.

    Args:
        spec: what is mounted.
        options: its options.
        cache_answers: the disk of the cache does not hang (`patience.py`). If it does, the worker
            uses it later, if it is prepared already.
    """
    cache = cache_place.directories(options.cache_dir)
    if not cache_answers:
        cache = tuple(map(_above_disk, cache))
    if user.worker_ids() is None or (cache_answers and not prepare_cache(cache)):
        return Rights.USER
    is_given = spec.credentials is not None or options.no_sign_request
    return rights_for(cache, uses_own_credentials=not is_given, ca_bundle=options.ca_bundle)


def rights_for(
    cache: Iterable[Path], *, uses_own_credentials: bool, ca_bundle: Path | None = None
) -> Rights:
    """What a worker of root needs for its files.

    Args:
        cache: the directories of its cache.
        uses_own_credentials: botocore finds credentials, because none are given.
        ca_bundle: the certificates that its options name.
    """
    configuration = _configuration()
    if uses_own_credentials and any(path.exists() for path in configuration):
        return Rights.READ_ALL_FILES
    files = [*_installation(), *configuration, *([ca_bundle] if ca_bundle else [])]
    files += [Path(name) for variable in _OTHER_FILES if (name := os.environ.get(variable))]
    is_open = all(map(is_open_to_all, files)) and all(map(_is_reachable, cache))
    return Rights.NONE if is_open else Rights.READ_ALL_FILES


def is_open_to_all(path: Path) -> bool:
    """Whether every user can read a file, or list a directory. True if there is none."""
    needed = stat.S_IROTH
    for real in {path, Path(os.path.realpath(path))}:
        try:
            mode = real.stat().st_mode
        except OSError:
            continue
        if stat.S_ISDIR(mode):
            needed |= stat.S_IXOTH
        if mode & needed != needed or not _is_reachable(real):
            return False
    return True


def _is_reachable(path: Path) -> bool:
    """Whether every user can access the directories above a path."""
    for parent in path.parents:
        try:
            if not parent.stat().st_mode & stat.S_IXOTH:
                return False
        except OSError:
            continue  # it does not exist yet
    return True


def _above_disk(path: Path) -> Path:
    """A path in the directory at which the filesystem of a path is mounted, of the same name."""
    from lazyfs.fuse.mount_syscalls import mounts  # only for a disk that hangs

    points = {entry.mountpoint for entry in mounts()}
    if path in points:
        return path
    # In a chroot, no mountpoint may be visible.
    above = next((parent for parent in path.parents if parent in points), Path(path.anchor))
    return above / path.name


def _configuration() -> list[Path]:
    names = (os.environ.get(variable, usual) for variable, usual in _CONFIGURATION.items())
    return [Path(name).expanduser() for name in names]


def _installation() -> Iterator[Path]:
    yield Path(sys.executable)
    yield Path(__file__)
    yield Path(lazyfs.__path__[0])
    yield from (Path(name) for name in sys.path if name and Path(name).is_dir())
