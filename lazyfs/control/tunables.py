"""What of a mount's options can be changed while it runs, `PUT /tunables`.

A change lasts until another worker serves the mount; then it is as it was mounted.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from lazyfs.control.status import Status
from lazyfs.errors import OptionError
from lazyfs.options import find_option

TUNABLE = ("log-level", "max-concurrency", "bandwidth-limit")


def tune(status: Status, texts: Mapping[str, Any]) -> None:
    """Change options of a running mount.

    Args:
        texts: by option name.

    Raises:
        OptionError: one cannot be changed, or not to that; then none is.
    """
    changes = {}
    for name, text in texts.items():
        option = find_option(name)
        if option is None or option.name not in TUNABLE:
            raise OptionError(
                f"{name}: cannot be changed while mounted; these can: {', '.join(TUNABLE)}"
            )
        changes[option.attribute] = option.parse(str(text), option.name)
    status.options = dataclasses.replace(status.options, **changes)
    if "log_level" in changes:
        logging.getLogger("lazyfs").setLevel(status.options.log_level.upper())
    if changes.keys() - {"log_level"}:
        status.fetcher.tune(status.options)
