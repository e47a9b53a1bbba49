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
_ALLOWED, _TO_ROOT, _IN_ROOT, _AT_ROOT, _TO_SHELF, _IN_SHELF, _TO_NODE, _HERE, _STARTS = range(9)
# Where a block is, as a group sees it.
_AWAY, _ON_ITS_WAY, _THERE = range(3)


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


def _point(text: str) -> int:
    return int.from_bytes(hashlib.md5(text.encode()).digest()[:4], "big")


def _ring(nodes: Iterable[int], keys: int) -> list[int]:
    """Which of these shelves each of so many keys belongs to."""
    ring = sorted((_point(f"{node}-{number}"), node) for node in nodes for number in range(POINTS))
    places = [place for place, _ in ring]
    return [ring[bisect(places, _point(f"key{key}")) % len(ring)][1] for key in range(keys)]


def load(plan: Plan, seed: int = 1) -> Outcome:
    """Have all nodes load the model.

    1,000 nodes get 17 million blocks, with two events each. So a line that carries one thing after
    another is only the time at which it is free, and an event is two numbers.
    """
    chance = random.Random(seed)
    nodes, size = plan.nodes, plan.block
    blocks = max(1, round(plan.model / size))
    on_nic_s, in_mount_s = size / plan.nic, size / plan.mount
    # When the lines of each node, and of S3, are free.
    receives, sends, mounts = [0.0] * nodes, [0.0] * nodes, [0.0] * nodes
    origin_s = answers_s = 0.0
    gets = fetched = 0

    queue: list[tuple[float, int]] = []  # when; what, node or group, and block as one number
    push, pop = heapq.heappush, heapq.heappop

    def then(at_s: float, what: int, whom: int, block: int) -> None:
        push(queue, (at_s, (what * nodes + whom) * blocks + block))

    def get_s(now_s: float, size: float) -> float:
        """When a GET that is made now has left S3."""
        nonlocal gets, fetched, origin_s, answers_s
        gets += 1
        fetched += size > 1
        answers_s = max(answers_s, now_s) + 1 / plan.gets
        begins_s = answers_s + plan.latency_s * chance.uniform(0.5, 1.5)
        over_s = begins_s + size / plan.connection
        if not plan.origin:
            return over_s
        origin_s = max(origin_s, now_s) + size / plan.origin
        return max(over_s, origin_s)

    names = [str(number) for number in range(nodes)]
    of_group = groups(names, plan.group) if plan.fleet else dict.fromkeys(names, 0)
    group = [of_group[name] for name in names]
    living = range(plan.dead, nodes)
    shelf: dict[int, list[int]] = {}
    root: list[int] = []
    if plan.fleet:
        root = _ring(living, blocks)
        for each in set(group):
            members = [node for node in living if group[node] == each]
            shelf[each] = root if len(set(group)) == 1 else _ring(members, blocks)

    at_root = bytearray(blocks)
    brought: defaultdict[int, list[int]] = defaultdict(list)  # groups that wait, by block
    at_shelf = {each: bytearray(blocks) for each in set(group)}
    waiting: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    verdicts = [[0.0] * plan.objects for _ in range(nodes)]
    starts = [chance.uniform(0, plan.spread_s) for _ in range(nodes)]
    asked = [0] * nodes
    ended = [0.0] * nodes

    def ask(now_s: float, node: int) -> None:
        """Request the next block."""
        block = asked[node]
        if block == blocks:
            return
        asked[node] += 1
        if not plan.fleet:
            then(get_s(now_s, size), _TO_NODE, node, block)
            return
        allowed_s = verdicts[node][block * plan.objects // blocks]
        if allowed_s > now_s:
            then(allowed_s, _ALLOWED, node, block)
        else:
            allowed(now_s, node, block)

    def allowed(now_s: float, node: int, block: int) -> None:
        its = group[node]
        state = at_shelf[its][block]
        if state == _THERE:
            send(now_s, shelf[its][block], _TO_NODE, node, block)
            return
        waiting[its, block].append(node)
        if state == _ON_ITS_WAY:
            return
        at_shelf[its][block] = _ON_ITS_WAY
        if at_root[block] == _THERE:
            then(now_s, _AT_ROOT, its, block)
            return
        brought[block].append(its)
        if len(brought[block]) == 1:
            then(get_s(now_s, size), _TO_ROOT, root[block], block)

    def send(now_s: float, node: int, what: int, whom: int, block: int) -> None:
        free_s = sends[node]
        free_s = sends[node] = (free_s if free_s > now_s else now_s) + on_nic_s
        push(queue, (free_s, (what * nodes + whom) * blocks + block))

    def receive_s(now_s: float, node: int) -> float:
        free_s = receives[node]
        free_s = receives[node] = (free_s if free_s > now_s else now_s) + on_nic_s
        return free_s

    for node, start_s in enumerate(starts):
        then(start_s, _STARTS, node, 0)
    while queue:
        now_s, code = pop(queue)
        code, block = divmod(code, blocks)
        what, whom = divmod(code, nodes)
        if what == _HERE:
            ended[whom] = now_s
            ask(now_s, whom)
        elif what == _TO_NODE:
            # A mount takes blocks in as they come.
            received_s, free_s = receive_s(now_s, whom), mounts[whom]
            mounts[whom] = (free_s if free_s > received_s else received_s) + in_mount_s
            then(mounts[whom], _HERE, whom, block)
        elif what == _ALLOWED:
            allowed(now_s, whom, block)
        elif what == _STARTS:
            # S3 says whether a node may have an object: one byte, when the header of its shard is
            # asked for.
            for number in range(plan.objects if plan.fleet else 0):
                verdicts[whom][number] = get_s(now_s, 1)
            for _ in range(min(plan.window, blocks)):
                ask(now_s, whom)
        elif what == _TO_ROOT:
            then(receive_s(now_s, whom), _IN_ROOT, whom, block)
        elif what == _IN_ROOT:
            at_root[block] = _THERE
            for each in brought.pop(block):
                then(now_s, _AT_ROOT, each, block)
        elif what == _AT_ROOT:
            if root[block] == shelf[whom][block]:
                then(now_s, _IN_SHELF, whom, block)
            else:
                send(now_s, root[block], _TO_SHELF, whom, block)
        elif what == _TO_SHELF:
            then(receive_s(now_s, shelf[whom][block]), _IN_SHELF, whom, block)
        else:
            at_shelf[whom][block] = _THERE
            for each in waiting.pop((whom, block)):
                send(now_s, shelf[whom][block], _TO_NODE, each, block)
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
