"""Whole loads in modelled time: how much longer than they must, and how much for nothing."""

from __future__ import annotations

import tracemalloc

import pytest
import trio
from simulated import loaders, models
from simulated.cases import CASES
from simulated.load import simulate
from simulated.machine import Link, Machine, Unsent, nothing

from lazyfs.fetch.fetcher import BlockFetcher
from lazyfs.options.mount_options import MountOptions


@pytest.mark.parametrize("name", CASES)
def test_a_load_takes_little_longer_than_the_link_needs(name: str) -> None:
    case = CASES[name]
    report = case.run()
    assert report.stall <= case.most_stall
    assert report.waste <= case.most_waste
    assert report.twice == 0, "blocks were fetched a second time"
    if case.most_inversions is not None:
        assert report.inversions <= case.most_inversions, "what was needed later came sooner"


@pytest.fixture(scope="module")
def huge() -> models.Model:
    """200 GB in 2,000 shards: sizes and headers only."""
    return models.llama(200 * 10**9, 2000, layers=4000)


def test_a_model_of_2000_shards_begins_at_once(huge: models.Model) -> None:
    loader = loaders.lazy(huge, paths=huge.shards[1:9])
    machine = Machine(disk=None, pages=4 << 30)
    tracemalloc.start()
    report = simulate(huge, loader, machine)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert report.seconds < 10, "in the order of the reader, and not of all headers first"
    assert peak_bytes < 200 << 20


def test_headers_of_2000_shards_are_here_before_they_are_read(huge: models.Model) -> None:
    steps = [[[loaders.Read(path, 0, huge.headers[path], 1 << 20)]] for path in huge.shards]
    every = loaders.Loader([loaders.Queue([steps])])
    options = MountOptions.parse(("{name}", {"prefetch": "headers"}))
    report = simulate(huge, every, options=options, starts_s=20)
    assert report.fetched_bytes < 2000 * (64 << 10) + (64 << 20)
    assert report.requests == 0


def test_opening_shards_is_local_while_the_model_loads(huge: models.Model) -> None:
    """Also the last ones, of which no block comes for minutes."""
    steps = [[[loaders.Read(path, 0, huge.headers[path], 1 << 20)]] for path in huge.shards]
    every = loaders.Loader([loaders.Queue([steps])])
    assert simulate(huge, every, starts_s=20).requests == 0


def test_a_header_of_100_mb_costs_only_the_prefetch() -> None:
    model = models.Model()
    model.add("model.safetensors", (100_000_000).to_bytes(8, "little") + b"{", size=300_000_000)
    loader = loaders.Loader([loaders.Queue([[[loaders.cut("model.safetensors", 0, 300_000_000)]]])])
    tracemalloc.start()
    report = simulate(model, loader)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert report.stall < 0.2
    assert peak_bytes < 64 << 20, "it is not read into memory"
    assert report.twice == 0


def test_a_model_that_the_kernel_forgot_loads_as_fast_as_at_first() -> None:
    """Its blocks are nowhere but in S3, and it is asked for many at once."""
    model = models.llama(4 * 10**9, 4)
    machine = Machine(disk=None)
    first = simulate(model, loaders.lazy(model), machine)
    second = simulate(model, loaders.lazy(model), machine, again=True)
    assert second.twice == 0
    assert second.seconds <= first.seconds * 1.05


@pytest.mark.parametrize("answers", range(1, 100, 7))
@pytest.mark.parametrize("steps", range(5))
def test_a_mount_may_end_while_an_answer_is_taken(
    answers: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has got a block already takes his last steps, and what he needs for them is there."""

    class Ending(Link):
        async def run(self) -> None:
            nursery = trio.lowlevel.current_task().parent_nursery
            assert nursery is not None
            self.nursery, self.left = nursery, answers
            await super().run()

        async def transfer(self, size: int, unsent: Unsent = nothing) -> None:
            await super().transfer(size, unsent)
            self.left -= 1
            if self.left == 0:
                self.nursery.start_soon(self.end)

        async def end(self) -> None:
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            self.nursery.cancel_scope.cancel()

    monkeypatch.setattr("simulated.load.Link", Ending)
    model = models.llama(10**9, 2, layers=16)
    options = MountOptions.parse(("{name}", {"prefetch": "off"}))
    report = simulate(model, loaders.tensor_parallel(model, 2, strided=True), options=options)
    assert report.seconds == 0, "the load did not end"


def test_nothing_is_started_when_the_mount_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread of a second request may come back as the very last, and give back its room."""
    made: list[BlockFetcher] = []
    answers: list[int] = []

    class Kept(BlockFetcher):
        def start(self, nursery: trio.Nursery) -> None:
            super().start(nursery)
            made.append(self)

    class Ending(Link):
        async def run(self) -> None:
            self.nursery = trio.lowlevel.current_task().parent_nursery
            await super().run()

        async def transfer(self, size: int, unsent: Unsent = nothing) -> None:
            await super().transfer(size, unsent)
            answers.append(size)
            if len(answers) == 20 and self.nursery is not None:
                self.nursery.cancel_scope.cancel()

    monkeypatch.setattr("simulated.load.BlockFetcher", Kept)
    monkeypatch.setattr("simulated.load.Link", Ending)
    model = models.llama(10**9, 2, layers=16)
    options = MountOptions.parse(("{name}", {"memory-limit": "64MiB"}))
    simulate(model, loaders.tensor_parallel(model, 2, strided=True), options=options)

    async def come_back() -> None:
        made[0]._memory.release(options.memory_limit)
        made[0].pump()

    trio.run(come_back)


@pytest.mark.parametrize("header_bytes", [100 << 10, 900 << 10, 3 << 20])
def test_a_long_header_is_fetched_once(header_bytes: int) -> None:
    model = models.Model()
    for number in range(8):
        tensors = [(f"layers.{number * 8 + at:03}.w", 4 << 20) for at in range(8)]
        model.add_shard(f"model-{number + 1:05}-of-00008.safetensors", tensors, header_bytes)
    report = simulate(model, loaders.lazy(model))
    assert report.fetched_bytes <= 1.01 * report.needed_bytes
    assert report.twice == 0
