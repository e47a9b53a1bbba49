"""Tables and lists for a terminal of any width, or for a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lazyfs.escaping import escaped

# In a pipe no line is cut or wrapped, because programs read it line by line.
PIPE_WIDTH = 10_000


class _SafeConsole(Console):
    """Shows what is in cells, which others may have written, and does nothing that it says."""

    def render_str(self, text: str, **style: Any) -> Text:
        """Called for each text that is printed, cells of tables included."""
        return super().render_str("\n".join(map(escaped, text.split("\n"))), **style)


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
