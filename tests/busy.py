"""Processors that have no time to spare."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

SPIN = "import os; os.nice(19)\nwhile True: pass"


@contextlib.contextmanager
def busy_processors() -> Iterator[None]:
    """Keep them busy, with something of the lowest priority."""
    spinning = [
        subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(2 * (os.cpu_count() or 1))
    ]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()
