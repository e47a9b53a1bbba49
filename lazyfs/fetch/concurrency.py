"""How many ranged GETs to keep in flight. Pure: callers pass times and bytes; there is no clock.

The rule is hill climbing on throughput. A round is as many answers as the limit. In each round in
which requests were always waiting, the rate is measured. If a larger limit raised the rate, it is
kept and raised again. If it did not, it is taken back, and the next try waits for some rounds:
requests beyond what the link carries only make each other slower. When S3 throttles, the limit is
halved at once, but only once a round, because S3 refuses requests that are in flight together for
the same reason.
"""

from __future__ import annotations

START = 16
# Until a larger limit has brought nothing for the first time, and after that.
FIRST_GROWTH = 2.0
GROWTH = 1.5
WORTH = 1.05
ROUNDS_BEFORE_RETRY = 8


class Concurrency:
    """The limit of requests in flight.

    Args:
        most: the highest limit.
        start: the first limit.
    """

    def __init__(self, most: int, start: int = START) -> None:
        self.most = most
        self.limit = min(start, most)
        self._growth = FIRST_GROWTH
        # Requests that are in flight since before the last cut of the limit.
        self._sent_before_cut = 0
        self._before_growth: int | None = None
        self._rate_before_growth = 0.0
        self._rounds_to_wait = 0
        self._began_s = 0.0
        self._bytes = 0
        self._answers = 0

    @property
    def proven_limit(self) -> int:
        """The limit without a growth that has not raised the rate so far."""
        return self._before_growth or self.limit

    def answered(self, now_s: float, size_bytes: int, *, saturated: bool) -> None:
        """A request returned `size_bytes`; `saturated`: other requests were waiting."""
        self._sent_before_cut = max(0, self._sent_before_cut - 1)
        if not saturated or not self._answers:
            self._begin_round(now_s)
            self._answers = 1
            return
        self._answers += 1
        self._bytes += size_bytes
        if self._answers > self.limit and now_s > self._began_s:
            self._end_round(self._bytes / (now_s - self._began_s))
            self._begin_round(now_s)
            self._answers = 1

    def throttled(self) -> None:
        """S3 throttled a request.

        Requests that were in flight when the limit was cut do not cut it again.
        """
        if self._sent_before_cut > 0:
            self._sent_before_cut -= 1
            return
        self._sent_before_cut = self.limit - 1
        self.limit = max(1, self.limit // 2)
        self._growth = GROWTH
        self._before_growth = None
        self._rounds_to_wait = ROUNDS_BEFORE_RETRY
        self._answers = 0

    def _begin_round(self, now_s: float) -> None:
        self._began_s = now_s
        self._bytes = 0
        self._answers = 0

    def _end_round(self, rate: float) -> None:
        if self._before_growth is not None:
            if rate < self._rate_before_growth * WORTH:
                self.limit = self._before_growth
                self._growth = GROWTH
                self._rounds_to_wait = ROUNDS_BEFORE_RETRY
            self._before_growth = None
        if self._rounds_to_wait:
            self._rounds_to_wait -= 1
        elif self.limit < self.most:
            self._before_growth = self.limit
            self._rate_before_growth = rate
            self.limit = min(self.most, max(self.limit + 1, int(self.limit * self._growth)))


class HedgeTimer:
    """When a second request is better than waiting for the first one.

    After twice the usual slowest time, which is the mean plus four deviations of recent answers, as
    TCP times its retransmissions (RFC 6298); never before `least_s`.
    """

    def __init__(self, least_s: float = 1.0, unknown_s: float = 1.0) -> None:
        self._least_s = least_s
        self._mean_s = unknown_s / 2
        self._deviation_s = unknown_s / 8
        self.answers = 0

    def answered(self, took_s: float) -> None:
        """A request was answered after `took_s`."""
        self.answers += 1
        if self.answers == 1:
            self._mean_s, self._deviation_s = took_s, took_s / 2
            return
        self._deviation_s += (abs(took_s - self._mean_s) - self._deviation_s) / 4
        self._mean_s += (took_s - self._mean_s) / 8

    @property
    def usual_s(self) -> float:
        """How long an answer takes on average."""
        return self._mean_s

    @property
    def delay_s(self) -> float:
        """How long to wait for an answer before a second request."""
        return max(self._least_s, 2 * (self._mean_s + 4 * self._deviation_s))


class Pacer:
    """Delays requests to stay within a rate.

    Args:
        rate: bytes a second, or `off`.
    """

    def __init__(self, rate: int | str) -> None:
        self._rate = rate
        self._free_at_s = 0.0

    @property
    def limits(self) -> bool:
        """Whether there is a rate."""
        return isinstance(self._rate, int)

    def delay_s(self, now_s: float, size_bytes: int) -> float:
        """How long to wait before a request for `size_bytes`, which counts from now on."""
        if not isinstance(self._rate, int):
            return 0.0
        begin_s = max(now_s, self._free_at_s)
        self._free_at_s = begin_s + size_bytes / self._rate
        return begin_s - now_s
