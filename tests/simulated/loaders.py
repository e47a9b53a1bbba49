"""What loaders do, as reads that depend on each other.

A loader is some *queues* of jobs, worked on side by side. A queue has workers, each of which takes
the next *job*. A job is steps, one after another; a step is streams that run side by side, and
ends when all of them have: torch copies a tensor with all its threads, then the next tensor. A
stream is reads, one after another.
"""

from __future__ import annotations

import csv
import gzip
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from simulated.machine import PAGE
from simulated.models import TRACES, Model, spans

MIB = 1 << 20
SLICE = 64 << 10  # of a row that one rank of a tensor-parallel group reads


class Read(NamedTuple):
    """Bytes of a file.

    Attributes:
        asked: what the kernel asks for where they are not in the page cache; 0: them.
    """

    path: str
    offset: int
    size: int
    asked: int = 0


Stream = Sequence[Read]
Step = Sequence[Stream]
Job = Sequence[Step]


@dataclass(slots=True)
class Queue:
    """Jobs that some workers share."""

    jobs: list[Job]
    workers: int = 1


@dataclass(slots=True)
class Loader:
    """All that one load does.

    Attributes:
        rate: bytes a second that each stream takes at most.
        direct: it reads with O_DIRECT, past the page cache.
        path: of all files it opens; what it opens it reads.
    """

    queues: list[Queue]
    rate: float = 5e9
    direct: bool = False
    name: str = field(default="", compare=False)

    def reads(self) -> Iterator[Read]:
        """All reads, in no order that means anything."""
        for queue in self.queues:
            for job in queue.jobs:
                for step in job:
                    for stream in step:
                        yield from stream

    def shortest_s(self) -> float:
        """How long it takes with everything at hand."""
        return max(self._shortest_s(queue) for queue in self.queues)

    def _shortest_s(self, queue: Queue) -> float:
        lengths = [
            sum(max(sum(read.size for read in stream) for stream in step) for step in job)
            for job in queue.jobs
        ]
        return max(max(lengths), sum(lengths) / queue.workers) / self.rate


def replay(trace: str, outstanding: int = 4) -> Loader:
    """The reads of a recorded trace in their order, some at once."""
    with gzip.open(TRACES / f"{trace}.csv.gz", "rt") as file:
        jobs: list[Job] = [
            [[[Read(row["file"], int(row["offset"]), int(row["size"]))]]]
            for row in csv.DictReader(file)
            if row["op"] == "read"
        ]
    return Loader([Queue(jobs, outstanding)])


def cut(path: str, begin: int, end: int, unit: int = MIB) -> list[Read]:
    """Bytes `begin` to `end` as requests of whole pages, cut where the kernel cuts them."""
    at = begin - begin % PAGE
    reads = []
    while at < end:
        stop = min(at - at % unit + unit, end)
        reads.append(Read(path, at, stop - at))
        at = stop
    return reads


def header(model: Model, path: str) -> Step:
    """A look at the header; the kernel reads ahead from there if it has not got it."""
    return [[Read(path, 0, model.headers[path], min(MIB, model.sizes[path]))]]


