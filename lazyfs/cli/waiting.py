"""`lazyfs mount --wait`: wait until the headers or the whole model are on this machine.

headers   every policy with a plan fetches the headers of all files first
model     if prefetching does not fetch the model, the cache is filled with it instead
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
# If nothing was in flight for this long, prefetching has come to an end.
REST_S = 3.0
# A mount may have to ask S3 for the header of a shard, with retries.
CHECK_TIMEOUT_S = 60.0


def check_wait(what: str, options: MountOptions) -> None:
    """Check, before mounting, that the options allow it. Raises OptionError if they do not."""
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
            "--wait model: needs --prefetch model, or a --cache-dir to put the model into"
        )


def wait_until_present(
    mountpoint: Path, what: str, options: MountOptions, *, as_json: bool
) -> None:
    """Wait, and show the progress.

    Args:
        what: `headers` or `model`, as in `status["ready"]`.
        options: of the mount.
        as_json: print progress as JSON lines.

    Raises:
        MountError: the mount ended, prefetching stopped before everything was there, or the
            model is broken.
        LazyfsError: the cache could not be filled.
    """
    if options.brings(what):
        _wait(mountpoint, what, as_json=as_json)
        if what == "model":
            _check(mountpoint, options)
    else:
        from lazyfs.cli.warming import warm_mount  # it imports much, and few mounts need it

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
                    f"{mountpoint}: mounted, but nothing is prefetched: the prefix has no model, "
                    "or several; mount one of them, or fill the cache with `lazyfs warm`"
                )
            if status["ready"][what]:
                return
            if _is_busy(status):
                busy_at_s = time.monotonic()
            elif time.monotonic() - busy_at_s > REST_S:
                raise MountError(f"{mountpoint}: mounted, but {_why(status)}")
            time.sleep(POLL_S)


def _check(mountpoint: Path, options: MountOptions) -> None:
    """Find out whether a loader can load what is here. Raises MountError if it cannot."""
    from lazyfs.cli.inspecting import models_of_mount  # it imports much

    client = ControlClient(control_socket(mountpoint), CHECK_TIMEOUT_S)
    _, models = models_of_mount(client, options)
    broken = [why for model in models if model.prefetched == "mount" for why in model.broken]
    if broken:
        more = f" (and {len(broken) - 1} more, see lazyfs inspect)" if broken[1:] else ""
        raise MountError(f"{mountpoint}: mounted, but the model is broken: {broken[0]}{more}")


def _is_busy(status: dict[str, Any]) -> bool:
    return bool(
        not status["prefetch"]["planned"] or status["in_flight"] or status["requests_in_flight"]
    )


def _why(status: dict[str, Any]) -> str:
    prefetch = status["prefetch"]
    there, wanted = format_size(prefetch["there_bytes"]), format_size(prefetch["wanted_bytes"])
    if status["trouble"]:
        return f"only {there} of {wanted} could be fetched: {status['trouble']}"
    if prefetch["activity"] == "no_room":
        return (
            f"there is room for only {there} of {wanted} before it is read: use a --cache-dir, "
            "or a larger --memory-limit or --page-cache"
        )
    return f"prefetching stopped at {there} of {wanted} ({prefetch['activity']})"
