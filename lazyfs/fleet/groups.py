"""Groups of the nodes of a large fleet. Pure.

All nodes request the same blocks at about the same time: as many blocks as a node has requests in
flight. With one ring, only the shelves of these blocks would send, and all others would be idle:
1,000 nodes would wait for 64 shelves. So a large fleet is divided. Each group has its own ring, and
its shelves get missing blocks from the ring of all nodes, each block once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def groups(nodes: Iterable[str], most: int) -> dict[str, int]:
    """The group of each node.

    All nodes compute the same groups, and few nodes change their group when others join or leave.

    Args:
        nodes: the addresses of all nodes.
        most: the average size of a group; a fleet of up to this many nodes is one group.
    """
    names = set(nodes)
    count = 1
    while count * most < len(names):
        count *= 2
    return {name: _number(name) % count for name in names}


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
