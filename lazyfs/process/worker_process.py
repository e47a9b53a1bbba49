"""Processes of workers: starts them, ends them, and waits for their end.

Uses only the standard library.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lazyfs.machine import stat_of
from lazyfs.process.privileges import WorkerUser, protect_from_oom, start

# A worker that has neither become ready nor failed by then is given up.
READY_TIMEOUT_S = 120.0
# Time for a worker to finish after it was told to end, or its mount ended.
END_TIMEOUT_S = 8.0
POLL_S = 0.1
# By then, threads of an ending process are usually gone, or wait for the next worker.
LAST_THREADS_S = 0.3
# Pauses between the death of a worker and the next one, while readers wait: they double, up to the
# longest. Where workers do not become ready, they grow further with the time for which none did.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 1.0
LONGEST_PAUSE_UNREADY_S, PAUSE_SHARE, LONGEST_PAUSE_EVER_S = 4.0, 1 / 10, 30.0
# Exit code of a worker that cannot resume, so that the source must be mounted again.
EXIT_CANNOT_RESUME = 75


class HasFileno(Protocol):
    """An object with a descriptor."""

    def fileno(self) -> int: ...


class StartedWorker(NamedTuple):
    """A started worker, and the connection on which it reports its progress."""

    process: subprocess.Popen[bytes]
    channel: socket.socket


def start_worker(
    name: str,
    connection: socket.socket,
    user: WorkerUser,
    leash: int | None = None,
    restarts: int = 0,
) -> StartedWorker:
    """Start the process of a worker.

    Args:
        name: the name of its mount in the keeper.
        connection: to the keeper.
        user: the user that it runs as.
        leash: a pipe's descriptor; the worker ends when the other end is closed.
        restarts: how many workers died before it.

    Raises:
        OSError: it cannot be started.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    passed = [connection.fileno(), theirs.fileno(), *([] if leash is None else [leash])]
    numbers = [os.geteuid(), os.getegid(), restarts, *passed]
    command = [sys.executable, "-P", "-m", "lazyfs.process.worker", name, *map(str, numbers)]
    log = _own_log()
    try:
        with theirs:
            process = start(
                command, user, descriptors=passed, environment=child_environment(),
                outputs=(subprocess.DEVNULL, log, log),
            )  # fmt: skip
    except BaseException:
        ours.close()
        raise
    finally:
        if log is not None:
            os.close(log)
    protect_from_oom(process.pid)
    return StartedWorker(process, ours)


