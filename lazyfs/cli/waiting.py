"""Waits until a mount has on this machine what was asked for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lazyfs.cli.progress import ByteProgress
from lazyfs.control.client import ControlClient, ControlError
from lazyfs.errors import MountError
from lazyfs.kinds import format_size
from lazyfs.mount.runtime import control_socket, record_of

POLL_S = 0.1
# When nothing was under way for so long, nothing will come any more.
REST_S = 3.0


def wait_until_here(mountpoint: Path, what: str, *, as_json: bool) -> None:
    """Wait, and show how far it is.

    Args:
        what: `headers` or `model`, as in `status["ready"]`.

    Raises:
        MountError: the mount ended, or what is missing does not come by itself.
    """
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
