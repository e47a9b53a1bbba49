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
    """

    model: Callable[[], Model]
    loader: Callable[[Model], Loader]
    machine: Machine = field(default_factory=Machine)
    options: Mapping[str, str] = field(default_factory=dict)
    starts_s: float = 0.0
    rate: float = 5e9
    most_stall: float = 0.05
    most_waste: float = 0.01

    def run(self) -> Report:
        """Let it run."""
        model = self.model()
        loader = self.loader(model)
        loader.rate = self.rate
        options = MountOptions.parse(("{name}", self.options))
        return simulate(model, loader, self.machine, options, starts_s=self.starts_s)


recorded = cache(models.recorded)
dense = cache(partial(models.llama, 2 * GIB, 8))
large = cache(partial(models.llama, 6 * GIB, 16))

CASES: dict[str, Case] = {
    "recorded: vLLM, read-ahead 1 MiB": Case(
        model=recorded, loader=lambda _: loaders.replay("vllm-lazy-ra1024")
    ),
    "recorded: vLLM, read-ahead 128 KiB": Case(
        model=recorded, loader=lambda _: loaders.replay("vllm-lazy-ra128")
    ),
    **{
        f"vLLM, {threads} threads": Case(
            model=dense, loader=partial(loaders.lazy, threads=threads)
        )
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
}  # fmt: skip
