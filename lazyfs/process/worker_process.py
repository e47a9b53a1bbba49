"""Processes of workers: who serves, who started whom, and when one has really ended.

Only the standard library.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, Protocol

# A worker that was told to end, or whose mount ended, gets this long to finish what it does.
END_TIMEOUT_S = 8.0
POLL_S = 0.1
# Threads of a process that ends are usually gone by then, or wait for the next worker.
LAST_THREADS_S = 0.3
# Of a worker that says that the mount must be made anew.
EXIT_CANNOT_RESUME = 75


class HasFileno(Protocol):
    """What has a descriptor."""

    def fileno(self) -> int: ...


class StartedWorker(NamedTuple):
    """A worker that was started, and the connection over which it says how far it is."""

    process: subprocess.Popen[bytes]
    line: socket.socket


def start_worker(name: str, connection: socket.socket, leash: int | None = None) -> StartedWorker:
    """Start the process of a worker.

    Args:
        name: under which its mount is kept, which it asks for when it has loaded what it needs.
        connection: to the keeper.
        leash: the descriptor whose end is its end.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    passed = [connection.fileno(), theirs.fileno(), *([] if leash is None else [leash])]
    command = [sys.executable, "-P", "-m", "lazyfs.process.worker", name, *map(str, passed)]
    try:
        with theirs:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=passed, start_new_session=True,
                env=child_environment(),
            )  # fmt: skip
    except BaseException:
        ours.close()
        raise
    return StartedWorker(process, ours)


def child_environment() -> dict[str, str] | None:
    """The environment of a process that continues the present span; None: that of this one."""
    if "opentelemetry.sdk.trace" not in sys.modules:
        return None
    from lazyfs.observe import tracing

    return tracing.child_environment()


def read_report(descriptor: int, timeout_s: float) -> dict[str, Any] | None:
    """What a process that was started says of itself; empty if it ended, None if it says nothing.

    Args:
        descriptor: of a pipe; it is closed.
    """
    with open(descriptor) as reports:
        return json.loads(reports.read() or "{}") if is_readable(reports, timeout_s) else None


def is_readable(descriptor: HasFileno, timeout_s: float) -> bool:
    """Wait until there is something to read, or the other side has hung up; whether there is.

    By poll(2): select(2) knows no descriptors above 1023, and a node plugin has more.
    """
    watch = select.poll()
    watch.register(descriptor, select.POLLIN)
    return bool(watch.poll(max(0.0, timeout_s) * 1000))


def end_former(worker: int, name: str) -> None:
    """See that the worker of a supervisor that died serves no more, which its leash should do.

    Two workers would share what the kernel asks, and what the former took just before its end
    would be answered by nobody.
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
    """Whether that process is a worker of the mount of this name, and its first thread lives."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return os.fsencode(name) in words and _status(pid)[:1] not in ([], ["Z"])


def wait_for_end(worker: subprocess.Popen[bytes]) -> int:
    """Wait until a worker serves no more; its exit code.

    A killed process is only gone when all its threads are. One of them may be putting a page into
    the page cache that is locked for a read, which the worker has not answered and only the next
    one will. So the end of its first thread, which does the serving, must do.
    """
    while (code := worker.poll()) is None:
        if _status(worker.pid)[:1] == ["Z"]:
            # Nearly always the other threads end at once, and the code is known then.
            with contextlib.suppress(subprocess.TimeoutExpired):
                return worker.wait(LAST_THREADS_S)
            return -signal.SIGKILL
        time.sleep(POLL_S)
    return code


def end_within(worker: subprocess.Popen[bytes], timeout_s: float) -> int:
    """Wait for the end of a worker that is ending, and kill it if that takes long; its code."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return worker.wait(timeout_s)
    worker.kill()
    return wait_for_end(worker)


def was_told_to_end(code: int) -> bool:
    """Whether a worker with this exit code ended because somebody told it to (SIGTERM)."""
    return code in (0, -signal.SIGTERM)


def oom_kills() -> int:
    """How many processes of this machine were killed because memory ran out (proc(5), vmstat)."""
    try:
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass  # not to be seen here
    return 0


def parent_of(pid: int) -> int | None:
    """The process that started a process (proc(5)); None if there is no such process."""
    status = _status(pid)
    return int(status[1]) if status else None


def _status(pid: int) -> list[str]:
    """State, parent and so on of a process (proc(5), stat); empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def how_it_ended(code: int) -> str:
    """The exit code of a process, in words."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
