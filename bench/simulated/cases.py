"""The loads that are looked at, and what is demanded of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial

from lazyfs.options import MountOptions
from simulated import loaders, models
from simulated.load import Report, simulate
from simulated.loaders import Loader
from simulated.machine import Machine
from simulated.models import Model

GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Case:
    """One load.

    Attributes:
        model, loader: what is loaded and how.
        rate: bytes a second of each of the loader's streams.
        most_stall, most_waste: the bounds, as shares.
        most_twice: blocks that may be fetched twice.
    """

    model: Callable[[], Model]
    loader: Callable[[Model], Loader]
    machine: Machine = field(default_factory=Machine)
    options: Mapping[str, str] = field(default_factory=dict)
    starts_s: float = 0.0
    rate: float = 5e9
    most_stall: float = 0.05
    most_waste: float = 0.01
    most_twice: int = 0

    def run(self) -> Report:
        """Let it run."""
        model = self.model()
        loader = self.loader(model)
        loader.rate = self.rate
        options = MountOptions.parse(("{name}", self.options))
        return simulate(model, loader, self.machine, options, starts_s=self.starts_s)


recorded = cache(models.recorded)
# A policy that fetches ahead only what is likely to be read waits for it more often.
TENSOR = {"prefetch": "tensor"}
MEMORY_ONLY = Machine(disk=None, pages=0)

dense = cache(partial(models.llama, 2 * GIB, 8))
large = cache(partial(models.llama, 6 * GIB, 16))
mixture = cache(partial(models.experts, 4 * GIB, 8))
twice = cache(partial(models.with_consolidated, 2 * GIB, 8))
quantised = cache(partial(models.quantised, 4 * GIB, 8))

CASES: dict[str, Case] = {
    "recorded: vLLM, read-ahead 1 MiB": Case(
        model=recorded, loader=lambda _: loaders.replay("vllm-lazy-ra1024")
    ),
    "recorded: vLLM, read-ahead 128 KiB": Case(
        model=recorded, loader=lambda _: loaders.replay("vllm-lazy-ra128")
    ),
    **{
        f"vLLM, {threads} threads": Case(model=dense, loader=partial(loaders.lazy, threads=threads))
        for threads in (1, 2, 8, 32)
    },
    "vLLM, slower than the link": Case(model=dense, loader=loaders.lazy, rate=100e6),
    "vLLM, as fast as the link": Case(model=large, loader=loaders.lazy, rate=250e6),
    "vLLM, 20 s after mount": Case(model=dense, loader=loaders.lazy, starts_s=20),
    "eager": Case(model=dense, loader=loaders.eager),
    "4 shards at once": Case(model=dense, loader=partial(loaders.multithread, files=4)),
    "8 shards at once": Case(model=dense, loader=partial(loaders.multithread, files=8)),
    "pool of 32 threads": Case(model=dense, loader=partial(loaders.pool, threads=32)),
    **{
        f"tensor-parallel, {ranks} ranks, {kind}": Case(
            model=dense,
            loader=partial(loaders.tensor_parallel, ranks=ranks, strided=kind == "columns"),
        )
        for ranks in (2, 8)
        for kind in ("rows", "columns")
    },
    "vLLM's own prefetch, 2 ranks": Case(model=dense, loader=partial(loaders.prefetching, ranks=2)),
    "vLLM's own prefetch, 8 ranks": Case(model=dense, loader=partial(loaders.prefetching, ranks=8)),
    "O_DIRECT, 16 threads": Case(model=dense, loader=loaders.streamer, most_twice=4),
    "tensors in no order": Case(model=large, loader=loaders.shuffled, rate=10e9),
    "tensors backwards": Case(model=large, loader=loaders.backwards, rate=10e9),
    "tensor: vLLM": Case(model=dense, loader=loaders.lazy, options=TENSOR),
    "tensor: pool of 32 threads": Case(
        model=dense, loader=partial(loaders.pool, threads=32), options=TENSOR
    ),
    **{
        f"tensor: pipeline-parallel, rank {rank} of 2": Case(
            model=large,
            loader=partial(loaders.lazy, wanted=loaders.pipeline(rank, 2, 32)),
            options=TENSOR,
            most_stall=0.2,
            most_waste=0.1,
        )
        for rank in (0, 1)
    },
    **{
        f"tensor: expert-parallel, rank {rank} of 2": Case(
            model=mixture,
            loader=partial(loaders.lazy, wanted=loaders.expert_parallel(rank, 2, 64)),
            options=TENSOR,
            most_stall=1.0,
            most_waste=0.1,
        )
        for rank in (0, 1)
    },
    "tensor: expert-parallel, rank 3 of 8": Case(
        model=mixture,
        loader=partial(loaders.lazy, wanted=loaders.expert_parallel(3, 8, 64)),
        options=TENSOR,
        most_stall=1.0,
        most_waste=0.15,
    ),
    **{
        f"tensor: one of two quantisations, {kind}": Case(
            model=quantised,
            loader=partial(loaders.lazy, wanted=lambda name, kind=kind: name.endswith(kind)),
            options=TENSOR,
            most_stall=0.25,
            most_waste=0.1,
        )
        for kind in ("weight", "q8")
    },
    "other weights than expected": Case(
        model=twice,
        loader=lambda model: loaders.lazy(model, paths=model.named("consolidated")),
        most_stall=0.1,
        most_waste=0.3,
    ),
    "no disk": Case(model=dense, loader=loaders.lazy, machine=Machine(disk=None)),
    "memory only": Case(model=dense, loader=loaders.lazy, machine=MEMORY_ONLY),
    "memory only, 8 shards at once": Case(
        model=dense, loader=partial(loaders.multithread, files=8), machine=MEMORY_ONLY
    ),
    # 16 readers who ask for 8 MiB each have half of the memory at any moment.
    "memory only, O_DIRECT": Case(
        model=dense, loader=loaders.streamer, machine=MEMORY_ONLY, most_stall=0.1, most_twice=12
    ),
    "disk slower than the link": Case(
        model=dense,
        loader=loaders.lazy,
        machine=Machine(disk_write=100e6),
        options={"memory-limit": "192MiB"},
    ),
    "few pages, slower than the link": Case(
        model=dense,
        loader=loaders.lazy,
        machine=Machine(pages=512 * MIB),
        rate=100e6,
        most_stall=0.2,
    ),
    "small cache, 20 s after mount": Case(
        model=dense,
        loader=loaders.lazy,
        machine=Machine(pages=512 * MIB, disk=1 * GIB),
        starts_s=20,
        rate=100e6,
        most_stall=0.15,
    ),
}
