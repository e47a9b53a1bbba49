"""`lazyfs pause`, `resume` and `set`: change a mount while it is in use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from lazyfs.cli.mounts import record_at
from lazyfs.control.client import ControlClient
from lazyfs.control.tunables import TUNABLE
from lazyfs.errors import OptionError
from lazyfs.process.mount_records import control_socket


@click.command()
@click.argument("mountpoint", type=click.Path(path_type=Path))
def pause(mountpoint: Path) -> None:
    """Stop prefetching for MOUNTPOINT until `lazyfs resume`. Reads are still served.

    This leaves the link to others for a while.

    Exit code 1: nothing is mounted there.
    """
    _tell(mountpoint, "/prefetch", {"paused": True})


@click.command()
@click.argument("mountpoint", type=click.Path(path_type=Path))
def resume(mountpoint: Path) -> None:
    """Resume prefetching for MOUNTPOINT after `lazyfs pause`.

    Exit code 1: nothing is mounted there.
    """
    _tell(mountpoint, "/prefetch", {"paused": False})


@click.command(
    "set",
    help=f"""Change options of MOUNTPOINT while it is mounted: {", ".join(TUNABLE)}.

    A change lasts until MOUNTPOINT is unmounted. It survives crashes and `lazyfs upgrade`.

    \b
    Examples:
      lazyfs set /mnt/llama bandwidth-limit=200MB
      lazyfs set /mnt/llama log-level=debug max-concurrency=16

    Exit code 1: nothing is mounted there; 2: the option cannot be changed, or not to that value.
    """,
)
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.argument("changes", nargs=-1, required=True, metavar="NAME=VALUE...")
def set_(mountpoint: Path, changes: Sequence[str]) -> None:
    texts = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise OptionError(f"set: {change!r} is not NAME=VALUE")
        if name in texts:
            raise OptionError(f"set: {name} is given twice")
        texts[name] = value
    _tell(mountpoint, "/tunables", texts)


def _tell(mountpoint: Path, what: str, body: dict[str, Any]) -> None:
    record = record_at(mountpoint)
    ControlClient(control_socket(Path(record.mountpoint))).put(what, body)
