"""A fleet that loads one model, in modelled time: nodes, doors, shelves and S3.

Not lazyfs itself, but what its requests do to links: each node keeps as many requests in flight as
`window`, in the same order as all others. A block comes from the shelf that a ring of the node's
group says. That shelf has it from the shelf that a ring of all says, which has it from one GET of
S3 for all who ask meanwhile. Every link carries one thing after another. Sizes are bytes, rates
bytes a second.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from lazyfs.fleet.groups import groups

# Points of each server on the ring (nginx, ngx_http_upstream_hash_module.c).
POINTS = 160
# What happens to a node, and to a block.
(
    _STARTS, _ASKED, _ALLOWED, _TO_ROOT, _IN_ROOT, _AT_ROOT, _TO_SHELF, _IN_SHELF, _TO_NODE,
    _TO_MOUNT, _HERE,
) = range(11)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """What there is.

    Attributes:
        nodes: that load the model.
        fleet: they share their cache; else each asks S3.
        group: the most nodes that share one ring without groups.
        model, objects: its size, and the number of its shards.
        nic: what a node receives, and what it sends.
        mount: what one mount takes in.
        window: requests of a node in flight.
        connection: the most that one request gets of S3.
        latency_s: to the first byte of S3, on average.
        gets: that S3 answers in a second.
        origin: of S3's link, if it is scarce.
        spread_s: within which the nodes start.
        dead: the first so many shelves are gone, and what is theirs comes from the next ones.
    """

    nodes: int
    fleet: bool = True
    group: int = 32
    model: float = 140e9
    objects: int = 30
    block: int = 8 << 20
    nic: float = 12.5e9
    mount: float = 4e9
    window: int = 64
    connection: float = 90e6
    latency_s: float = 0.03
    gets: float = 5500.0
    origin: float | None = None
    spread_s: float = 2.0
    dead: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it went.

    Attributes:
        slowest_s: from the start of a node to its last block, of the slowest.
        copies: of the model that left S3.
        gets: that S3 answered, those of one byte included.
        stored: the largest share of the model that a node keeps.
    """

    slowest_s: float
    copies: float
    gets: int
    stored: float


