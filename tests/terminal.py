"""Runs the command line in a terminal, as a person does."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable

from mounting import TIMEOUT_S, environment

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A program in a terminal of 100 columns, and what it wrote there.

    Args:
        arguments: of `lazyfs`.
        variables: of its environment.
    """

    def __init__(self, *arguments: object, columns: int = 100, **variables: str) -> None:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self._ours = ours
        self.raw = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lazyfs", *map(str, arguments)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment(TERM="xterm-256color", **variables),
            start_new_session=True,
        )
        os.close(theirs)

    @property
    def text(self) -> str:
        """What it wrote, without colours and movements."""
        return ESCAPE.sub("", self.raw)

    def read_until(self, found: Callable[[str], bool], timeout_s: float = TIMEOUT_S) -> str:
        """Read until the text is as wanted; the text."""
        deadline = time.monotonic() + timeout_s
        while not found(self.text):
            assert time.monotonic() < deadline, self.text
            assert self._read(), self.text
        return self.text

    def finish(self, timeout_s: float = TIMEOUT_S) -> tuple[int, str]:
        """Read until the program ends; its exit code and the text."""
        deadline = time.monotonic() + timeout_s
        while self._read():
            assert time.monotonic() < deadline, self.text
        return self.process.wait(timeout_s), self.text

    def press(self, keys: str) -> None:
        """Type something."""
        os.write(self._ours, keys.encode())

    def close(self) -> None:
        """End the program if it runs, and the terminal."""
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def _read(self) -> bool:
        readable, _, _ = select.select([self._ours], [], [], 1)
        if not readable:
            return True
        data = b""
        with contextlib.suppress(OSError):  # EIO: the program has ended
            data = os.read(self._ours, 1 << 16)
        self.raw += data.decode(errors="replace")
        return bool(data)


def in_terminal(*arguments: object, columns: int = 100, **variables: str) -> tuple[int, str, str]:
    """Run the command line in a terminal to its end: exit code, text, and what was really sent."""
    terminal = Terminal(*arguments, columns=columns, **variables)
    try:
        code, text = terminal.finish()
        return code, text, terminal.raw
    finally:
        terminal.close()
