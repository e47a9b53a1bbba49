"""Changes to a running mount: `PUT /tunables` and `PUT /prefetch`.

A change lasts as long as the mount: later workers apply it too.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from lazyfs.control.status import Status
from lazyfs.errors import OptionError
from lazyfs.handover.runtime_changes import RuntimeChanges
from lazyfs.options.mount_options import MountOptions, Option, find_option

log = logging.getLogger(__name__)

TUNABLE = ("log-level", "max-concurrency", "bandwidth-limit")


def tune(status: Status, texts: Mapping[str, Any], most_requests: int) -> None:
    """Change options of a running mount.

    Args:
        texts: by option name.
        most_requests: how many requests the limit of open files allows.

    Raises:
        OptionError: an option cannot be changed, or not to this value; then none is changed.
    """
    changed = _changed(status.options, texts)
    if changed.max_concurrency > max(most_requests, status.options.max_concurrency):
        raise OptionError(
            f"max-concurrency: {changed.max_concurrency} is too many for the files that may be "
            f"open here (ulimit -Hn); at most {most_requests}"
        )
    before, status.options = status.options, changed
    _use_log_level(status.options)
    if dataclasses.replace(before, log_level=status.options.log_level) != status.options:
        status.fetcher.tune(status.options)
    status.carried.options |= {_tunable(name).name: str(text) for name, text in texts.items()}
    status.carried.save()


def pause(status: Status, paused: Any) -> None:
    """Pause or resume prefetching.

    Raises:
        ValueError: the body does not say which.
    """
    if not isinstance(paused, bool):
        raise ValueError("paused")
    status.fetcher.pause(paused)
    status.carried.paused = paused
    status.carried.save()


def with_former_changes(options: MountOptions, carried: RuntimeChanges) -> MountOptions:
    """The options for a resuming worker: the mount's, with later changes."""
    try:
        options = _changed(options, carried.options)
    except OptionError as error:  # from another version, which had more options
        log.warning("options that were set at run time are ignored: %s", error)
    _use_log_level(options)
    return options


def _changed(options: MountOptions, texts: Mapping[str, Any]) -> MountOptions:
    changes = {}
    for name, text in texts.items():
        option = _tunable(name)
        changes[option.attribute] = option.parse(str(text), option.name)
    return dataclasses.replace(options, **changes)


def _tunable(name: str) -> Option:
    option = find_option(name)
    if option is None or option.name not in TUNABLE:
        raise OptionError(
            f"{name}: cannot be changed while mounted; these can: {', '.join(TUNABLE)}"
        )
    return option


def _use_log_level(options: MountOptions) -> None:
    logging.getLogger("lazyfs").setLevel(options.log_level.upper())
