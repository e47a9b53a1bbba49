"""What this machine has, as far as this process may use it, and the limits that suit it.

A mount on a large machine needs more in flight than on a small one: what a link carries in the time
of one request (100 Gbit/s for 0.12 s are 1.5 GB), and as much again for what has come and waits for
the page cache, the disk or a reader.
"""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path
from typing import NamedTuple

# `--memory-limit auto`: bytes for each processor. Clouds give machines about 1 Gbit/s for each.
MEMORY_OF_PROCESSOR = 128 << 20
# The largest share of all memory, because there may be many mounts. Free memory does not count, so
# that each worker of a mount chooses the same limit.
MEMORY_SHARE = 0.025
LEAST_MEMORY, MOST_MEMORY = 256 << 20, 16 << 30
# By `--max-concurrency auto`.
LEAST_REQUESTS, MOST_REQUESTS = 64, 1024
OPEN_FILES = 8192  # for the most requests, see `process/descriptors.py`
# By `--movers auto`. Movers pay only where a third processor answers the kernel and a fourth is the
# reader's.
LEAST_PROCESSORS = 4
MOST_MOVERS = 96

_CGROUP_ROOT = Path("/sys/fs/cgroup")


class _MemoryFiles(NamedTuple):
    """The memory files of a cgroup, and a field of `memory.stat`."""

    limit: str
    used: str
    reclaimable: str


_VERSION_1 = _MemoryFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _MemoryFiles("memory.max", "memory.current", "inactive_file")


def auto_memory(
    block_size: int, processors: int | None = None, memory_bytes: int | None = None
) -> int:
    """Bytes for the blocks of one mount, on this machine or another one."""
    processors = processors or usable_processors()
    most = min(MOST_MEMORY, (memory_bytes or all_memory()) * MEMORY_SHARE)
    wanted = max(LEAST_MEMORY, min(most, MEMORY_OF_PROCESSOR * processors))
    return max(4 * block_size, int(wanted) // block_size * block_size)


def auto_requests(memory_bytes: int, block_size: int) -> int:
    """How many ranged GETs one mount may have in flight: as many as its memory has room for."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < OPEN_FILES:
        return LEAST_REQUESTS
    return max(LEAST_REQUESTS, min(MOST_REQUESTS, memory_bytes // block_size))


def auto_movers(processors: int | None = None) -> int:
    """How many processes may move the bytes of one mount, on this machine or another one."""
    processors = processors or usable_processors()
    return 0 if processors < LEAST_PROCESSORS else min(MOST_MOVERS, processors // 2)


def usable_processors() -> int:
    """Whole processors that this process may keep busy: by affinity, and by its cgroup's quota."""
    count = float(len(os.sched_getaffinity(0)))
    with contextlib.suppress(OSError, ValueError):  # version 2
        quota, period = (_CGROUP_ROOT / "cpu.max").read_text().split()
        count = min(count, int(quota) / int(period))
    with contextlib.suppress(OSError, ValueError):  # version 1
        quota_us = int((_CGROUP_ROOT / "cpu/cpu.cfs_quota_us").read_text())
        period_us = int((_CGROUP_ROOT / "cpu/cpu.cfs_period_us").read_text())
        if quota_us > 0:
            count = min(count, quota_us / period_us)
    return max(1, int(count))


def all_memory() -> int:
    """Bytes that this process can use at most: the machine's, or less if a cgroup limits us."""
    limits = [_number(group / files.limit) for group, files in _own_cgroups()]
    return min([_meminfo("MemTotal"), *(limit for limit in limits if limit is not None)])


def free_memory() -> int:
    """Bytes that can be used without swapping: the machine's, or less if a cgroup limits us."""
    free = _meminfo("MemAvailable")
    for group, files in _own_cgroups():
        limit, used = _number(group / files.limit), _number(group / files.used)
        if limit is not None and used is not None:
            free = min(free, limit - used + _reclaimable(group, files.reclaimable))
    return max(0, free)


def stat_of(task: Path) -> list[str]:
    """State, parent and so on of a process or thread; empty if there is none (proc(5), stat).

    Args:
        task: `/proc/PID` or `/proc/PID/task/TID`.
    """
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def processor_time_s(task: Path) -> float:
    """Processor time of a process or thread in seconds; 0 if there is none (proc(5), stat).

    Args:
        task: as of `stat_of`.
    """
    ticks = stat_of(task)[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _own_cgroups() -> list[tuple[Path, _MemoryFiles]]:
    """This process's cgroups and those above them, as far as they are visible."""
    groups = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, files = _CGROUP_ROOT, _VERSION_2
        elif "memory" in controllers.split(","):
            root, files = _CGROUP_ROOT / "memory", _VERSION_1
        else:
            continue
        group = root / path.lstrip("/")
        # In a container the path may be the host's, and the root has our limit.
        groups += [(group, files)]
        groups += [(above, files) for above in group.parents if above.is_relative_to(root)]
    return groups


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None  # not limited ("max"), or not visible


def _reclaimable(group: Path, field: str) -> int:
    """Bytes of the cgroup's page cache that were not used lately."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field} ")), 0)
