"""The loads that are looked at, and what is demanded of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial

from lazyfs.options.mount_options import MountOptions
from simulated import loaders, models
from simulated.load import SMALL, Report, simulate
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
        most_inversions: the bound of blocks that come too late; None: in what order they are
            wanted cannot be known.
    """

    model: Callable[[], Model]
    loader: Callable[[Model], Loader]
    machine: Machine = field(default_factory=Machine)
    options: Mapping[str, str] = field(default_factory=dict)
    starts_s: float = 0.0
    rate: float = 5e9
    most_stall: float = 0.05
    most_waste: float = 0.01
    most_inversions: int | None = 2

    def run(self) -> Report:
        """Let it run."""
        model = self.model()
        loader = self.loader(model)
        loader.rate = self.rate
        options = MountOptions.parse(("{name}", {**SMALL, **self.options}))
        return simulate(model, loader, self.machine, options, starts_s=self.starts_s)


recorded = cache(models.recorded)
TENSOR = {"prefetch": "tensor"}
# A loader imports its libraries before it reads; of this policy only headers come meanwhile.
IMPORTED_S = 1.0
# Nothing but a loader's reading on shows what it passes over. By then a round trip's worth of
# blocks is under way, 0.12 s of the link, some of it for nothing; and what follows is asked for a
# round trip late. Of 2.6 s, a rank of 8 with 16 layers, that is more than 5 %; of 48 layers less.
LEARNING = 0.085
# Readers who are at several places do not say who of them is next.
SIDE_BY_SIDE = 16
MEMORY_ONLY = Machine(disk=None, pages=0)

dense = cache(partial(models.llama, 2 * GIB, 8))
large = cache(partial(models.llama, 6 * GIB, 16))
mixture = cache(partial(models.experts, 4 * GIB, 8))
deep_mixture = cache(partial(models.experts, 12 * GIB, 24, layers=48))
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
    "4 shards at once": Case(
        model=dense, loader=partial(loaders.multithread, files=4), most_inversions=SIDE_BY_SIDE
    ),
    "8 shards at once": Case(
        model=dense, loader=partial(loaders.multithread, files=8), most_inversions=SIDE_BY_SIDE
    ),
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
    "O_DIRECT, 16 threads": Case(
        model=dense, loader=loaders.streamer, most_inversions=SIDE_BY_SIDE
    ),
    "tensors in no order": Case(
        model=large, loader=loaders.shuffled, rate=10e9, most_inversions=None
    ),
    "tensors backwards": Case(
        model=large, loader=loaders.backwards, rate=10e9, most_inversions=None
    ),
    "tensor: vLLM": Case(model=dense, loader=loaders.lazy, options=TENSOR, starts_s=IMPORTED_S),
    "tensor: pool of 32 threads": Case(
        model=dense,
        loader=partial(loaders.pool, threads=32),
        options=TENSOR,
        starts_s=IMPORTED_S,
    ),
    **{
        f"tensor: pipeline-parallel, rank {rank} of 2": Case(
            model=large,
            loader=partial(loaders.lazy, wanted=loaders.pipeline(rank, 2, 32)),
            options=TENSOR,
            starts_s=IMPORTED_S,
            most_waste=0.1,
        )
        for rank in (0, 1)
    },
    **{
        f"tensor: expert-parallel, rank {rank} of {ranks}{deep}": Case(
            model=model,
            loader=partial(loaders.lazy, wanted=loaders.expert_parallel(rank, ranks, 64)),
            options=TENSOR,
            starts_s=IMPORTED_S,
            most_stall=0.05 if deep else LEARNING,
            most_waste=0.1,
        )
        for model, deep in ((mixture, ""), (deep_mixture, ", 48 layers"))
        for rank, ranks in ((0, 2), (1, 2), (3, 8))
    },
    **{
        f"tensor: one of two quantisations, {kind}": Case(
            model=quantised,
            loader=partial(loaders.lazy, wanted=lambda name, kind=kind: name.endswith(kind)),
            options=TENSOR,
            starts_s=IMPORTED_S,
            most_waste=0.1,
        )
        for kind in ("weight", "q8")
    },
    "other weights than expected": Case(
        model=twice,
        loader=lambda model: loaders.lazy(model, paths=model.named("consolidated")),
    ),
    "no disk": Case(model=dense, loader=loaders.lazy, machine=Machine(disk=None)),
    "memory only": Case(model=dense, loader=loaders.lazy, machine=MEMORY_ONLY),
    "memory only, 8 shards at once": Case(
        model=dense, loader=partial(loaders.multithread, files=8), machine=MEMORY_ONLY
    ),
    "memory only, O_DIRECT": Case(
        model=dense, loader=loaders.streamer, machine=MEMORY_ONLY, most_inversions=SIDE_BY_SIDE
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
    ),
    **{
        f"small cache, 20 s after mount, {name}": Case(
            model=large,
            loader=partial(loaders.lazy, threads=threads),
            machine=Machine(pages=pages, disk=2 * GIB),
            starts_s=20,
            rate=rate,
        )
        for name, threads, rate, pages in (
            ("faster than the link", 2, 500e6, 512 * MIB),
            ("few pages", 2, 500e6, 256 * MIB),
            ("no pages", 8, 5e9, 0),
            ("8 threads", 8, 150e6, 512 * MIB),
        )
    },
    "small cache, 20 s after mount": Case(
        model=dense,
        loader=loaders.lazy,
        machine=Machine(pages=512 * MIB, disk=1 * GIB),
        starts_s=20,
        rate=100e6,
    ),
}
