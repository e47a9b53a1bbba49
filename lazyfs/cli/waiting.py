"""Waits until a mount has on this machine what was asked for.

headers   is waited for: a policy that plans brings the beginnings of all files first
model     is waited for where prefetching brings it; elsewhere the cache is filled with it
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lazyfs.cli.progress import ByteProgress
from lazyfs.control.client import ControlClient, ControlError
from lazyfs.errors import MountError, OptionError
from lazyfs.options.mount_options import MountOptions
from lazyfs.options.option_types import format_size
from lazyfs.process.mount_records import control_socket, record_of

POLL_S = 0.1
# When nothing was under way for so long, nothing will come any more.
REST_S = 3.0


def check_wait(what: str, options: MountOptions) -> None:
    """See that it can come, before anything is mounted. Raises OptionError when it cannot."""
    if options.brings(what):
        return
    if what == "headers":
        raise OptionError(
            f"--wait headers: with --prefetch {options.prefetch} --prefetch-on "
            f"{options.prefetch_on} nothing is fetched before a file is opened; use --prefetch "
            "headers, or --wait model, which fills the cache"
        )
    if options.cache_dir == "none":
        raise OptionError(
            "--wait model: without --prefetch model the model is put into the cache: "
            "it needs a --cache-dir"
        )


def wait_until_present(
    mountpoint: Path, what: str, options: MountOptions, *, as_json: bool
) -> None:
    """Wait, and show how far it is.

    Args:
        what: `headers` or `model`, as in `status["ready"]`.
        options: of the mount.

    Raises:
        MountError: the mount ended, or what is missing does not come by itself.
        LazyfsError: the cache could not be filled.
    """
    if options.brings(what):
        _wait(mountpoint, what, as_json=as_json)
    else:
        from lazyfs.cli.warming import warm_mount  # much of lazyfs, for few mounts

        warm_mount(mountpoint, [], verify=False, as_json=as_json)


def _wait(mountpoint: Path, what: str, *, as_json: bool) -> None:
    client = ControlClient(control_socket(mountpoint))
    busy_at_s = time.monotonic()
    with ByteProgress(what, as_json=as_json) as progress:
        while True:
            try:
                status = client.get("/status")
            except ControlError:
                if record_of(mountpoint) is None:
                    raise MountError(f"{mountpoint}: the mount has ended") from None
                time.sleep(POLL_S)  # another worker is taking over
                continue
            prefetch = status["prefetch"]
            progress.update(prefetch["there_bytes"], prefetch["wanted_bytes"])
            if prefetch["planned"] and not prefetch["wanted_bytes"]:
                raise MountError(
                    f"{mountpoint}: mounted, but nothing is fetched ahead: below the prefix is no "
                    "model, or several; mount one, or fill the cache with `lazyfs warm`"
                )
            if status["ready"][what]:
                return
            if _is_busy(status):
                busy_at_s = time.monotonic()
            elif time.monotonic() - busy_at_s > REST_S:
                raise MountError(f"{mountpoint}: mounted, but {_why(status)}")
            time.sleep(POLL_S)


def _is_busy(status: dict[str, Any]) -> bool:
    return bool(
        not status["prefetch"]["planned"] or status["in_flight"] or status["requests_in_flight"]
    )


def _why(status: dict[str, Any]) -> str:
    prefetch = status["prefetch"]
    there, wanted = format_size(prefetch["there_bytes"]), format_size(prefetch["wanted_bytes"])
    if status["trouble"]:
        return f"only {there} of {wanted} came: {status['trouble']}"
    if prefetch["activity"] == "no_room":
        return (
            f"only {there} of {wanted} has room before it is read: give it a --cache-dir, "
            "or a larger --memory-limit or --page-cache"
        )
    return f"fetching ahead came to rest ({prefetch['activity']}) at {there} of {wanted}"
