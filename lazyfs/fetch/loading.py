"""Whether a model is being loaded, so that what need not be done now is better put off. Pure."""

from __future__ import annotations

import math

# After the last block came, a reader who keeps up needs so long for what lies before him.
BEHIND_S = 1.0


class Loading:
    """The load of one mount. Times are seconds of one clock."""

    def __init__(self) -> None:
        self._landed_s = -math.inf
        # Somebody reads with O_DIRECT: what he had is not in the page cache afterwards.
        self._passes_by_pages = False

    def opened(self, *, direct: bool) -> None:
        """A file was opened; `direct`: with O_DIRECT."""
        self._passes_by_pages |= direct

    def landed(self, now_s: float) -> None:
        """A block came."""
        self._landed_s = now_s

    def is_under_way(self, now_s: float, *, open_files: int, in_flight: int) -> bool:
        """Whether somebody loads through the page cache.

        Before a file is opened nobody knows whether its reader will find what lies there.

        Args:
            open_files: how many handles there are.
            in_flight: how many blocks are being brought.
        """
        is_fetched = not in_flight and now_s >= self._landed_s + BEHIND_S
        return bool(open_files) and not is_fetched and not self._passes_by_pages
