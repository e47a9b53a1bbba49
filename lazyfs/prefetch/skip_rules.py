"""Predicts which tensors a loader skips.

A rank of a parallel group (pipeline, expert or other) goes through all shards but reads only some
of the tensors. So does a loader that wants one of two quantisations. What it skips in one layer it
skips in the next. So tensors are grouped by *role*: the name with its first number, which is the
layer, replaced. `model.layers.7.experts.3.up` has the role `model.layers.#.experts.3.up`.

After a number of consecutive skips of a role the next skip is expected, until a tensor of that role
is read. After two such wrong predictions nothing is predicted for the role any more.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict

MOST_ERRORS = 2
_NUMBER = re.compile(r"\d+")


def role_of(name: str) -> str:
    """The role of a tensor: its name without the number of its layer."""
    return _NUMBER.sub("#", name, count=1)


class SkipRules:
    """Counts skips and reads by role.

    Args:
        times: number of consecutive skips of a role after which the next skip is expected.
    """

    def __init__(self, times: int) -> None:
        self._times = times
        self._read: set[str] = set()
        self._passed: defaultdict[str, int] = defaultdict(int)
        self._errors: Counter[str] = Counter()

    def expects_skip(self, role: str) -> bool:
        """Whether the next tensor of the role is expected to be skipped."""
        return self._passed.get(role, 0) >= self._times

    def expects_read(self, role: str) -> bool:
        """Whether the last tensor of the role that a reader reached was read."""
        return role in self._read

    def passed(self, role: str) -> bool:
        """A tensor was skipped. Returns whether this is the skip that makes the next expected."""
        self._read.discard(role)
        if self._errors[role] == MOST_ERRORS:
            return False
        self._passed[role] += 1
        return self._passed[role] == self._times

    def read(self, role: str) -> bool:
        """A tensor was read. Returns whether a skip had been expected instead."""
        self._read.add(role)
        is_error = self._passed.pop(role, 0) >= self._times
        if is_error:
            self._errors[role] += 1
        return is_error
