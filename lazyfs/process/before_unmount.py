"""Has a worker write to the cache what it has not written yet, before its mount is unmounted.

Only the standard library. It is bounded in time, and a worker that is dead or does not answer is
not waited for: the unmount is what matters.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from lazyfs.process.mount_records import control_socket

log = logging.getLogger(__name__)

# What is not saved by then is fetched again by the next mount.
LONGEST_S = 30.0
# How often it is asked whether all is saved, and how long an answer may take beyond that.
STEP_S = 1.0
ANSWER_S = 2.0


def save(
    mountpoint: Path,
    *,
    unless_in_use: bool = False,
    on_wait: Callable[[int], None] = lambda _: None,
    is_enough: Callable[[], bool] = lambda: False,
) -> int:
    """Have all saved.

    Args:
        mountpoint: of a mount that is served, or was.
        unless_in_use: not while files are open, which makes the unmount impossible.
        on_wait: called if it takes longer than a second, with the bytes that are to be saved.
        is_enough: whether not to wait any longer; asked every second.

    Returns:
        How many bytes, at most, were not saved.
    """
    from lazyfs.control.client import ControlClient, ControlError  # only the end needs it

    client = ControlClient(control_socket(mountpoint), STEP_S + ANSWER_S)
    until = time.monotonic() + LONGEST_S
    wanted = {"for_s": STEP_S, "unless_in_use": unless_in_use}
    left = 0
    try:
        try:
            while not (left and (is_enough() or time.monotonic() >= until)):
                answer = client.put("/save", wanted)
                if not answer["left_bytes"] or answer["in_use"]:
                    return int(answer["left_bytes"])
                if not left:
                    on_wait(answer["left_bytes"])
                left = answer["left_bytes"]
        except KeyboardInterrupt:
            pass  # that was enough
        left = int(client.put("/save", {"stop": True})["left_bytes"])
    except ControlError as error:
        log.debug("%s: nothing was saved before the unmount: %s", mountpoint, error)
    return left
