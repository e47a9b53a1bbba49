"""The command line. Each command is in a module of its own, which is imported when it is called.

Errors are one line on standard error: exit code 2 for a wrong option or argument, 1 for everything
else, 130 when interrupted.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import click

from lazyfs import __version__
from lazyfs.errors import LazyfsError, OptionError

# Name of each command: the module it is in.
COMMANDS = {
    "mount": "mounting",
    "umount": "mounting",
    "status": "status",
    "top": "top",
    "report": "report",
    "doctor": "doctor",
    "pause": "tuning",
    "resume": "tuning",
    "set": "tuning",
    "completion": "completion",
    "inspect": "inspecting",
    "upgrade": "upgrading",
    "warm": "warming",
    "warmup": "warming",
    "cache": "caching",
}


# Where the function is called otherwise than its command.
_FUNCTIONS = {"set": "set_"}


class OneLineErrors(click.Group):
    """Commands of a program, every error of which is one line that begins with its name."""

    program = "lazyfs"

    def main(self, args: Sequence[str] | None = None, **settings: Any) -> Any:  # type: ignore[override]
        try:
            return super().main(args, **{**settings, "standalone_mode": False})
        except click.exceptions.Abort:
            sys.exit(130)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
            sys.exit(2)
        except click.ClickException as error:
            self._fail(OptionError(error.format_message()))
        except LazyfsError as error:
            self._fail(error)

    def _fail(self, error: LazyfsError) -> None:
        click.echo(f"{self.program}: {error}", err=True)
        sys.exit(error.exit_code)


class _Commands(OneLineErrors):
    """Finds commands by name without importing the others."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"lazyfs.cli.{COMMANDS[cmd_name]}")
        command: click.Command = getattr(module, _FUNCTIONS.get(cmd_name, cmd_name))
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lazyfs")
def main() -> None:
    """Models in S3 as a local, read-only directory: mounted in a second, read at line rate."""
