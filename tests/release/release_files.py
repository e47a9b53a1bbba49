"""What `make release` built, and the model that is mounted with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazyfs import __version__

DIST = Path(__file__).parents[2] / "dist" / __version__
MODEL = {
    "m/config.json": b"{}",
    "m/weights.bin": bytes(range(256)) * 4096 * 40,  # 40 MiB
}


def built(pattern: str) -> Path:
    """The one file of the release that matches."""
    found = sorted(DIST.glob(pattern))
    if not found:
        pytest.skip(f"no {pattern} in {DIST}: `make release` builds it")
    return found[-1]
