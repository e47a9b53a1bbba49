"""What this process has open."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path


def descriptors() -> set[tuple[str, str]]:
    """The number of each descriptor of this process, and what it is of.

    What other tests have left behind is closed first, so that it is not closed between two calls.
    """
    gc.collect()
    found: set[tuple[str, str]] = set()
    for path in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.add((path.name, str(path.readlink())))
    return found
