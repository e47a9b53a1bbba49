"""`lazyfs top`: show all mounts, or one, continuously."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from lazyfs.cli.mounts import record_at, status_of
from lazyfs.cli.status import mounts_table, rows
from lazyfs.cli.tables import console, rows_table
from lazyfs.errors import OptionError
from lazyfs.process.mount_records import records


@click.command()
@click.argument("mountpoint", type=click.Path(path_type=Path), required=False)
@click.option(
    "--interval", "-d", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True,
    metavar="SECONDS", help="Time between two updates.",
)  # fmt: skip
@click.option("--count", "-n", type=click.IntRange(1), help="Exit after this many updates.")
def top(mountpoint: Path | None, interval: float, count: int | None) -> None:
    """Show all mounts of this user, or MOUNTPOINT, and update until Ctrl-C.

    In a pipe, updates are printed one below the other, and --count is required.

    Exit code 1: nothing is mounted at MOUNTPOINT (any more); 130: ended by Ctrl-C.
    """
    screen = console()
    if not screen.is_terminal:
        if count is None:
            raise OptionError("top: standard output is not a terminal: give --count")
        for look in range(count):
            time.sleep(interval if look else 0)
            screen.print(_look(mountpoint))
        return
    with Live(console=Console(markup=False, emoji=False, highlight=False), screen=count is None,
              auto_refresh=False) as live:  # fmt: skip
        look = 0
        while count is None or look < count:
            time.sleep(interval if look else 0)
            live.update(_look(mountpoint), refresh=True)
            look += 1


def _look(mountpoint: Path | None) -> RenderableType:
    now = Text(time.strftime("%H:%M:%S"), style="dim" if sys.stdout.isatty() else "")
    if mountpoint is not None:
        return Group(now, rows_table(rows(status_of(record_at(mountpoint)))))
    found = [status_of(record) for record in records()]
    return Group(now, mounts_table(found) if found else Text("nothing is mounted by this user"))
