"""Progress of long operations: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

import json
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from lazyfs.options.option_types import format_duration, format_size

# Time between two lines, where there is no bar.
LINE_EVERY_S = 5.0


class ByteProgress:
    """A context manager that shows how many bytes of a total are done.

    On a terminal it shows a bar with rate and time left, on standard error; elsewhere it prints a
    line there every few seconds. With `as_json` it prints JSON lines to standard output.

    Args:
        what: what is being done, in a word or two.
        as_json: print JSON lines.
    """

    def __init__(self, what: str, *, as_json: bool) -> None:
        self._what = what
        self._as_json = as_json
        self._began_s = time.monotonic()
        self._done_at_first: int | None = None
        self._shown_at_s = -LINE_EVERY_S
        self._latest = (0, 0)
        self._bar: Progress | None = None
        if not as_json and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(what, total=None)

    def __enter__(self) -> ByteProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._line(*self._latest, finished=True)

    def update(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are done."""
        if total and self._done_at_first is None:
            self._done_at_first = done
        self._latest = (done, total)
        if self._bar is not None:
            # The bar starts at the bytes that were there before; they would distort the rate.
            self._bar.update(self._task, completed=done, total=total or None)
        elif total and time.monotonic() - self._shown_at_s >= LINE_EVERY_S:  # else not known yet
            self._shown_at_s = time.monotonic()
            self._line(done, total, finished=False)

    def _line(self, done: int, total: int, *, finished: bool) -> None:
        took_s = time.monotonic() - self._began_s
        rate = (done - (self._done_at_first or 0)) / took_s if took_s else 0.0
        left_s = (total - done) / rate if rate else None
        if self._as_json:
            fields = {
                "what": self._what,
                "done_bytes": done,
                "total_bytes": total,
                "rate_bytes_per_s": round(rate),
                "elapsed_s": round(took_s, 3),
                "left_s": None if left_s is None else round(left_s, 1),
                "finished": finished,
            }
            print(json.dumps(fields), flush=True)
            return
        text = f"{self._what}: {format_size(done)} of {format_size(total)}"
        text += f" ({done / total:.0%})" if total else ""
        text += f", {format_size(rate)}/s"
        if finished:
            text += f", done in {format_duration(took_s)}"
        elif left_s is not None:
            text += f", {format_duration(left_s)} left"
        print(text, file=sys.stderr, flush=True)
