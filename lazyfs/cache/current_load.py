"""The load that a cache directory serves, and which blocks may be evicted for it.

Blocks are evicted in the order of their last use, or last *announcement*: a mount announces the
blocks in its plan, the first ones last, so that these are evicted last. But a block is not evicted
for another one of the same load: blocks used or announced since the load began stay (for an hour at
most), and the new block is *declined*. So a cache smaller than a model keeps a part of it, instead
of evicting each block just before it is needed again. The exception are blocks that the load *gave
up*: its readers have read them, and no other process loads the content.
"""

from __future__ import annotations

import time

# A load has ended when the cache was not used for this time.
IDLE_S = 120.0
# Blocks used within the shorter time are never evicted; those used within the longer one are not
# evicted for the load that used them.
SHORTEST_STAY_S, LONGEST_STAY_S = 45.0, 3600.0
# During a load the blocks in the plan are announced again this often.
ANNOUNCE_S = 20.0
# After a block was declined, the next ones are too, for this time.
DECLINE_S = 1.0


class CurrentLoad:
    """The present load, or the last one.

    Attributes:
        times_given_up: how often blocks were given up.
    """

    def __init__(self) -> None:
        self.times_given_up = 0
        self._began = self._last_used = time.monotonic()
        self._announced = self._declined = float("-inf")

    def used(self) -> None:
        """The cache is used. After a long pause this is another load."""
        now = time.monotonic()
        if now > self._last_used + IDLE_S:
            self._began = now
        self._last_used = now

    @property
    def needs_announcement(self) -> bool:
        """Whether the blocks in the plan should be announced now."""
        now = time.monotonic()
        is_loading = now < self._last_used + IDLE_S
        return is_loading and now >= max(self._announced + ANNOUNCE_S, self._began)

    def announced(self) -> None:
        """The blocks in the plan were announced."""
        self._announced = time.monotonic()

    @property
    def may_leave_before_s(self) -> float:
        """Blocks used before this time (seconds since the epoch) may be evicted."""
        load_s = time.monotonic() - self._began
        if self._announced < self._began:
            load_s = LONGEST_STAY_S  # the needs of the load are not known yet
        return time.time() - min(max(load_s, SHORTEST_STAY_S), LONGEST_STAY_S)

    @property
    def is_declined(self) -> bool:
        """Whether a block was declined a moment ago: the next one would be, too."""
        return time.monotonic() < self._declined + DECLINE_S

    def declined(self, times_given_up: int) -> None:
        """A block was declined.

        Args:
            times_given_up: before room was looked for. If blocks were given up meanwhile, the next
                block may have room.
        """
        if times_given_up == self.times_given_up:
            self._declined = time.monotonic()

    def gave_up(self) -> None:
        """Blocks were given up: there may be room again."""
        self.times_given_up += 1
        self._declined = float("-inf")
