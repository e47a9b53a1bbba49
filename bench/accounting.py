"""Measures the costs of a run: processor time and memory of a mount, and requests of the kernel.

All figures come from the kernel and not from the contender, so they mean the same for each of them:

- Processor time is that of a control group (version 2) with all processes of a mount, including
  those that have ended. The kernel's own threads, which write back dirty pages, belong to no group
  and are not counted for any contender.
- Memory is the sum of the peaks of all processes (VmHWM), which is never less than the peak of the
  sum. It does not include the page cache.
- FUSE requests come from the trace event `fuse:fuse_request_send` (Linux 6.11), counted by
  connection and operation.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

_SENT = re.compile(r"fuse_request_send: connection (\d+) .*\(FUSE_(\w+)\)")
# Idle means less than a twentieth of a processor. Writes that a load delayed come after it.
_SAMPLE_S = 0.5
_IDLE_S = 2.5
# Upper limit of the memory of a contender, with the model twice in the page cache.
_TOUCHED = 6 << 30
# From madvise(2), Linux 5.14; the module mmap does not define it.
_MADV_POPULATE_WRITE = 23
_TRACE_BUFFER_KIB = 16 << 10  # for each processor; an event takes about 50 bytes


class Group:
    """A control group. It counts the processes that `enter` it, with their children.

    Attributes:
        path: its directory.
    """

    def __init__(self, name: str) -> None:
        self.path = _cgroup_root() / f"lazyfs-bench-{os.getpid()}-{name}"
        self.path.mkdir()

    def enter(self) -> None:
        """Add the calling process to the group; for `preexec_fn`."""
        (self.path / "cgroup.procs").write_text("0")

    def processes(self) -> list[int]:
        """PIDs of the processes that are alive."""
        return [int(line) for line in (self.path / "cgroup.procs").read_text().split()]

    def cpu_seconds(self) -> float:
        """User and system time of all processes that were ever in the group."""
        for line in (self.path / "cpu.stat").read_text().splitlines():
            if line.startswith("usage_usec"):
                return int(line.split()[1]) / 1e6
        raise SystemExit("bench: the control group counts no processor time")

    def peak_mib(self) -> float:
        """Sum of the peaks of resident memory of the processes that are alive."""
        return sum(_peak_mib(pid) for pid in self.processes())

    def close(self, patience_s: float = 10.0) -> None:
        """Remove the group after its processes have ended. Kill those that do not end.

        Raises:
            SystemExit: the contender left processes behind.
        """
        left = self._wait(patience_s)
        if left:
            (self.path / "cgroup.kill").write_text("1")
            self._wait(5)
        self._remove()
        if left and patience_s:
            raise SystemExit(f"bench: {self.path.name}: processes left behind: {left}")

    def _remove(self) -> None:
        """Remove the empty group. The threads of a process may end after it is listed no more."""
        deadline = time.monotonic() + 5
        while True:
            try:
                self.path.rmdir()
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            else:
                return

    def _wait(self, patience_s: float) -> list[int]:
        deadline = time.monotonic() + patience_s
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return left


def settle(counted: Group) -> None:
    """Wait until its processes are idle and stay so, after they have finished writing.

    Raises:
        SystemExit: they are still busy after a minute.
    """
    deadline, idle_since, before = time.monotonic() + 60, time.monotonic(), counted.cpu_seconds()
    while (now_s := time.monotonic()) < deadline:
        if now_s - idle_since >= _IDLE_S:
            return
        time.sleep(_SAMPLE_S)
        now = counted.cpu_seconds()
        if now - before >= _SAMPLE_S / 20:
            idle_since = time.monotonic()
        before = now
    raise SystemExit("bench: the mount's processes do not come to rest")


@contextlib.contextmanager
def group(name: str) -> Iterator[Group]:
    """A control group, which must be empty at the end of the `with` block."""
    made = Group(name)
    try:
        yield made
    except BaseException:
        made.close(patience_s=0)
        raise
    made.close()


class FuseRequests:
    """Counts the kernel's FUSE requests of all connections since `mark`."""

    def __init__(self, instance: Path) -> None:
        self._instance = instance

    def mark(self) -> None:
        """Start to count."""
        (self._instance / "trace").write_text("")

    def of(self, mountpoint: Path) -> Counter[str]:
        """Requests of one mount by operation, such as READ or LOOKUP."""
        connection = str(os.minor(device_of(mountpoint)))
        counts: Counter[str] = Counter()
        with open(self._instance / "trace") as lines:
            for line in lines:
                found = _SENT.search(line)
                if found and found[1] == connection:
                    counts[found[2]] += 1
        return counts


