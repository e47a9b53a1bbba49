"""Whether a model is being loaded, so that what need not be done now is better put off. Pure."""

from __future__ import annotations

import math

# Whoever mounts a model loads it: a reader is expected for so long.
EXPECTED_S = 5.0
# After the last block came, a reader who keeps up needs so long for what lies before him.
BEHIND_S = 1.0


class Loading:
    """The load of one mount. Times are seconds of one clock."""

    def __init__(self) -> None:
        self._began_s = -math.inf
        self._landed_s = -math.inf
        self._was_opened = False
        # Somebody reads with O_DIRECT: what he had is not in the page cache afterwards.
        self._passes_by_pages = False

    def begun(self, now_s: float) -> None:
        """Blocks are fetched from now on."""
        self._began_s = now_s

    def opened(self, *, direct: bool) -> None:
        """A file was opened; `direct`: with O_DIRECT."""
        self._was_opened = True
        self._passes_by_pages |= direct

    def landed(self, now_s: float) -> None:
        """A block came."""
        self._landed_s = now_s

    def is_under_way(self, now_s: float, *, open_files: int, in_flight: int) -> bool:
        """Whether somebody loads through the page cache, or is about to.

        Args:
            open_files: how many handles there are.
            in_flight: how many blocks are being brought.
        """
        is_expected = not self._was_opened and now_s < self._began_s + EXPECTED_S
        is_fetched = not in_flight and now_s >= self._landed_s + BEHIND_S
        return (bool(open_files) or is_expected) and not is_fetched and not self._passes_by_pages
