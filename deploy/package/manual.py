"""Writes the man pages from the commands and the tables of options.

    python deploy/package/manual.py DIRECTORY

`DIRECTORY/man1` gets a page for `lazyfs` and for each of its commands, as `--help` has them;
`DIRECTORY/man8` gets mount.lazyfs(8). With `SOURCE_DATE_EPOCH` the date in them is that one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
from click_man.core import write_man_pages
from click_man.man import ManPage

from lazyfs import __version__
from lazyfs.cli import COMMANDS, main
from lazyfs.cli.fstab import USAGE
from lazyfs.options.mount_options import OPTIONS, Option

HELPER = """\
The helper by which mount(8) and systemd mount a model in S3: for lines of /etc/fstab of the type
lazyfs, and for mount \\-t lazyfs. It returns when the mount is ready.

Options are those of lazyfs\\-mount(1), separated by commas. Options that mount(8) and systemd
handle themselves are ignored."""


def write(directory: Path) -> None:
    """Write all pages."""
    for section in ("man1", "man8"):
        (directory / section).mkdir(parents=True, exist_ok=True)
    write_man_pages("lazyfs", everything(), version=__version__, target_dir=directory / "man1")
    (directory / "man8" / "mount.lazyfs.8").write_text(helper())


def everything() -> click.Group:
    """The command line with all commands loaded, and their texts without marks for the screen."""
    context = click.Context(main)
    found = {name: main.get_command(context, name) for name in COMMANDS}
    group = click.Group("lazyfs", params=main.params, help=main.help)
    for name, command in found.items():
        assert command is not None, name
        group.add_command(command, name)
        nested = command.commands.values() if isinstance(command, click.Group) else ()
        for each in (command, *nested):
            each.help = (each.help or "").replace("\b\n", "")
            each.short_help = each.help.partition("\n")[0].rstrip(".")
    return group


def helper() -> str:
    """The page mount.lazyfs(8)."""
    page = ManPage("mount.lazyfs")
    page.version = __version__
    page.short_help = "mount a model in S3"
    page.synopsis = USAGE.partition("mount.lazyfs ")[2]
    page.description = HELPER
    page.options = [(f"-o {_written(option)}", option.help) for option in OPTIONS]
    return str(page).replace('"1"', '"8"', 1)


def _written(option: Option) -> str:
    return option.name if option.is_flag else f"{option.name}={option.metavar}"


if __name__ == "__main__":
    write(Path(sys.argv[1]))
