"""Which tensors this loader passes over.

A rank of a pipeline-, expert- or otherwise parallel group goes through all shards and reads a part
of the tensors; so does a loader that wants one of two quantisations. What it passes over in one
layer it passes over in the next. So tensors are grouped by *role*: the name without its first
number, which is the layer; `model.layers.7.experts.3.up` is a `model.layers.#.experts.3.up`.
A role that was passed over so many times on end is expected to be passed over again, until one is
read. One that was wrongly expected so twice has no rule, and is not looked at any more.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict

MOST_ERRORS = 2
_NUMBER = re.compile(r"\d+")


def role_of(name: str) -> str:
    """The name of a tensor without its layer."""
    return _NUMBER.sub("#", name, count=1)


class Skips:
    """What was passed over, and what was read, by role.

    Args:
        times: how often on end a role must be passed over until that is expected.
    """

    def __init__(self, times: int) -> None:
        self._times = times
        self._read: set[str] = set()
        self._passed: defaultdict[str, int] = defaultdict(int)
        self._errors: Counter[str] = Counter()

    def expects(self, role: str) -> bool:
        """Whether the next tensor of the role will be passed over."""
        return self._passed.get(role, 0) >= self._times

    def expects_read(self, role: str) -> bool:
        """Whether the one of the role that was met last was read."""
        return role in self._read

    def passed(self, role: str) -> bool:
        """One was passed over; whether from now on that is expected."""
        self._read.discard(role)
        if self._errors[role] == MOST_ERRORS:
            return False
        self._passed[role] += 1
        return self._passed[role] == self._times

    def read(self, role: str) -> bool:
        """One was read; whether from now on that is expected, and was not before."""
        self._read.add(role)
        is_error = self._passed.pop(role, 0) >= self._times
        if is_error:
            self._errors[role] += 1
        return is_error