@contextlib.contextmanager
def fuse_requests(base: Path) -> Iterator[FuseRequests | None]:
    """Trace FUSE requests in the `with` block; None if the kernel has no such trace event.

    Args:
        base: a directory to mount tracefs in.
    """
    mounted = base / "trace"
    mounted.mkdir()
    answer = subprocess.run(["mount", "-t", "tracefs", "bench", mounted], capture_output=True)
    instance = mounted / "instances" / f"lazyfs-bench-{os.getpid()}"
    event = instance / "events" / "fuse" / "fuse_request_send" / "enable"
    try:
        if answer.returncode == 0:
            instance.mkdir()
        if not event.exists():
            print("bench: this kernel does not trace FUSE requests", file=sys.stderr)
            yield None
            return
        (instance / "buffer_size_kb").write_text(str(_TRACE_BUFFER_KIB))
        event.write_text("1")
        yield FuseRequests(instance)
    finally:
        if instance.exists():
            instance.rmdir()
        if answer.returncode == 0:
            subprocess.run(["umount", mounted], check=True)
        mounted.rmdir()


def end_in_order() -> None:
    """Turn SIGTERM, SIGINT and SIGHUP into an exception, so that all `with` blocks clean up.

    Only the first signal counts: another one must not interrupt the clean-up.
    """
    ends = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def end(number: int, frame: object) -> None:
        for each in ends:
            signal.signal(each, lambda number, frame: None)
        sys.exit(128 + number)

    for number in ends:
        signal.signal(number, end)


@contextlib.contextmanager
def workplace(prefix: str) -> Iterator[Path]:
    """A working directory for a bench. At the end, everything mounted in it is unmounted."""
    base = Path(tempfile.mkdtemp(prefix=prefix, dir="/var/tmp"))
    try:
        yield base
    finally:
        # In reverse order, because a mount may be inside another.
        for fields in reversed(_mounts()):
            if Path(fields[4]).is_relative_to(base):
                subprocess.run(["umount", "-l", fields[4]], check=False, timeout=60)
        shutil.rmtree(base)


def device_of(mountpoint: Path) -> int:
    """Device number of the filesystem at a mountpoint, without a request to that filesystem."""
    for fields in _mounts():
        if fields[4] == str(mountpoint):
            major, minor = fields[2].split(":")
            return os.makedev(int(major), int(minor))
    raise SystemExit(f"bench: nothing is mounted at {mountpoint}")


def is_mounted(mountpoint: Path) -> bool:
    """Whether something is mounted at a path."""
    return any(fields[4] == str(mountpoint) for fields in _mounts())


def keep_in_page_cache(directory: Path) -> None:
    """Read all files below a directory, so that their server does not have to wait for the disk."""
    buffer = bytearray(1 << 20)
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def drop_page_cache(directory: Path) -> None:
    """Drop all files below a directory from the page cache, after they are on disk."""
    os.sync()
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def touch_memory() -> None:
    """Use much of the free memory and free it, so that it is available to the next measurement.

    A virtual machine gets memory from its host only when it uses it, which takes a second or more
    for each GiB. If the kernel reports free pages to the host, they are gone again seconds later.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    count = os.cpu_count() or 1
    size = min(_TOUCHED, free * 9 // 10) // count
    code = f"import mmap; mmap.mmap(-1, {size}, mmap.MAP_PRIVATE).madvise({_MADV_POPULATE_WRITE})"
    at_work = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]
    try:
        for process in at_work:
            if process.wait(timeout=300) != 0:
                raise SystemExit("bench: memory could not be touched")
    finally:
        for process in at_work:
            process.kill()
            process.wait()


def fill_page_cache(file: Path) -> None:
    """Fill most of the page cache with what nobody needs: the holes of a sparse file.

    Unlike what `touch_memory` touches, it is not free, and stays with the virtual machine until a
    load takes its place. That is for loads that need more memory than this.

    Args:
        file: made if it is missing; as large as the memory.
    """
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with open(file, "a+b", buffering=0) as holes:
        holes.truncate(size)
    keep_in_page_cache(file.parent)


def _mounts() -> list[list[str]]:
    """Fields of each line of mountinfo (proc_pid_mountinfo(5))."""
    return [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]


def _cgroup_root() -> Path:
    for fields in _mounts():
        if fields[fields.index("-") + 1] == "cgroup2":
            return Path(fields[4])
    raise SystemExit("bench: processor time is counted by control groups, version 2, which are "
                     "not mounted here: mount -t cgroup2 none /sys/fs/cgroup")  # fmt: skip


def _peak_mib(pid: int) -> float:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    return 0.0
