"""Logging to standard error, as text or as JSON.

Each line has fields for its context, as far as that is known: the mountpoint, the ids of the CSI
volumes that the mount serves, and the id of the RPC.
"""

from __future__ import annotations

import json
import logging
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime

from lazyfs.escaping import escaped, escaped_lines

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


def configure(level: str, style: str, *ours: str, **about: str) -> None:
    """Send the log of this process to standard error. Other libraries log only warnings and errors.

    Args:
        level: the lowest level that is logged.
        style: `text` or `json`.
        ours: loggers that use `level`, besides lazyfs.
        about: context fields of every line, such as `mountpoint`.
    """
    handler = logging.StreamHandler(sys.stderr)
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
