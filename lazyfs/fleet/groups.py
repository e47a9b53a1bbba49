"""Groups of the nodes of a large fleet. Pure.

All nodes want the same blocks at about the same time, as many as each has requests in flight. With
one ring, as many shelves as there are such blocks send them to everybody, and the others rest:
1,000 nodes would wait for 64 shelves. So a large fleet is divided. Each group has a ring of its
own, and its shelves get what they do not have from the ring of all, each block once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def groups(nodes: Iterable[str], most: int) -> dict[str, int]:
    """The group of each node: the same on all nodes, and seldom another when some come or go.

    Args:
        nodes: their addresses.
        most: of a group, on average; up to so many nodes are one group.
    """
    names = set(nodes)
    count = 1
    while count * most < len(names):
        count *= 2
    return {name: _number(name) % count for name in names}


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
