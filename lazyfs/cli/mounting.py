"""`lazyfs mount`: begin a mount of this machine.

Mounting has to start quickly, so modules that only some mounts need are imported where they are
needed.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import click

from lazyfs.cli.settings import config_file, settings, with_mount_options
from lazyfs.errors import DaemonError, MountError, OptionError
from lazyfs.options.layers import config_places
from lazyfs.patience import in_child
from lazyfs.process import standalone
from lazyfs.process.background import BackgroundSupervisor
from lazyfs.process.mount_records import default_log_file
from lazyfs.process.mount_spec import MountSpec
from lazyfs.process.worker_files import rights_of

# Give up on a background mount that is neither ready nor refused by then. This is longer than the
# 120 s that the supervisor gives its worker, because the supervisor knows the reason.
READY_TIMEOUT_S = 150.0


@click.command()
@click.argument("source", required=False)
@click.argument("mountpoint", type=click.Path(path_type=Path), required=False)
@click.option(
    "--foreground", "-f", is_flag=True, help="Stay in the foreground and log to standard error."
)
@click.option(
    "--wait",
    type=click.Choice(["headers", "model"]),
    help="Return only when the small files and the headers of all shards (headers), or the whole "
    "model (model), are on this machine. A model that is not prefetched is put into the cache.",
)
@click.option("--json", "as_json", is_flag=True, help="Print progress as JSON lines.")
@with_mount_options
def mount(
    source: str | None,
    mountpoint: Path | None,
    foreground: bool,
    wait: str | None,
    as_json: bool,
    config: Path | None,
    **given: Any,
) -> None:
    """Mount SOURCE (s3://BUCKET or s3://BUCKET/PREFIX) at the empty directory MOUNTPOINT.

    Returns when the mount is ready; its daemon runs in the background. Every option can also be set
    in the environment (LAZYFS_BLOCK_SIZE=8MiB) or in a --config file, which can also name `source`
    and `mountpoint`.
    """
    source, mountpoint = _places(source, mountpoint, config)
    options, texts = settings(config, given)
    if wait and foreground:
        raise OptionError("--wait: cannot be combined with --foreground, which does not return")
    if wait:
        from lazyfs.cli.waiting import check_wait, wait_until_present

        check_wait(wait, options)
    mountpoint = Path(os.path.realpath(mountpoint))
    log_file = options.log_file or default_log_file(mountpoint)
    spec = MountSpec(source, str(mountpoint), texts)

    def try_disks() -> None:
        rights_of(spec, options, cache_answers=True)
        if not foreground:
            _open_log(log_file)

    answer = in_child(try_disks)
    if not (answer or foreground or in_child(lambda: _open_log(log_file))):
        raise OptionError(f"--log-file: {log_file}: its disk does not answer; name another file")
    spec = replace(spec, rights=rights_of(spec, options, cache_answers=answer).value)
    if foreground:
        sys.exit(standalone.main(spec))
    _start_in_background(spec, log_file)
    if wait:
        wait_until_present(mountpoint, wait, options, as_json=as_json)


def _places(source: str | None, mountpoint: Path | None, config: Path | None) -> tuple[str, Path]:
    """What to mount where: as given, or as the configuration file says.

    Raises:
        OptionError: neither says it.
    """
    named = {}
    if (source is None or mountpoint is None) and (config := config_file(config)):
        named = config_places(config)
    source = source or named.get("source")
    where = mountpoint or named.get("mountpoint")
    if source is None or where is None:
        missing = "SOURCE and MOUNTPOINT" if source is None else "MOUNTPOINT"
        raise OptionError(f"mount: {missing} missing: give them, or --config a file that has them")
    return source, Path(where)


def _start_in_background(spec: MountSpec, log_file: Path) -> None:
    """Start the supervisor in a session of its own, and return when the mount is ready.

    Raises:
        LazyfsError: the daemon refused to mount (with its message), or did not become ready.
    """
    with _open_log(log_file) as output:
        supervisor = BackgroundSupervisor(spec, output.fileno())
    try:
        answer = supervisor.wait_until_ready(READY_TIMEOUT_S)
    except BaseException:
        supervisor.stop()  # Ctrl-C
        raise
    if answer.get("ready"):
        return
    supervisor.stop()
    supervisor.wait()
    if answer:
        raise DaemonError(answer["error"], answer["exit_code"])
    raise MountError(f"the daemon ended before the mount was ready; see its log {log_file}")


def _open_log(log_file: Path) -> IO[bytes]:
    try:
        log_file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return open(os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb")
    except OSError as error:
        raise OptionError(f"--log-file: {log_file}: {error.strerror}") from error
