"""Logging to standard error, as text or as JSON.

Each line has fields for its context, as far as that is known: the mountpoint, the ids of the CSI
volumes that the mount serves, and the id of the RPC.

Standard error may be a file on a disk that hangs, or a pipe that nobody reads. So lines are written
by a thread of their own (`LineWriter`), and whoever logs never waits.
"""

from __future__ import annotations

import json
import logging
import os
import textwrap
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from queue import SimpleQueue

from lazyfs.escaping import escaped, escaped_lines

STDERR = 2
# Lines that may wait to be written; further ones are lost, and counted.
MOST_LINES = 1000
# How long a process that ends waits for its last lines.
LAST_LINES_S = 1.0

# Context of the process, and of the current thread or task.
_about: dict[str, str] = {}
_within: ContextVar[tuple[Mapping[str, str], ...]] = ContextVar("_within", default=())


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z WARNING source: message [mountpoint=/mnt/a volume=pvc-1]`."""

    def format(self, record: logging.LogRecord) -> str:
        message = escaped(record.getMessage())
        line = f"{_time(record)} {record.levelname} {_logger_name(record)}: {message}"
        fields = " ".join(f"{name}={escaped(text)}" for name, text in _fields().items())
        line += f" [{fields}]" if fields else ""
        if not record.exc_info:
            return line
        # Messages of exceptions may have line ends: no line of them looks like one of the log.
        trace = escaped_lines(self.formatException(record.exc_info))
        return f"{line}\n{textwrap.indent(trace, '    ')}"


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": _logger_name(record),
            "message": escaped(record.getMessage()),
            **{name: escaped(text) for name, text in _fields().items()},
        }
        if record.exc_info:
            fields["exception"] = escaped_lines(self.formatException(record.exc_info))
        return json.dumps(fields, ensure_ascii=False)


class LineWriter(logging.Handler):
    """Writes formatted lines in a thread, which is started with the first line.

    It calls write(2) itself. A file object would keep what it could not write, and has a lock,
    which a process that is forked during a write would inherit.

    Args:
        descriptor: of a file that is written by nobody else, as far as lines must not be mixed.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._begin()

    def _begin(self) -> None:
        """Begin without lines, also in a process that was forked, which has no such thread."""
        self._process = os.getpid()
        self._has_thread = False
        # Each with the number of lines that are lost if it is.
        self._lines: deque[tuple[str, int]] = deque()
        # A semaphore must not be released by a signal handler that interrupts its release.
        self._wakes: SimpleQueue[None] = SimpleQueue()
        self._lost = 0
        self._is_torn = False

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line. Does not block, unless no thread can be started."""
        try:
            if self._process != os.getpid():
                self._begin()
            if len(self._lines) >= MOST_LINES:
                self._lost += 1
                return
            text = self.format(record)
            lost, self._lost = self._lost, 0
            if lost:
                text = f"{self.format(_loss(lost))}\n{text}"
            self._lines.append((text, lost + 1))
            if self._has_thread or self._start():
                self._wakes.put(None)
            else:
                self._write_next()
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Wait until all lines are written, for at most `LAST_LINES_S`."""
        until_s = time.monotonic() + LAST_LINES_S
        while self._process == os.getpid() and self._lines and time.monotonic() < until_s:
            time.sleep(0.001)

    def _start(self) -> bool:
        try:
            threading.Thread(target=self._write, name="log", daemon=True).start()
        except RuntimeError:  # no more threads are allowed
            return False
        self._has_thread = True
        return True

    def _write(self) -> None:
        while True:
            self._wakes.get()
            self._write_next()

    def _write_next(self) -> None:
        text, lines = self._lines[0]
        data = b"\n" * self._is_torn + f"{text}\n".encode(errors="backslashreplace")
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
                self._is_torn = bool(data)
        except OSError:  # a full disk, a closed pipe
            self._lost += lines
        self._lines.popleft()  # only now, for `flush`


def _loss(lines: int) -> logging.LogRecord:
    text = "lines of the log that are lost here: %d"
    return logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, (lines,), None)


def configure(level: str, style: str, *ours: str, **about: str) -> None:
    """Send the log of this process to standard error. Other libraries log only warnings and errors.

    Args:
        level: the lowest level that is logged.
        style: `text` or `json`.
        ours: loggers that use `level`, besides lazyfs.
        about: context fields of every line, such as `mountpoint`.
    """
    handler = LineWriter(STDERR)
    handler.setFormatter(TextFormatter() if style == "text" else JsonFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    for name in ("lazyfs", *ours):
        logging.getLogger(name).setLevel(level.upper())
    now_about(**about)


def now_about(**about: str) -> None:
    """Set context fields for all later lines of this process. Empty ones are left out."""
    _about.update(about)


@contextmanager
def within(about: Mapping[str, str]) -> Iterator[None]:
    """Add context fields to the lines of this thread or task inside the `with` block.

    `about` is read each time a line is written, so it may change meanwhile.
    """
    token = _within.set((*_within.get(), about))
    try:
        yield
    finally:
        _within.reset(token)


def _fields() -> dict[str, str]:
    fields = dict(_about)
    for about in _within.get():
        fields |= about
    return {name: text for name, text in fields.items() if text}


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _logger_name(record: logging.LogRecord) -> str:
    return record.name.removeprefix("lazyfs.")