def _own_log() -> int | None:
    """The log for a worker, opened once more if it is a file; None: it inherits this one.

    A write that waits for a disk locks the position of its open file (lseek(2)), and Python asks
    for the position of its standard error before it begins. Without O_APPEND, two positions would
    have lines overwrite each other.
    """
    try:
        appends = fcntl.fcntl(2, fcntl.F_GETFL) & os.O_APPEND
        if appends and stat.S_ISREG(os.fstat(2).st_mode):
            return os.open("/proc/self/fd/2", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    except OSError:
        pass  # it is closed, or cannot be opened again
    return None


def child_environment() -> dict[str, str] | None:
    """The environment for a process that continues the present span; None: this process's."""
    if "opentelemetry.sdk.trace" not in sys.modules:
        return None
    from lazyfs.observe import tracing

    return tracing.child_environment()


def read_report(descriptor: int, timeout_s: float) -> dict[str, Any] | None:
    """The report of a started process; empty if it ended, None after the timeout.

    Args:
        descriptor: of a pipe; closed here.
    """
    with open(descriptor) as reports:
        return json.loads(reports.read() or "{}") if is_readable(reports, timeout_s) else None


def is_readable(descriptor: HasFileno, timeout_s: float) -> bool:
    """Wait until there is data to read, or the peer has hung up; False after the timeout.

    It uses poll(2), because select(2) supports no descriptors above 1023, and a node plugin has
    more.
    """
    watch = select.poll()
    watch.register(descriptor, select.POLLIN)
    return bool(watch.poll(max(0.0, timeout_s) * 1000))


def end_former(worker: int, name: str) -> None:
    """Ensure that the worker of a dead supervisor has ended, as its leash should have done.

    Two workers would share the kernel's requests, and those that the former one took just before
    its end would never be answered.
    """
    began = time.monotonic()
    while serves(worker, name):
        if time.monotonic() - began > END_TIMEOUT_S:
            send(worker, signal.SIGKILL)
        time.sleep(POLL_S)


def send(pid: int, number: signal.Signals) -> None:
    """Send a process a signal, unless it has just ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def serves(pid: int, name: str) -> bool:
    """Whether the process is a worker of the mount of this name, and its first thread may run."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return os.fsencode(name) in words and not is_over(pid)


def is_over(pid: int) -> bool:
    """Whether the first thread of a process has ended, or was killed and never runs again.

    A thread that waits for a disk (state D) ends only when that answers, even if it was killed.
    """
    status = _status(pid)
    if status[:1] != ["D"]:
        return status[:1] in ([], ["Z"], ["X"])
    return bool(int(_field(pid, "SigPnd") or "0", 16) & 1 << signal.SIGKILL - 1)


def stuck_of(worker: int) -> list[str]:
    """A line for each process of a worker that has ended which waits for a disk.

    Movers are processes of a worker, too: all of them have its session id.
    """
    stuck = _waiting_of(worker)
    if stuck:
        time.sleep(LAST_THREADS_S)
        stuck &= _waiting_of(worker)
    return [
        f"process {pid} waits for a disk and cannot be killed; it ends when the disk answers"
        for pid in sorted(stuck)
    ]


def _waiting_of(worker: int) -> set[int]:
    """The processes of a worker's session with a thread that waits in the kernel (state D)."""
    processes = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
    ours = (pid for pid in processes if _status(pid)[3:4] == [str(worker)])
    return {
        pid
        for pid in ours
        if any(stat_of(task)[:1] == ["D"] for task in Path(f"/proc/{pid}/task").glob("*"))
    }


def wait_for_end(worker: subprocess.Popen[bytes]) -> int:
    """Wait until a worker no longer serves; returns its exit code.

    A killed process is only gone when all its threads are. One of them may be pushing a page that
    is locked for a read that the worker has not answered, and only the next worker will. So this
    waits only for the end of the first thread, which answers requests (`is_over`).
    """
    with _watched(worker.pid) as process:
        while (code := worker.poll()) is None:
            if is_over(worker.pid):
                # Nearly always the other threads end at once, and then the code is known.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return worker.wait(LAST_THREADS_S)
                return _code_of_last(worker.pid)
            process.poll(POLL_S * 1000)
    return code


def _code_of_last(pid: int) -> int:
    """The exit code of a process with a thread that has not ended, as far as it can be known."""
    try:
        Path(f"/proc/{pid}/exe").readlink()
    except PermissionError:
        return -signal.SIGKILL  # the kernel says 0 to whoever may not look into the process
    except OSError:
        pass  # it has no memory any more
    status = _status(pid)
    is_known = status[:1] == ["Z"]
    return os.waitstatus_to_exitcode(int(status[49])) if is_known else -signal.SIGKILL


@contextlib.contextmanager
def _watched(pid: int) -> Iterator[select.poll]:
    """A poll(2) that returns at once when all threads of a process have ended."""
    watch = select.poll()
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:  # it has just ended, or no descriptor is free: only the timeout ends a wait
        yield watch
        return
    try:
        watch.register(descriptor, select.POLLIN)
        yield watch
    finally:
        os.close(descriptor)


def end_within(worker: subprocess.Popen[bytes], timeout_s: float) -> int:
    """Wait for an ending worker, and kill it after the timeout; returns its exit code."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return worker.wait(timeout_s)
    worker.kill()
    return wait_for_end(worker)


def was_told_to_end(code: int) -> bool:
    """Whether a worker with this exit code was told to end (SIGTERM)."""
    return code in (0, -signal.SIGTERM)


def next_pause_s(before_s: float, unready_s: float | None) -> float:
    """The pause before the worker after the next death.

    Args:
        before_s: the pause before the last worker.
        unready_s: for how long no worker has become ready; None: the last one did, or it was killed
            from outside.
    """
    longest_s = LONGEST_PAUSE_S
    if unready_s is not None:
        longest_s = max(LONGEST_PAUSE_UNREADY_S, unready_s * PAUSE_SHARE)
    return min(max(FIRST_PAUSE_S, 2 * before_s), longest_s, LONGEST_PAUSE_EVER_S)


def oom_kills() -> int:
    """How many processes of this machine were killed for lack of memory (proc(5), vmstat)."""
    try:
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass  # not visible here
    return 0


def parent_of(pid: int) -> int | None:
    """The process that started a process (proc(5)); None if there is no such process."""
    status = _status(pid)
    return int(status[1]) if status else None


def _status(pid: int) -> list[str]:
    """The state, parent and so on of a process; see `stat_of`."""
    return stat_of(Path(f"/proc/{pid}"))


def _field(pid: int, name: str) -> str | None:
    """A field of the status of a process's first thread (proc(5), status)."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/task/{pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return line.partition(":")[2].strip()
    return None


def how_it_ended(code: int) -> str:
    """The exit code of a process, in words."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
