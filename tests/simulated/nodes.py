"""Loads on large nodes, with what lazyfs chooses there by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from lazyfs.machine import auto_memory, auto_movers, auto_requests
from lazyfs.options.mount_options import MountOptions
from simulated import loaders, models
from simulated.load import simulate
from simulated.loaders import Loader
from simulated.machine import Machine
from simulated.models import Model

GIB = 1 << 30
BLOCK = 8 << 20
# What a block takes of the worker's processor, in seconds, with and without a disk cache, whatever
# its size is; and what each further block of a batch does: docs/BENCHMARKS.md, "Movers".
WORKER_S = {"disk": (0.0029, 0.0009), "none": (0.0014, 0.0004)}
# Of a processor, in bytes a second: what `bench/scaling.py` shows of HTTPS and of HTTP.
RECEIVE = {"https": 1.1e9, "http": 2.5e9}


@dataclass(frozen=True, kw_only=True)
class Node:
    """A cold load.

    Attributes:
        gbit: of the link, a second.
        processors: of the node.
        size: of the model, in bytes.
        share: of the link that a load must get, from its first read to its last.
        disk_rate: of writes, bytes a second; None: without a disk cache.
        has_worker: the time that the worker itself needs counts. Without it, the policy is tried.
        block_size: in bytes.
    """

    gbit: int
    processors: int
    size: int
    share: float
    loader: Callable[[Model], Loader] = loaders.lazy
    scheme: str = "https"
    disk_rate: float | None = 3e9
    has_worker: bool = False
    block_size: int = BLOCK

    @property
    def _worker_s(self) -> tuple[float, float]:
        kind = "none" if self.disk_rate is None else "disk"
        return WORKER_S[kind] if self.has_worker else (0.0, 0.0)

    def run(self) -> float:
        """The share of the link that the load gets."""
        model = models.llama(self.size, max(4, self.size // (5 * GIB)), layers=64)
        link = self.gbit * 1e9 / 8
        machine = Machine(
            link=link, pages=512 * GIB, disk=None if self.disk_rate is None else 1 << 42,
            disk_read=1.5 * (self.disk_rate or 1), disk_write=self.disk_rate or 1,
            movers=auto_movers(self.processors), receive=RECEIVE[self.scheme],
            worker_s=self._worker_s[0], batched_s=self._worker_s[1],
        )  # fmt: skip
        memory = auto_memory(self.block_size, self.processors, 1 << 40)
        options = {
            "block-size": f"{self.block_size}B",
            "memory-limit": f"{memory}B",
            "max-concurrency": str(auto_requests(memory, self.block_size)),
            "movers": str(machine.movers),
        }
        loader = self.loader(model)
        loader.rate = 30e9
        report = simulate(model, loader, machine, MountOptions.parse(("{name}", options)))
        assert report.twice == 0
        return report.needed_bytes / report.seconds / link


# Quick enough for every run of the tests.
NODES: dict[str, Node] = {
    "10 Gbit/s": Node(gbit=10, processors=16, size=12 * GIB, share=0.95),
    "25 Gbit/s": Node(gbit=25, processors=32, size=24 * GIB, share=0.95),
    "100 Gbit/s": Node(gbit=100, processors=96, size=24 * GIB, share=0.9),
}
TENSOR_PARALLEL = partial(loaders.tensor_parallel, ranks=8, strided=False)
# By hand: bench/simulate.py nodes.
LARGE: dict[str, Node] = {
    **{
        f"{gbit} Gbit/s, 140 GiB, {name}": Node(
            gbit=gbit, processors=processors, size=140 * GIB, share=share, loader=loader,
            disk_rate=3e9 if gbit < 400 else None,
        )
        for gbit, processors, share in ((100, 96, 0.9), (200, 128, 0.9), (400, 192, 0.85))
        for name, loader in (
            ("vLLM", loaders.lazy), ("TP 8", TENSOR_PARALLEL),
            ("8 shards at once", partial(loaders.multithread, files=8)),
        )
    },
}  # fmt: skip
