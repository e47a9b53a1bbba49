"""Processes in Linux namespaces of their own, which all end with the first of them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# The first process of a process-id namespace adopts orphans, and so has to reap them.
REAPER = "while :; do wait -n 2>/dev/null || sleep 0.2; done"


@dataclass(frozen=True)
class Namespaces:
    """The namespaces of a process: mounts, network, process ids, host name.

    Attributes:
        pid: of the process, which is the first in its process-id namespace.
        started: when it was started, in ticks since the boot: pids are used again.
    """

    pid: int
    started: int

    @classmethod
    def make(cls, kinds: Sequence[str], init: Sequence[str], outer: Namespaces | None = None,
             log: Path | None = None) -> Namespaces:  # fmt: skip
        """Start `init` as first process of new namespaces.

        Args:
            kinds: of namespaces beside that of process ids, as unshare(1) calls them.
            init: a command. Its SIGKILL ends everything in the namespaces.
            outer: where the new ones are made, and with which they end.
            log: for its output.
        """
        command = ["unshare", *(f"--{kind}" for kind in kinds),
                   "--pid", "--fork", "--kill-child", "--mount-proc", *init]  # fmt: skip
        if outer is not None:
            command = outer.command(command)
        with (log or Path(os.devnull)).open("ab") as output:
            started = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            pid = started.pid
            while below := children(pid):
                pid = below[0]
                if is_first(pid):
                    return cls(pid, start_ticks(pid) or 0)
            if started.poll() is not None:
                break
            time.sleep(0.02)
        raise RuntimeError(f"namespaces were not made: {' '.join(command)}")

    def command(self, command: Sequence[str], kinds: str = "mnpu") -> list[str]:
        """The command that runs `command` in the namespaces.

        Args:
            kinds: letters of nsenter(1).
        """
        return ["nsenter", "-t", str(self.pid), *(f"-{kind}" for kind in kinds), "--", *command]

    @property
    def alive(self) -> bool:
        return start_ticks(self.pid) == self.started

    def kill(self) -> None:
        """End all processes at once, as by a power cut."""
        if not self.alive:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while self.alive:
            if time.monotonic() > deadline:
                raise RuntimeError(f"process {self.pid} does not end 60 s after SIGKILL")
            time.sleep(0.05)


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(each) for each in found.stdout.split()]


def parent(pid: int) -> int:
    """The parent of a process.

    Raises:
        OSError: there is no such process.
    """
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def is_first(pid: int) -> bool:
    """Whether a process is the first of its process-id namespace."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    (line,) = (line for line in status.splitlines() if line.startswith("NSpid:"))
    return line.split()[-1] == "1"


def start_ticks(pid: int) -> int | None:
    """When a process was started; None if it is gone or a zombie (proc(5))."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
