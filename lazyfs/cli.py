"""The command line: `lazyfs mount` and `lazyfs umount`.

The options of `mount` are made from `lazyfs/options.py`. Errors are one line on standard error:
exit code 2 for a wrong option or argument, 1 for everything else.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import click

from lazyfs import __version__
from lazyfs.errors import DaemonError, LazyfsError, MountError, OptionError
from lazyfs.options import (
    OPTIONS,
    MountOptions,
    Option,
    config_layer,
    environment_layer,
    find_option,
)
from lazyfs.runtime import DaemonWatch, default_log_file

# A background mount that is neither ready nor refused by then is given up.
READY_TIMEOUT_S = 120.0


class _OneLineErrors(click.Group):
    """Shows every error of ours as one line."""

    def main(self, args: Sequence[str] | None = None, **settings: Any) -> Any:  # type: ignore[override]
        try:
            return super().main(args, **{**settings, "standalone_mode": False})
        except click.exceptions.Abort:
            sys.exit(130)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
            sys.exit(2)
        except click.ClickException as error:
            _fail(OptionError(error.format_message()))
        except LazyfsError as error:
            _fail(error)


def _fail(error: LazyfsError) -> None:
    click.echo(f"lazyfs: {error}", err=True)
    sys.exit(error.exit_code)


@click.group(cls=_OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lazyfs")
def main() -> None:
    """Models in S3 as a local, read-only directory: mounted in a second, read at line rate."""


def _with_mount_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(OPTIONS):
        command = _click_option(option)(command)
    return command


def _click_option(option: Option) -> Callable[[Callable[..., None]], Callable[..., None]]:
    default = f" [default: {option.default_text}]" if option.default_text else ""
    text = f"{option.help}{default}"
    if option.is_flag:
        return click.option(f"--{option.name}/--{option.negation}", default=None, help=text)
    return click.option(
        f"--{option.name}", multiple=option.kind.repeatable, help=text, metavar=option.metavar
    )


@main.command()
@click.argument("source")
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option("--foreground", "-f", is_flag=True, help="Stay, and log to standard error.")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help='TOML file with lines like block-size = "8MiB".',
)
@click.option("--ready-fd", type=int, hidden=True)
@_with_mount_options
def mount(
    source: str,
    mountpoint: Path,
    foreground: bool,
    config: Path | None,
    ready_fd: int | None,
    **given: Any,
) -> None:
    """Mount SOURCE (s3://BUCKET or s3://BUCKET/PREFIX) at the empty directory MOUNTPOINT.

    Returns when the mount can be used; the daemon goes on in the background. Every option can
    also come from the environment (LAZYFS_BLOCK_SIZE=8MiB) or a --config file.
    """
    config = config or (Path(path) if (path := os.environ.get("LAZYFS_CONFIG")) else None)
    layer = _given_layer(given)
    options = MountOptions.parse(
        ("--{name}", layer),
        ("{environment}", environment_layer(os.environ)),
        (f"{config}: {{name}}", config_layer(config) if config else {}),
    )
    mountpoint = Path(os.path.realpath(mountpoint))
    if foreground:
        _serve(source, mountpoint, options, ready_fd)
    else:
        arguments = ["mount", source, str(mountpoint), *_as_arguments(layer)]
        arguments += [f"--config={config}"] if config else []
        _start_in_background(arguments, options.log_file or default_log_file(mountpoint))


@main.command()
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option("--lazy", "-l", is_flag=True, help="Detach it even if it is in use.")
def umount(mountpoint: Path, lazy: bool) -> None:
    """Unmount MOUNTPOINT and wait for its daemon to end; works after a crash as well."""
    from lazyfs import session

    mountpoint = Path(os.path.realpath(mountpoint))
    found = session.find_mount(mountpoint)
    if found is None:
        raise MountError(f"{mountpoint}: nothing is mounted there")
    if found.filesystem_type != session.FILESYSTEM_TYPE:
        raise MountError(f"{mountpoint}: is a mount of type {found.filesystem_type}, not of lazyfs")
    watch = DaemonWatch(mountpoint)
    session.unmount(mountpoint, lazy=lazy)
    if not lazy and not watch.wait(timeout_s=15):
        raise MountError(f"{mountpoint}: unmounted, but its daemon has not ended yet")


def _given_layer(given: dict[str, Any]) -> dict[str, str | tuple[str, ...]]:
    """What was given on the command line, as texts by option name."""
    return {
        name.replace("_", "-"): str(value).lower() if isinstance(value, bool) else value
        for name, value in given.items()
        if value is not None and value != ()
    }


def _as_arguments(layer: dict[str, str | tuple[str, ...]]) -> list[str]:
    """The same as command line arguments again."""
    arguments = []
    for name, value in layer.items():
        option = find_option(name)
        if option is not None and option.is_flag:
            arguments.append(f"--{name}" if value == "true" else f"--{option.negation}")
        else:
            texts = (value,) if isinstance(value, str) else value
            arguments += [f"--{name}={text}" for text in texts]
    return arguments


def _serve(source: str, mountpoint: Path, options: MountOptions, ready_fd: int | None) -> None:
    """Run the daemon in this process."""
    from lazyfs import daemon, log
    from lazyfs.source import SourceUrl

    log.configure(options.log_level, options.log_format, str(mountpoint))
    os.chdir("/")  # a daemon must not keep a filesystem busy
    try:
        daemon.run(
            daemon.Mount(SourceUrl.parse(source), mountpoint, options),
            lambda: _tell_parent(ready_fd, {"ready": True}),
        )
    except LazyfsError as error:
        _tell_parent(ready_fd, {"error": str(error), "exit_code": error.exit_code})
        raise


def _tell_parent(ready_fd: int | None, message: dict[str, Any]) -> None:
    if ready_fd is not None:
        with open(ready_fd, "w") as pipe:
            json.dump(message, pipe)


def _start_in_background(arguments: list[str], log_file: Path) -> None:
    """Run a command in the foreground of a session of its own, and return when it is ready.

    Raises:
        LazyfsError: it was refused, with the message of the daemon, or it did not become ready.
    """
    reader, writer = os.pipe()
    with _open_log(log_file) as output, open(reader) as answers:
        process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "lazyfs", *arguments),
                *("--foreground", f"--ready-fd={writer}"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[writer],
            start_new_session=True,
        )
        os.close(writer)
        readable, _, _ = select.select([answers], [], [], READY_TIMEOUT_S)
        answer = json.loads(answers.read() or "{}") if readable else {}
    if answer.get("ready"):
        return
    if not answer:
        process.kill()
    process.wait()
    if answer:
        raise DaemonError(answer["error"], answer["exit_code"])
    raise MountError(f"the daemon ended before the mount was ready; its log is {log_file}")


def _open_log(log_file: Path) -> IO[bytes]:
    try:
        log_file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return open(os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb")
    except OSError as error:
        raise OptionError(f"--log-file: {log_file}: {error.strerror}") from error