def tensor(path: str, begin: int, end: int, threads: int) -> Step:
    """One tensor, copied by so many threads at once, each of which has a part of its own."""
    part = max(MIB, -(-(end - begin) // threads))
    return [cut(path, at, min(at + part, end)) for at in range(begin, end, part)]


def lazy(
    model: Model,
    threads: int = 2,
    *,
    paths: Sequence[str] | None = None,
    wanted: Callable[[str], bool] = lambda name: True,
) -> Loader:
    """vLLM's default: sorted shards, each one's header, then its tensors in order."""
    return Loader([Queue([_shard(model, path, threads, wanted) for path in paths or model.shards])])


def _shard(
    model: Model, path: str, threads: int, wanted: Callable[[str], bool] = lambda name: True
) -> Job:
    return [header(model, path)] + [
        tensor(path, begin, end, threads)
        for name, begin, end in spans(model, path)
        if end > begin and wanted(name)
    ]


def eager(model: Model) -> Loader:
    """Each shard read whole by plain reads (`--safetensors-load-strategy eager`)."""
    return Loader([Queue([[[cut(path, 0, model.sizes[path])] for path in model.shards]])])


def multithread(model: Model, files: int) -> Loader:
    """So many shards at once (`enable_multithread_load`)."""
    return Loader([Queue([_shard(model, path, 1) for path in model.shards], files)])


def pool(model: Model, threads: int) -> Loader:
    """All tensors of all shards, by a pool of threads that each take the next tensor (SGLang)."""
    jobs: list[Job] = [
        [tensor(path, begin, end, 1)]
        for path in model.shards
        for _, begin, end in spans(model, path)
        if end > begin
    ]
    return Loader([Queue([[header(model, path)] for path in model.shards] + jobs, threads)])


def tensor_parallel(model: Model, ranks: int, *, strided: bool) -> Loader:
    """Each rank goes through all shards and reads its part of each tensor.

    Args:
        strided: slices of columns: 64 KiB here and there all over the tensor; else of rows.
    """
    return Loader([Queue([_rank(model, rank, ranks, strided)]) for rank in range(ranks)])


def _rank(model: Model, rank: int, ranks: int, strided: bool) -> Job:
    steps: list[Step] = []
    for path in model.shards:
        steps.append(header(model, path))
        for _, begin, end in spans(model, path):
            if strided and end - begin > ranks * SLICE:
                touched = range(begin + rank * SLICE, end, ranks * SLICE)
                steps.append([[cut(path, at, min(at + SLICE, end))[0] for at in touched]])
            elif end > begin:
                part = -(-(end - begin) // ranks)
                steps.append([cut(path, begin + rank * part, min(begin + (rank + 1) * part, end))])
    return steps


def prefetching(model: Model, ranks: int, threads: int = 4) -> Loader:
    """Each rank reads its share of the shards whole while it loads all of them
    (`--safetensors-load-strategy prefetch`)."""
    queues = []
    for rank in range(ranks):
        share = [[[cut(path, 0, model.sizes[path])]] for path in model.shards[rank::ranks]]
        queues.append(Queue(list(share), threads))
        queues.append(Queue([_rank(model, rank, ranks, strided=False)]))
    return Loader(queues)


def streamer(model: Model, threads: int = 16, chunk: int = 8 * MIB) -> Loader:
    """Run:ai's: first all headers, then each thread a part of all bytes, with O_DIRECT."""
    chunks = [read for path in model.shards for read in cut(path, 0, model.sizes[path], chunk)]
    part = -(-len(chunks) // threads)
    requests = [cut(read.path, read.offset, read.offset + read.size) for read in chunks]
    parts = [
        [read for chunk in requests[at : at + part] for read in chunk]
        for at in range(0, len(requests), part)
    ]
    return Loader([Queue([[*(header(model, path) for path in model.shards), parts]])], direct=True)


def shuffled(model: Model, threads: int = 2, seed: int = 1) -> Loader:
    """All tensors of all shards in no order at all."""
    jobs: list[Job] = [
        [tensor(path, begin, end, threads)]
        for path in model.shards
        for _, begin, end in spans(model, path)
        if end > begin
    ]
    random.Random(seed).shuffle(jobs)
    return Loader([Queue([[header(model, path) for path in model.shards], *jobs])])


def backwards(model: Model, threads: int = 2) -> Loader:
    """The last tensor of the last shard first."""
    jobs = [list(reversed(_shard(model, path, threads)[1:])) for path in reversed(model.shards)]
    return Loader([Queue([[header(model, path) for path in model.shards], *jobs])])


def pipeline(rank: int, ranks: int, layers: int) -> Callable[[str], bool]:
    """What a rank of a pipeline-parallel group wants: its layers, and the ends if they are its."""

    def wanted(name: str) -> bool:
        if ".layers." not in name:
            return (rank == 0) if "embed" in name else (rank == ranks - 1)
        layer = int(name.split(".layers.")[1].split(".")[0])
        return layer * ranks // layers == rank

    return wanted


def expert_parallel(rank: int, ranks: int, count: int) -> Callable[[str], bool]:
    """What a rank of an expert-parallel group wants: its experts, and all that is no expert."""

    def wanted(name: str) -> bool:
        if ".experts." not in name:
            return True
        return int(name.split(".experts.")[1].split(".")[0]) * ranks // count == rank

    return wanted
