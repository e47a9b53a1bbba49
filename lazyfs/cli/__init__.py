"""The command line. Each command has a module of its own, which is imported only when needed.

An error is one line on standard error. Exit codes: 2 for a wrong option or argument, 130 after
Ctrl-C, 1 for everything else.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Sequence
from typing import Any

import click

from lazyfs import __version__
from lazyfs.errors import LazyfsError, OptionError
from lazyfs.escaping import escaped, escaped_lines
from lazyfs.faults import the_error

# The module of each command.
COMMANDS = {
    "mount": "mounting",
    "umount": "unmounting",
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
    "fleet-cache": "fleet",
}


# Functions with another name than their command.
_FUNCTIONS = {"set": "set_", "fleet-cache": "fleet_cache"}


class OneLineErrors(click.Group):
    """A group of commands that prints each error as one line, after the name of the program."""

    program = "lazyfs"

    def main(self, args: Sequence[str] | None = None, **settings: Any) -> Any:  # type: ignore[override]
        try:
            return super().main(args, **{**settings, "standalone_mode": False})
        except click.exceptions.Abort:
            sys.exit(130)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(escaped_lines(error.format_message()))
            sys.exit(2)
        except click.ClickException as error:
            self._fail(OptionError(error.format_message()))
        except LazyfsError as error:
            self._fail(error)
        except (MemoryError, BaseExceptionGroup) as error:
            if not isinstance(the_error(error), MemoryError):
                raise
            self._fail(
                LazyfsError(
                    "there is no more memory for this command: what it reads is too large for "
                    "--memory-limit or for the machine"
                )
            )

    def _fail(self, error: LazyfsError) -> None:
        click.echo(f"{self.program}: {escaped(str(error))}", err=True)
        sys.exit(error.exit_code)


class _Commands(OneLineErrors):
    """Imports only the command that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"lazyfs.cli.{COMMANDS[cmd_name]}")
        command: click.Command = getattr(module, _FUNCTIONS.get(cmd_name, cmd_name))
        gc.freeze()  # see `__main__.py`
        gc.enable()
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lazyfs")
def main() -> None:
    """Mount models stored in S3 as read-only directories, and read them at line rate."""
