"""Mounts for tests, by the command line, as a user makes them.

A mount is only ever read from other processes than its daemon, each with a timeout.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from s3 import CREDENTIALS

from lazyfs.cli import mounts
from lazyfs.cli.unmounting import unmount
from lazyfs.errors import MountError
from lazyfs.process.mount_records import record_of

TIMEOUT_S = 120  # only a hang takes that long
# linux/sched.h: forked, and nothing executed since.
PF_FORKNOEXEC = 0x40
# Of this run alone; short, because sockets are in it.
RUNTIME_DIRECTORY = tempfile.mkdtemp(prefix="lazyfs-")
atexit.register(shutil.rmtree, RUNTIME_DIRECTORY)
os.environ["LAZYFS_RUNTIME_DIR"] = RUNTIME_DIRECTORY  # for what this process asks of daemons


@contextlib.contextmanager
def tmpfs(path: Path, size: str) -> Iterator[Path]:
    """A disk that is full soon; needs root.

    Args:
        size: as the option of tmpfs(5), such as `20m`.
    """
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


@contextlib.contextmanager
def fusectl(path: Path) -> Iterator[Path]:
    """Where the kernel tells of FUSE connections, by minor numbers of mounts; needs root."""
    path.mkdir()
    subprocess.run(["mount", "-t", "fusectl", "none", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def environment(**more: str) -> dict[str, str]:
    """What lazyfs runs with in tests: nothing of the developer's own AWS set-up."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "LAZYFS_"))}
    kept["LAZYFS_RUNTIME_DIR"] = RUNTIME_DIRECTORY
    if "TEST_MOVERS" in os.environ:
        kept["LAZYFS_MOVERS"] = os.environ["TEST_MOVERS"]
    nowhere = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/nonexistent"}
    return {**kept, **nowhere, "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent", **CREDENTIALS, **more}


def lazyfs(
    *arguments: object, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    return subprocess.run(
        [sys.executable, "-m", "lazyfs", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=env or environment(),
        check=False,
    )


def python(code: str, *arguments: object, timeout_s: float = TIMEOUT_S) -> str:
    """Run a piece of Python in a process of its own; its output."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=True,
    ).stdout


def shell(
    command: str, cwd: Path, timeout_s: float = TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    """Run a shell command in a directory."""
    return subprocess.run(
        ["bash", "-c", command],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def wait_for_log(log: Callable[[], str], text: str, times: int = 1) -> None:
    """Wait until a log contains a text so many times: a thread of the daemon writes it."""
    deadline = time.monotonic() + TIMEOUT_S
    while (now := log()).count(text) < times:
        assert time.monotonic() < deadline, f"{text!r} is not {times} times in:\n{now}"
        time.sleep(0.02)


class Mounted:
    """A mount that stands; `end` takes it down and checks that nothing is left."""

    def __init__(self, source: str, path: Path, cache: Path, endpoint: str, *options: str) -> None:
        self.path = path
        self.log_file = path.with_name(f"{path.name}.log")
        self.arguments = [
            f"--endpoint-url={endpoint}",
            f"--cache-dir={cache}",
            f"--log-file={self.log_file}",
            *options,
        ]
        path.mkdir(exist_ok=True)
        answer = lazyfs("mount", source, path, *self.arguments)
        assert answer.returncode == 0, answer.stderr + self.log()
        assert answer.stderr == ""
        self.pid = supervisor_pid(path)

    @property
    def worker(self) -> int:
        """The process that serves it now."""
        return worker_pid(self.path)

    def status(self) -> dict[str, Any]:
        """What `lazyfs status --json` prints."""
        return status_of(self.path)

    def log(self) -> str:
        """What the daemon logged."""
        return self.log_file.read_text() if self.log_file.exists() else ""

    def wait_for_log(self, text: str, times: int = 1) -> None:
        """Wait until the log contains a text so many times."""
        wait_for_log(self.log, text, times)

    def kill(self, number: signal.Signals) -> None:
        """Send its supervisor a signal."""
        os.kill(self.pid, number)

    def kill_all(self) -> None:
        """Kill its supervisor, then its worker, and wait until both are gone."""
        for pid in (self.pid, self.worker):
            os.kill(pid, signal.SIGKILL)
            wait_until_gone(pid)

    def end(self) -> None:
        """Unmount, by force if that must be, and see that the daemon is gone."""
        if is_mounted(self.path):
            try:
                unmount(self.path, lazy=False, force=False)
            except MountError:
                if is_mounted(self.path):
                    os.kill(self.pid, signal.SIGKILL)
                    os.kill(self.worker, signal.SIGKILL)
                    lazyfs("umount", "--lazy", self.path)
                    raise
        assert not is_mounted(self.path)
        # On a busy machine longer than the command line waits for it.
        wait_until_gone(self.pid, TIMEOUT_S)


def status_of(mountpoint: Path) -> dict[str, Any]:
    """What `lazyfs status --json` prints, without the time that a command takes to start."""
    record = record_of(mountpoint)
    assert record is not None, f"no daemon serves {mountpoint}"
    return mounts.status_of(record)


def is_mounted(path: Path) -> bool:
    """Whether something is mounted there."""
    return any(line.split()[4] == str(path) for line in open("/proc/self/mountinfo"))


def workers() -> Iterator[tuple[int, list[str]]]:
    """Process id and command line of each process that serves a mount of this machine."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                fields = _stat(int(process.name))
            except OSError:
                continue
            # A probe of the source has its worker's command line, from which it was forked.
            is_copy = int(fields[6]) & PF_FORKNOEXEC
            if "lazyfs.process.worker" in words and not is_copy and fields[0] != "Z":
                yield int(process.name), words


def worker_pid(path: Path) -> int:
    """The worker that serves a mount, found as anyone can find it."""
    for pid, words in workers():
        if str(path) in words:
            return pid
    raise AssertionError(f"no worker for {path}")


def supervisor_pid(path: Path) -> int:
    """The process that looks after the worker of a mount."""
    return int(_stat(worker_pid(path))[1])


def wait_until_gone(pid: int, timeout_s: float = 60) -> None:
    """Wait for the end of a process that is not our child."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if _stat(pid)[0] == "Z":  # ended; whoever is its parent has not looked yet
                return
        except OSError:
            return
        assert time.monotonic() < deadline, f"process {pid} did not end"
        time.sleep(0.02)


def _stat(pid: int) -> list[str]:
    """What /proc says of a process, after its name (proc_pid_stat(5)); OSError if it is gone."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


_DROPPED = """
import pathlib, sys
from lazyfs.pagecache.mincore import dropped
path, block = pathlib.Path(sys.argv[1]), int(sys.argv[2])
status = path.stat()
parts = [(at, min(block, status.st_size - at)) for at in range(0, status.st_size, block)]
print(len(dropped(path.parent, path.name, status.st_ino, parts)))
"""


def dropped_blocks(path: Path, block_size: int) -> int:
    """Of how many blocks of a file the kernel has dropped pages, which it may do at any time."""
    return int(python(_DROPPED, path, block_size))


def descriptors(pid: int) -> int:
    """How many descriptors a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def peak_mib(pid: int) -> float:
    """The most memory that a process had resident."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(
        int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")
    )


def load_json(text: str) -> object:
    """The last line of a program's output, as JSON."""
    return json.loads(text.strip().splitlines()[-1])
