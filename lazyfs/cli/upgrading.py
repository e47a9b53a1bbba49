"""`lazyfs upgrade`: switch mounts to the installed version."""

from __future__ import annotations

import os
from pathlib import Path

import click

from lazyfs.cli.messages import tell
from lazyfs.errors import MountError, OptionError
from lazyfs.options.layers import config_places
from lazyfs.process.mount_records import MountRecord, record_of, records
from lazyfs.process.running_daemon import replace_worker


@click.command()
@click.argument("mountpoint", type=click.Path(path_type=Path), required=False)
@click.option("--all", "every", is_flag=True, help="Upgrade all mounts of this user.")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="TOML file that names the mountpoint.",
)
def upgrade(mountpoint: Path | None, every: bool, config: Path | None) -> None:
    """Switch MOUNTPOINT to the installed version of lazyfs without unmounting it.

    Readers notice a pause of about a second.
    """
    if mountpoint is None and config is not None:
        named = config_places(config)
        if "mountpoint" not in named:
            raise OptionError(f"{config}: names no mountpoint")
        mountpoint = Path(named["mountpoint"])
    if (mountpoint is None) != every:
        raise OptionError("upgrade: give a MOUNTPOINT, or --all")
    chosen = records() if mountpoint is None else [_served(Path(os.path.realpath(mountpoint)))]
    for record in chosen:
        replacement = replace_worker(record)
        tell(f"{record.mountpoint}: {record.version} -> {replacement.version}")


def _served(mountpoint: Path) -> MountRecord:
    record = record_of(mountpoint)
    if record is None:
        raise MountError(f"{mountpoint}: no lazyfs daemon serves it")
    return record
