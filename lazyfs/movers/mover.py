"""A mover as its worker sees it: a process, and a line to each of its threads."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lazyfs.machine import processor_time_s, stat_of
from lazyfs.movers.call import Line

# A call that its task has left, and so is to end, takes no longer in a mover that is well.
SILENT_S = 0.5
# Prefixes of environment variables that movers inherit. Other variables may contain keys.
_PASSED_ON = ("PATH", "PYTHON", "LD_", "LANG", "LC_", "TZ", "OPENSSL_")


class MoverLine(Line):
    """A line to a thread of a mover.

    Attributes:
        mover: whose thread it is.
        parts: how many things its present call does at once.
    """

    __slots__ = ("mover", "parts")

    def __init__(self, mover: Mover, channel: socket.socket) -> None:
        super().__init__(channel)
        self.mover = mover
        self.parts = 1


@dataclass(slots=True, eq=False)
class Mover:
    """A mover.

    Attributes:
        process: the process.
        control: the socket over which it gets lines.
        idle: its lines without a call.
        busy: how many things its calls do at once.
        left: its calls that their tasks have left, and when.
        was_stopped: it was, when it was looked at last.
        used_s: its processor time then, in seconds.
    """

    process: subprocess.Popen[bytes]
    control: socket.socket
    idle: list[MoverLine] = field(default_factory=list)
    busy: int = 0
    left: dict[MoverLine, float] = field(default_factory=dict)
    was_stopped: bool = False
    used_s: float = 0.0

    def is_silent(self, for_s: float = SILENT_S) -> bool:
        """Whether it has not ended, for this long, a call that its task has left."""
        return time.monotonic() - min(self.left.values(), default=math.inf) > for_s

    def add_line(self) -> None:
        """Open a line to a new thread of it, which is idle. Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                socket.send_fds(self.control, [b"line"], [theirs.fileno()])
        except OSError:
            ours.close()
            raise
        self.idle.append(MoverLine(self, ours))

    @property
    def processor_s(self) -> float:
        """Its processor time in seconds; of one that has ended, as it was last read."""
        if self.process.returncode is None:  # else another process may have its number
            now_s = processor_time_s(Path(f"/proc/{self.process.pid}"))
            self.used_s = max(self.used_s, now_s)
        return self.used_s

    @property
    def is_stopped(self) -> bool:
        """Whether a signal has stopped it."""
        return stat_of(Path(f"/proc/{self.process.pid}"))[:1] == ["T"]

    def end(self) -> None:
        """End it without waiting for it: it may be waiting in the kernel."""
        for line in self.idle:
            line.close()
        self.control.close()
        self.process.kill()
        with contextlib.suppress(RuntimeError):  # no more threads are allowed: it stays a zombie
            threading.Thread(target=self.process.wait, name="end of a mover", daemon=True).start()


def start_mover(arena: int, lent: Mapping[str, int]) -> Mover:
    """A mover that is ready. Raises OSError, EOFError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with theirs:
            # Descriptors keep their numbers, which are named in the arguments.
            passed = {"control": theirs.fileno(), "arena": arena, **lent}
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "lazyfs.movers.process", json.dumps(passed)],
                pass_fds=list(passed.values()),
                stdin=subprocess.DEVNULL,
                cwd="/",
                env={k: v for k, v in os.environ.items() if k.startswith(_PASSED_ON)},
            )
        if not ours.recv(16):
            raise EOFError(f"it ended at once, with exit code {process.wait()}")
    except BaseException:
        ours.close()
        raise
    return Mover(process, ours)