class _Line:
    """Carries one thing after another."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free_s = 0.0

    def done_s(self, now_s: float, size: float) -> float:
        self._free_s = max(self._free_s, now_s) + size / self._rate
        return self._free_s


def _point(text: str) -> int:
    return int.from_bytes(hashlib.md5(text.encode()).digest()[:4], "big")


def _ring(nodes: Iterable[int], keys: int) -> list[int]:
    """Which of these shelves each of so many keys belongs to."""
    ring = sorted((_point(f"{node}-{number}"), node) for node in nodes for number in range(POINTS))
    places = [place for place, _ in ring]
    return [ring[bisect(places, _point(f"key{key}")) % len(ring)][1] for key in range(keys)]


def load(plan: Plan, seed: int = 1) -> Outcome:
    """Have all nodes load the model."""
    chance = random.Random(seed)
    blocks = max(1, round(plan.model / plan.block))
    receives = [_Line(plan.nic) for _ in range(plan.nodes)]
    sends = [_Line(plan.nic) for _ in range(plan.nodes)]
    mounts = [_Line(plan.mount) for _ in range(plan.nodes)]
    origin = _Line(plan.origin) if plan.origin else None
    answers = _Line(plan.gets)  # GETs are what it carries
    gets = fetched = 0

    queue: list[tuple[float, int, int, int]] = []  # when, what, node or group, block

    def then(at_s: float, what: int, whom: int, block: int) -> None:
        heapq.heappush(queue, (at_s, what, whom, block))

    def get_s(now_s: float, size: float) -> float:
        """When a GET that is made now has left S3."""
        nonlocal gets, fetched
        gets += 1
        fetched += size > 1
        begins_s = answers.done_s(now_s, 1) + plan.latency_s * chance.uniform(0.5, 1.5)
        over_s = begins_s + size / plan.connection
        return max(over_s, origin.done_s(now_s, size)) if origin else over_s

    names = [str(number) for number in range(plan.nodes)]
    of_group = groups(names, plan.group) if plan.fleet else dict.fromkeys(names, 0)
    group = [of_group[name] for name in names]
    living = range(plan.dead, plan.nodes)
    shelf: dict[int, list[int]] = {}
    root: list[int] = []
    if plan.fleet:
        root = _ring(living, blocks)
        for each in set(group):
            members = [node for node in living if group[node] == each]
            shelf[each] = root if len(set(group)) == 1 else _ring(members, blocks)

    at_root: set[int] = set()
    brought: defaultdict[int, list[int]] = defaultdict(list)  # groups that wait, by block
    at_shelf: set[tuple[int, int]] = set()
    waiting: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    verdicts: dict[tuple[int, int], float] = {}
    starts = [chance.uniform(0, plan.spread_s) for _ in range(plan.nodes)]
    asked = [0] * plan.nodes
    ended = [0.0] * plan.nodes

    def ask(now_s: float, node: int) -> None:
        if asked[node] < blocks:
            heapq.heappush(queue, (now_s, _ASKED, node, asked[node]))
            asked[node] += 1

    for node, start_s in enumerate(starts):
        then(start_s, _STARTS, node, 0)
    while queue:
        now_s, what, whom, block = heapq.heappop(queue)
        if what == _STARTS:
            # S3 says whether a node may have an object: one byte, when the header of its shard is
            # asked for.
            for number in range(plan.objects if plan.fleet else 0):
                verdicts[whom, number] = get_s(now_s, 1)
            for _ in range(min(plan.window, blocks)):
                ask(now_s, whom)
        elif what == _ASKED and not plan.fleet:
            then(get_s(now_s, plan.block), _TO_NODE, whom, block)
        elif what == _ASKED:
            allowed_s = max(now_s, verdicts[whom, block * plan.objects // blocks])
            then(allowed_s, _ALLOWED, whom, block)
        elif what == _ALLOWED:
            place = group[whom], block
            if place in at_shelf:
                then(sends[shelf[place[0]][block]].done_s(now_s, plan.block), _TO_NODE, whom, block)
                continue
            waiting[place].append(whom)
            if len(waiting[place]) > 1:
                continue  # its group is having it brought
            if block in at_root:
                then(now_s, _AT_ROOT, place[0], block)
                continue
            brought[block].append(place[0])
            if len(brought[block]) == 1:
                then(get_s(now_s, plan.block), _TO_ROOT, root[block], block)
        elif what == _TO_ROOT:
            then(receives[whom].done_s(now_s, plan.block), _IN_ROOT, whom, block)
        elif what == _IN_ROOT:
            at_root.add(block)
            for each in brought.pop(block):
                then(now_s, _AT_ROOT, each, block)
        elif what == _AT_ROOT:
            if root[block] == shelf[whom][block]:
                then(now_s, _IN_SHELF, whom, block)
            else:
                then(sends[root[block]].done_s(now_s, plan.block), _TO_SHELF, whom, block)
        elif what == _TO_SHELF:
            received_s = receives[shelf[whom][block]].done_s(now_s, plan.block)
            then(received_s, _IN_SHELF, whom, block)
        elif what == _IN_SHELF:
            at_shelf.add((whom, block))
            for each in waiting.pop((whom, block)):
                then(sends[shelf[whom][block]].done_s(now_s, plan.block), _TO_NODE, each, block)
        elif what == _TO_NODE:
            received_s = receives[whom].done_s(now_s, plan.block)
            then(received_s, _TO_MOUNT, whom, block)
        elif what == _TO_MOUNT:
            then(mounts[whom].done_s(now_s, plan.block), _HERE, whom, block)
        else:
            ended[whom] = now_s
            ask(now_s, whom)
    kept: Counter[int] = Counter(root)
    if len(shelf) > 1:
        for each in shelf.values():
            kept.update(each)
    return Outcome(
        slowest_s=max(end - start for end, start in zip(ended, starts, strict=True)),
        copies=fetched / blocks,
        gets=gets,
        stored=max(kept.values(), default=0) / blocks,
    )
