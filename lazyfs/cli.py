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
from typing import IO, Any, NoReturn

import click

from lazyfs import __version__, mounts
from lazyfs.errors import DaemonError, LazyfsError, MountError, OptionError
from lazyfs.options import (
    OPTIONS,
    MountOptions,
    Option,
    config_layer,
    environment_layer,
    merged,
)
from lazyfs.runtime import DaemonWatch, MountRecord, default_log_file, record_of, records
from lazyfs.spec import MountSpec
from lazyfs.supervisor import replace_worker

# A background mount that is neither ready nor refused by then is given up; its supervisor, which
# gives its worker 120 s, knows more.
READY_TIMEOUT_S = 150.0


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
@_with_mount_options
def mount(
    source: str,
    mountpoint: Path,
    foreground: bool,
    config: Path | None,
    **given: Any,
) -> None:
    """Mount SOURCE (s3://BUCKET or s3://BUCKET/PREFIX) at the empty directory MOUNTPOINT.

    Returns when the mount can be used; the daemon goes on in the background. Every option can
    also come from the environment (LAZYFS_BLOCK_SIZE=8MiB) or a --config file.
    """
    config = config or (Path(path) if (path := os.environ.get("LAZYFS_CONFIG")) else None)
    layers = (
        ("--{name}", _given_layer(given)),
        ("{environment}", environment_layer(os.environ)),
        (f"{config}: {{name}}", config_layer(config) if config else {}),
    )
    options = MountOptions.parse(*layers)
    mountpoint = Path(os.path.realpath(mountpoint))
    log_file = options.log_file or default_log_file(mountpoint)
    spec = MountSpec(source, str(mountpoint), merged(*(texts for _, texts in layers)))
    if foreground:
        _serve(spec)
    _start_in_background(spec, log_file)


@main.command()
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option("--lazy", "-l", is_flag=True, help="Detach it even if it is in use.")
def umount(mountpoint: Path, lazy: bool) -> None:
    """Unmount MOUNTPOINT and wait for its daemon to end; works after a crash as well."""
    mountpoint = Path(os.path.realpath(mountpoint))
    found = mounts.find_mount(mountpoint)
    if found is None:
        raise MountError(f"{mountpoint}: nothing is mounted there")
    if found.filesystem_type != mounts.FILESYSTEM_TYPE:
        raise MountError(f"{mountpoint}: is a mount of type {found.filesystem_type}, not of lazyfs")
    watch = DaemonWatch(mountpoint)
    mounts.unmount(mountpoint, lazy=lazy)
    if not lazy and not watch.wait(timeout_s=15):
        raise MountError(f"{mountpoint}: unmounted, but its daemon has not ended yet")


@main.command()
@click.argument("mountpoint", type=click.Path(path_type=Path), required=False)
@click.option("--all", "every", is_flag=True, help="All mounts of this user.")
def upgrade(mountpoint: Path | None, every: bool) -> None:
    """Have MOUNTPOINT served by the version that is installed now, without unmounting.

    Whoever reads notices a pause of about a second.
    """
    if (mountpoint is None) != every:
        raise OptionError("upgrade: give a MOUNTPOINT, or --all")
    chosen = records() if mountpoint is None else [_served(Path(os.path.realpath(mountpoint)))]
    for record in chosen:
        replacement = replace_worker(record)
        click.echo(f"{record.mountpoint}: {record.version} -> {replacement.version}")


def _served(mountpoint: Path) -> MountRecord:
    record = record_of(mountpoint)
    if record is None:
        raise MountError(f"{mountpoint}: no lazyfs daemon serves it")
    return record


def _given_layer(given: dict[str, Any]) -> dict[str, str | tuple[str, ...]]:
    """What was given on the command line, as texts by option name."""
    return {
        name.replace("_", "-"): str(value).lower() if isinstance(value, bool) else value
        for name, value in given.items()
        if value is not None and value != ()
    }


def _command(spec: MountSpec, descriptors: Sequence[int]) -> list[str]:
    numbers = map(str, descriptors)
    return [sys.executable, "-P", "-m", "lazyfs.supervisor", spec.mountpoint, *numbers]


def _serve(spec: MountSpec) -> NoReturn:
    """Become the mount's supervisor."""
    descriptor = spec.to_descriptor()
    os.set_inheritable(descriptor, True)
    command = _command(spec, [descriptor])
    os.execv(command[0], command)  # noqa: S606


def _start_in_background(spec: MountSpec, log_file: Path) -> None:
    """Start the mount's supervisor in a session of its own, and return when it is ready.

    Raises:
        LazyfsError: it was refused, with the message of the daemon, or it did not become ready.
    """
    reader, writer = os.pipe()
    passed = [spec.to_descriptor(), writer]
    with _open_log(log_file) as output, open(reader) as answers:
        process = subprocess.Popen(
            _command(spec, passed),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=passed,
            start_new_session=True,
        )
        os.close(writer)
        readable, _, _ = select.select([answers], [], [], READY_TIMEOUT_S)
        answer = json.loads(answers.read() or "{}") if readable else {}
    if answer.get("ready"):
        return
    if not answer:
        process.terminate()
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
