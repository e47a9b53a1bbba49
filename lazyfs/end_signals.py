"""SIGTERM and SIGINT as something to wait for. Only the standard library is imported here.

The kernel may give a signal to any thread, and the interpreter calls its handler in the main thread
only when that next runs: a main thread that waits for a lock or a queue goes on waiting. The part
of the interpreter that catches the signal writes to a pipe, in whichever thread.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

_NUMBERS = (signal.SIGTERM, signal.SIGINT)
_WOKEN = b"\0"


class EndSignals:
    """Waits for signals, or for `wake`.

    Args:
        reader, writer: the ends of a pipe.
    """

    def __init__(self, reader: int, writer: int) -> None:
        self._reader = reader
        self._writer = writer

    def wait(self) -> signal.Signals | None:
        """The next signal, even if it came before the call; None: `wake` was called."""
        while True:
            number = os.read(self._reader, 1)[0]
            if number in _NUMBERS:
                return signal.Signals(number)
            if number == _WOKEN[0]:
                return None

    def wake(self) -> None:
        """Have `wait` return. For any thread."""
        with contextlib.suppress(BlockingIOError):  # full: it returns anyway
            os.write(self._writer, _WOKEN)


@contextlib.contextmanager
def end_signals() -> Iterator[EndSignals]:
    """Make signals end `wait` and do nothing else. Call this in the main thread."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    fd_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = [signal.signal(number, lambda *_: None) for number in _NUMBERS]
    try:
        yield EndSignals(reader, writer)
    finally:
        for number, handler in zip(_NUMBERS, before, strict=True):
            signal.signal(number, handler)
        signal.set_wakeup_fd(fd_before)
        os.close(reader)
        os.close(writer)
