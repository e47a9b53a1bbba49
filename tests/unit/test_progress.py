"""Every load ends, whatever the kernel has locked, queued or not sent; in modelled time."""

from __future__ import annotations

import random

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated.load import simulate
from simulated.loaders import Loader, Queue, Read
from simulated.machine import PAGE, Machine
from simulated.models import Model

from lazyfs.options.mount_options import POLICIES, MountOptions

MIB = 1 << 20
# Reads of a load: enough to lock pages of all blocks many times over.
READS = 600


def load(
    *, files: int, blocks: int, block_size: int, memory: int, threads: int, unit: int, order: str,
    seed: int, background: int, pages: int, disk: bool, policy: str,
) -> None:  # fmt: skip
    """Many threads read pages of a model in an order that suits nobody; sizes are MiB."""
    model = Model()
    for number in range(files):
        model.add(f"weights-{number}.bin", b"", size=blocks * block_size * MIB)
    reads = [
        Read(path, offset, PAGE, unit)
        for path in sorted(model.sizes)
        for offset in range(0, blocks * block_size * MIB, PAGE)
    ]
    chosen = random.Random(seed)
    reads = [reads[at] for at in sorted(chosen.sample(range(len(reads)), min(READS, len(reads))))]
    if order == "shuffled":
        chosen.shuffle(reads)
    elif order == "strided":
        reads = [read for start in range(threads) for read in reads[start::threads]]
    elif order == "backwards":
        reads.reverse()
    options = {
        "block-size": f"{block_size}MiB", "memory-limit": f"{memory}MiB", "prefetch": policy,
    }  # fmt: skip
    simulate(
        model,
        Loader([Queue([[[[read]]] for read in reads], threads)]),
        Machine(pages=pages * MIB, disk=1 << 40 if disk else None, max_background=background),
        MountOptions.parse(("{name}", options)),
    )


@given(
    files=st.integers(1, 4),
    blocks=st.integers(1, 12),
    block_size=st.sampled_from([1, 8, 16]),
    memory=st.sampled_from([64, 128]),
    threads=st.sampled_from([1, 2, 8, 32, 256]),
    unit=st.sampled_from([PAGE, 2 * PAGE, 4 * PAGE, MIB]),
    order=st.sampled_from(["as they lie", "shuffled", "strided", "backwards"]),
    seed=st.integers(0, 1000),
    background=st.sampled_from([1, 2, 12, 1024]),
    pages=st.sampled_from([16, 64, 1024]),
    disk=st.booleans(),
    policy=st.sampled_from(POLICIES),
)
@settings(max_examples=40, deadline=None)
def test_every_load_ends(**load_of: object) -> None:
    load(**load_of)  # type: ignore[arg-type]


HARDEST = {
    "files": 2, "blocks": 8, "block_size": 8, "memory": 64, "threads": 256, "unit": 2 * PAGE,
    "order": "shuffled", "seed": 5, "background": 12, "pages": 1024,
}  # fmt: skip


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_load_stops_if_pushes_may_hold_all_memory(
    policy: str, disk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it would prove nothing."""
    load(**HARDEST, policy=policy, disk=disk)  # type: ignore[arg-type]
    monkeypatch.setattr("lazyfs.pagecache.block_pusher.SHARE", 1.0)
    monkeypatch.setattr("simulated.load.LONGEST_S", 300)
    with pytest.raises(trio.TooSlowError):
        load(**HARDEST, policy=policy, disk=disk)  # type: ignore[arg-type]
