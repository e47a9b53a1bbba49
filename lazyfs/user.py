"""The user that this process works for, and those that root gives its workers.

A worker of root runs as a user of its own (`process/privileges.py`), but files, paths and defaults
are those of root. What such workers share belongs to a group that only they have. Uses only the
standard library.
"""

from __future__ import annotations

import os
from pathlib import Path

# linux/capability.h
SETGID, SETUID = 1 << 6, 1 << 7
# Ids that are otherwise unused (https://systemd.io/UIDS-GIDS/). Where only a part of all ids
# exists, as in a user namespace: ids that systemd assigns to services dynamically.
_RANGES = ((0x70000000, 1 << 28), (61184, 4336))

# User, group, and the group of shared caches.
_works_for: tuple[int, int, int | None] | None = None


def uid() -> int:
    """The user id; that of this process, unless `works_for` named another one."""
    return _works_for[0] if _works_for else os.geteuid()


def gid() -> int:
    """The group id; the same."""
    return _works_for[1] if _works_for else os.getegid()


def cache_group() -> int | None:
    """The group of caches that workers of root share; None: there is no such group."""
    if _works_for:
        return _works_for[2]
    ids = worker_ids()
    return None if ids is None else sum(ids) - 1


def works_for(uid: int, gid: int, cache_group: int | None) -> None:
    """Name the user that this process works for."""
    global _works_for
    _works_for = uid, gid, cache_group


def is_worker_of_another() -> bool:
    """Whether this process has another user than the one that it works for."""
    return _works_for is not None


def worker_ids() -> tuple[int, int] | None:
    """The first and the number of the ids that workers get; the last is the group of caches.

    None: this process cannot give workers other ids than its own.
    """
    needed = SETUID | SETGID
    if os.geteuid() != 0 or held_capabilities() & needed != needed:
        return None
    return next((ids for ids in _RANGES if _exist("uid", *ids) and _exist("gid", *ids)), None)


def held_capabilities() -> int:
    """The permitted capabilities of this thread, as a mask (capabilities(7))."""
    for line in Path("/proc/thread-self/status").read_text().splitlines():
        if line.startswith("CapPrm:"):
            return int(line.split()[1], 16)
    return 0


def _exist(kind: str, first: int, count: int) -> bool:
    """Whether the user namespace has these ids (user_namespaces(7))."""
    for line in Path(f"/proc/self/{kind}_map").read_text().splitlines():
        begin, _, length = map(int, line.split())
        if begin <= first and first + count <= begin + length:
            return True
    return False
