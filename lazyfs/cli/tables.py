"""Tables and lists for a terminal of any width, or for a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment
from rich.table import Table

from lazyfs.escaping import escaped_lines

# In a pipe no line is cut or wrapped, because programs read it line by line.
PIPE_WIDTH = 10_000


class _SafeConsole(Console):
    """Escapes control characters in cells, which others may have written."""

    def render(self, *arguments: Any, **options: Any) -> Iterable[Segment]:
        """Called for all that is printed, cells of tables and titles included."""
        for segment in super().render(*arguments, **options):
            if segment.control:
                yield segment
            else:
                yield Segment(escaped_lines(segment.text), segment.style)


def console() -> Console:
    """Standard output, with colours only in a terminal that has them, and not with `NO_COLOR`."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return _SafeConsole(width=width, highlight=False, markup=False, emoji=False)


def print_rows(rows: Iterable[tuple[str, str]]) -> None:
    """Print names and texts in two columns."""
    table = rows_table(rows)
    console().print(table)


def rows_table(rows: Iterable[tuple[str, str]]) -> Table:
    """A table of names and texts in two columns."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, text)
    return table
