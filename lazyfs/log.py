"""Log lines for people or for machines, on standard error."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z WARNING source: message`."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time(record)} {record.levelname} {_room(record)}: {record.getMessage()}"
        return line + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


class JsonFormatter(logging.Formatter):
    """One JSON object a line, with the mount it is about, if the process has one."""

    def __init__(self, mountpoint: str | None) -> None:
        super().__init__()
        self.mountpoint = mountpoint

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": _room(record),
            "message": record.getMessage(),
        }
        if self.mountpoint is not None:
            fields["mountpoint"] = self.mountpoint
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def configure(level: str, style: str, mountpoint: str | None, *ours: str) -> None:
    """Send this process's log to standard error; other libraries only speak from warnings on.

    Args:
        ours: loggers that speak from `level` on, beside lazyfs's.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextFormatter() if style == "text" else JsonFormatter(mountpoint))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    for name in ("lazyfs", *ours):
        logging.getLogger(name).setLevel(level.upper())


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _room(record: logging.LogRecord) -> str:
    return record.name.removeprefix("lazyfs.")
