"""Which users can put bytes into a cache that others read: none, whoever owns it."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from lazyfs import cache_place, user
from lazyfs.cache import BlockCache
from lazyfs.cache.block_format import checksum
from lazyfs.cache.space import Limits
from lazyfs.errors import CacheError
from lazyfs.listed_object import File

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or user.worker_ids() is None, reason="needs users to play"
)
OWNER, OTHER, COMMON = 51001, 51002, 51003
BLOCK = 256 << 10
FILE = File(7, 1, "w", "m/w", BLOCK, '"1"', 0)


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that all users can reach."""
    path = Path(tempfile.mkdtemp(prefix="lazyfs-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def as_user(uid: int, groups: Sequence[int], action: Callable[[], str]) -> str:
    """What an action returns in a process of that user."""
    checksum(b"")  # imports what the user could not, where only root can read this directory
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups(groups)
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            os.write(theirs, action().encode())
        except BaseException:
            os.write(theirs, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with open(ours) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return text


def put(directory: Path) -> str:
    """Put a block into a cache, as a mount does."""
    cache = BlockCache([directory], Limits(1 << 30), "http://s3", "b", BLOCK)
    try:
        cache.open()
    except CacheError as error:
        return str(error)
    return f"put: {cache.put(FILE, 0, b'x' * BLOCK)}"


def put_as_worker(directory: Path) -> str:
    """The same by a worker of root."""
    user.works_for(0, 0, os.getgroups()[0])
    os.umask(0o007)
    return put(directory)


def plant(folders: Sequence[Path], files: Sequence[Path]) -> str:
    """What a user can change in a cache or read of it."""
    done = []
    for folder in folders:
        with contextlib.suppress(OSError):
            (folder / "planted").touch()
            done.append(f"made a file in {folder}")
    for file in files:
        for flags in (os.O_WRONLY, os.O_RDONLY):
            with contextlib.suppress(OSError):
                os.close(os.open(file, flags))
                done.append(f"opened {file} with {flags}")
    for path in (*files, *folders):
        with contextlib.suppress(OSError):
            path.rename(path.with_name("renamed"))
            done.append(f"renamed {path}")
    return "; ".join(done)


def tried_by_others(directory: Path) -> str:
    """What another user can do who is in all groups that accounts of this machine have."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    folders = [directory, *(path for path in directory.rglob("*") if path.is_dir())]
    assert {"cache.db", "cache.db-wal"} <= {path.name for path in files}
    assert any(len(path.name) == 30 for path in files), "a block"
    groups = {0, OWNER, COMMON, *(each.gr_gid for each in grp.getgrall())}
    groups |= {each.pw_gid for each in pwd.getpwall()}
    return as_user(OTHER, sorted(groups), lambda: plant(folders, files))


def test_root_shares_its_cache_with_its_workers_alone(place: Path) -> None:
    """Files have 0660 below a group that no account has."""
    cache, group = place / "cache", user.cache_group()
    assert group is not None
    cache_place.share(cache)
    worker = group - 5
    assert as_user(worker, [group], lambda: put_as_worker(cache)) == "put: True"
    assert as_user(worker - 1, [group], lambda: put_as_worker(cache)) == "put: True"
    assert tried_by_others(cache) == ""
    assert "not writable" in as_user(OTHER, [0, COMMON], lambda: put(cache))
    for path in cache.rglob("*"):
        assert (path.stat().st_mode & 0o007, path.stat().st_gid) == (0, group)


COMMAND = """
import os, sys
from lazyfs.cli import caching
caching._opened({"cache_dir": sys.argv[1]})
print(len({*os.getresuid(), *os.getresgid()}), os.getuid(), *os.getgroups())
"""


def opened_by_command(cache: Path) -> list[int]:
    """How many ids a command has that has opened a cache, its user, and its groups."""
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, cache], capture_output=True, text=True, timeout=60,
        check=True,
    )  # fmt: skip
    return [int(word) for word in done.stdout.split()]


@pytest.mark.usefixtures("for_all")
def test_a_command_of_root_opens_a_shared_cache_as_a_worker_does(place: Path) -> None:
    """Links that a worker left there lead it to nothing that is root's."""
    cache, group = place / "cache", user.cache_group()
    assert group is not None
    cache_place.share(cache)
    assert as_user(group - 5, [group], lambda: put_as_worker(cache)) == "put: True"
    ids, uid, *groups = opened_by_command(cache)
    assert (ids, groups) == (1, [group]) and 0 < uid < group
    lazyfs = [sys.executable, "-m", "lazyfs", "cache"]
    for words in (["verify"], ["clear"]):
        subprocess.run([*lazyfs, *words, f"--cache-dir={cache}"], check=True, timeout=60)
    assert [path for path in cache.rglob("*") if len(path.name) == 30] == []
    assert as_user(group - 6, [group], lambda: put_as_worker(cache)) == "put: True"
    place.chmod(0o700)  # a worker could not reach it without a capability
    assert opened_by_command(cache)[1] == 0


def test_a_user_shares_a_cache_with_nobody(place: Path) -> None:
    cache = place / "cache"
    cache.mkdir()
    os.chown(cache, OWNER, COMMON)
    cache.chmod(0o755)
    assert as_user(OWNER, [COMMON], lambda: put(cache)) == "put: True"
    for path in cache.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    assert tried_by_others(cache) == ""
    assert "not writable" in as_user(OTHER, [COMMON], lambda: put(cache))


@pytest.mark.parametrize("owner", [0, OWNER])
@pytest.mark.parametrize("mode", [0o775, 0o2770, 0o777, 0o1777])
def test_a_directory_that_two_users_can_write_to_is_no_cache(
    place: Path, owner: int, mode: int
) -> None:
    """Also if they want it so: each could plant blocks that the other one reads."""
    cache = place / "cache"
    cache.mkdir()
    os.chown(cache, owner, COMMON)
    cache.chmod(mode)
    for uid in (OWNER, OTHER):
        assert "other users could put bytes into it" in as_user(uid, [COMMON], lambda: put(cache))
    assert list(cache.iterdir()) == []
    with pytest.raises(cache_place.UnusableError):
        cache_place.share(cache)
