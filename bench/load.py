"""Loads a model directory in the way of a given program. Runs as a process of its own.

    python bench/load.py MODE DIRECTORY [--ranks N --rank R] [--trace FILE] [--against DIRECTORY]

Prints one line of JSON: `began`, `opened` and `ended` on the monotonic clock; bytes; processor
seconds from `opened` to `ended`; peak of resident memory. All processes of a machine share that
clock, so the caller can compute the time from the start of the mount to the last tensor.

Every byte is copied once, into memory that is reused for each tensor. So as much is moved as by a
loader that hands tensors to a GPU, and the allocator is not measured. Modes:

    vllm         the default loader of vLLM: shards sorted and mapped, one tensor after the other,
                 each copied by all threads at once, as in torch; each thread faults its own part.
                 With --ranks: the R-th of N processes that load one model (tensor parallelism)
    safetensors  `safe_open` and `get_tensor`
    transformers opens all shards and reads their headers, then one tensor after the other
    threads      four shards at once, mapped
    sequential   plain reads of 1 MiB
    direct       O_DIRECT, 8 threads, 8 MiB each, over all shards
    replay       the ranges of a recorded trace (see traces/README.md), mapped, in their order
    check        no load: compares pieces of every file with those of --against
"""

from __future__ import annotations

import time

BEGAN = time.monotonic()

import argparse  # noqa: E402 - the clock starts before anything is imported
import concurrent.futures  # noqa: E402
import csv  # noqa: E402
import gzip  # noqa: E402
import json  # noqa: E402
import mmap  # noqa: E402
import os  # noqa: E402
import random  # noqa: E402
import resource  # noqa: E402
import struct  # noqa: E402
import threading  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
from safetensors import safe_open  # noqa: E402

MIB = 1 << 20
CORES = os.cpu_count() or 1
Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


def shards(directory: Path) -> list[Path]:
    """The shards that vLLM would read, in its order."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return [directory / name for name in sorted(set(index["weight_map"].values()))]


def mapped(path: Path) -> Bytes:
    """The mapped bytes of a file."""
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)


def tensors(view: Bytes) -> Iterator[tuple[int, int]]:
    """Begin and end of each tensor of a mapped safetensors file, in order."""
    (length,) = struct.unpack("<Q", view[:8].tobytes())
    header = json.loads(view[8 : 8 + length].tobytes())
    header.pop("__metadata__", None)
    spans = (item["data_offsets"] for item in header.values())
    return ((8 + length + begin, 8 + length + end) for begin, end in sorted(spans))


class Copier:
    """Copies ranges into a buffer, which is reused and grows to the largest range."""

    def __init__(self, pool: concurrent.futures.Executor | None) -> None:
        self._pool = pool
        self._memory = np.zeros(0, np.uint8)

    def copy(self, view: Bytes) -> int:
        """Copy a range; with a pool, in all its threads at once."""
        if len(view) > len(self._memory):
            self._memory = np.zeros(len(view), np.uint8)
        if self._pool is None or len(view) < MIB:
            self._memory[: len(view)] = view
            return len(view)
        step = -(-len(view) // CORES)
        parts = [slice(at, min(at + step, len(view))) for at in range(0, len(view), step)]
        list(self._pool.map(lambda part: np.copyto(self._memory[part], view[part]), parts))
        return len(view)


def vllm(arguments: argparse.Namespace) -> int:
    size = 0
    with concurrent.futures.ThreadPoolExecutor(CORES) as pool:
        copier = Copier(pool)
        for path in shards(arguments.directory):
            view = mapped(path)
            for begin, end in tensors(view):
                share = (end - begin) / arguments.ranks
                first = begin + int(share * arguments.rank)
                size += copier.copy(view[first : begin + int(share * (arguments.rank + 1))])
    return size


def safetensors(arguments: argparse.Namespace) -> int:
    size = 0
    for path in shards(arguments.directory):
        with safe_open(path, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dict
                size += opened.get_tensor(name).nbytes
    return size


def transformers(arguments: argparse.Namespace) -> int:
    """Like `from_pretrained`: opens every shard before it loads from the first."""
    with concurrent.futures.ThreadPoolExecutor(CORES) as pool:
        views = [mapped(path) for path in shards(arguments.directory)]
        for view in views:
            next(tensors(view))
        copier = Copier(pool)
        return sum(copier.copy(view[a:b]) for view in views for a, b in tensors(view))


def threads(arguments: argparse.Namespace) -> int:
    def load(path: Path) -> int:
        copier, view = Copier(None), mapped(path)
        return sum(copier.copy(view[begin:end]) for begin, end in tensors(view))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return sum(pool.map(load, shards(arguments.directory)))


def sequential(arguments: argparse.Namespace) -> int:
    size = 0
    buffer = bytearray(MIB)
    for path in shards(arguments.directory):
        with open(path, "rb", buffering=0) as file:
            while got := file.readinto(buffer):
                size += got
    return size


def direct(arguments: argparse.Namespace) -> int:
    own = threading.local()

    def read(job: tuple[Path, int]) -> int:
        path, offset = job
        if not hasattr(own, "buffer"):
            own.buffer = mmap.mmap(-1, 8 * MIB)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            return os.preadv(descriptor, [own.buffer], offset)
        finally:
            os.close(descriptor)

    jobs = [
        (path, offset)
        for path in shards(arguments.directory)
        for offset in range(0, path.stat().st_size, 8 * MIB)
    ]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return sum(pool.map(read, jobs))


def replay(arguments: argparse.Namespace) -> int:
    """Replay the reads in order, with a thread for each processor of the recorded machine."""
    views: dict[str, Bytes] = {}
    own = threading.local()

    def read(row: dict[str, str]) -> int:
        if not hasattr(own, "copier"):
            own.copier = Copier(None)
        begin = int(row["offset"])
        return int(own.copier.copy(views[row["file"]][begin : begin + int(row["size"])]))

    with gzip.open(arguments.trace, "rt") as file:
        rows = [row for row in csv.DictReader(file) if row["op"] in ("open", "read")]
    for name in {row["file"] for row in rows}:
        views[name] = mapped(arguments.directory / name)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return sum(pool.map(read, (row for row in rows if row["op"] == "read")))


def check(arguments: argparse.Namespace) -> int:
    size, choice = 0, random.Random(1)
    for path in sorted(arguments.against.rglob("*.safetensors")):
        ours, theirs = mapped(arguments.directory / path.name), mapped(path)
        if len(ours) != len(theirs):
            raise SystemExit(f"{path.name}: {len(ours)} bytes instead of {len(theirs)}")
        for begin in [0, len(theirs) - MIB, *(choice.randrange(len(theirs)) for _ in range(16))]:
            piece = slice(max(0, begin), begin + MIB)
            if not np.array_equal(ours[piece], theirs[piece]):
                raise SystemExit(f"{path.name}: wrong bytes at {begin}")
            size += MIB
    return size


MODES: dict[str, Callable[[argparse.Namespace], int]] = {
    mode.__name__: mode
    for mode in (vllm, safetensors, transformers, threads, sequential, direct, replay, check)
}


def main() -> None:
    """Load once and print one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--against", type=Path)
    arguments = parser.parse_args()
    before, opened = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    size = MODES[arguments.mode](arguments)
    ended, after = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    answer = {"began": BEGAN, "opened": opened, "ended": ended, "bytes": size, "cpu_s": cpu,
              "peak_mib": after.ru_maxrss / 1024}  # fmt: skip
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
