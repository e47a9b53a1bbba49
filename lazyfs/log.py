"""Log lines for people or for machines, on standard error.

Each says what it is about, as far as that is known: the mountpoint, the ids of the volumes of a
cluster that the mount serves, and the request in which it was written.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime

# Of the process, and of what the current thread or task is at.
_about: dict[str, str] = {}
_within: ContextVar[tuple[Mapping[str, str], ...]] = ContextVar("_within", default=())


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z WARNING source: message [mountpoint=/mnt/a volume=pvc-1]`."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time(record)} {record.levelname} {_room(record)}: {record.getMessage()}"
        fields = " ".join(f"{name}={_on_one_line(text)}" for name, text in _fields().items())
        line += f" [{fields}]" if fields else ""
        return line + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": _room(record),
            "message": record.getMessage(),
            **_fields(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def configure(level: str, style: str, *ours: str, **about: str) -> None:
    """Send this process's log to standard error; other libraries only speak from warnings on.

    Args:
        ours: loggers that speak from `level` on, beside lazyfs's.
        about: what every line is about, such as `mountpoint`.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextFormatter() if style == "text" else JsonFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    for name in ("lazyfs", *ours):
        logging.getLogger(name).setLevel(level.upper())
    now_about(**about)


def now_about(**about: str) -> None:
    """All lines of this process are about that from now on; an empty text is not mentioned."""
    _about.update(about)


@contextmanager
def within(about: Mapping[str, str]) -> Iterator[None]:
    """Lines that this thread or task writes meanwhile are about that as well.

    It is read when a line is written, so that it may change meanwhile.
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


def _on_one_line(text: str) -> str:
    return text if text.isprintable() else repr(text)


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _room(record: logging.LogRecord) -> str:
    return record.name.removeprefix("lazyfs.")
