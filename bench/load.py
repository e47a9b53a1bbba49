"""Reads a model directory as loaders do, in a process of its own, and says how long it took.

    python bench/load.py MODE DIRECTORY

Modes:

    vllm        vLLM's default: sorted shards, each file's tensors in order, every tensor copied
                out of the mapped file by all cores at once, as torch does it
    safetensors the same with `safetensors.safe_open` and numpy, one thread
    sequential  plain reads of 1 MiB
    direct      O_DIRECT, 8 threads, 8 MiB each, over all shards
    threads     4 shards at once, mapped
"""

from __future__ import annotations

import concurrent.futures
import json
import mmap
import os
import resource
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

MIB = 1 << 20
CORES = os.cpu_count() or 1


def shards(directory: Path) -> list[Path]:
    """What vLLM would read, in its order."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return [directory / name for name in sorted(set(index["weight_map"].values()))]


def tensors(mapped: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Begin and end of each tensor of a mapped safetensors file, in order."""
    (length,) = struct.unpack("<Q", mapped[:8])
    header = json.loads(mapped[8 : 8 + length])
    header.pop("__metadata__", None)
    spans = (item["data_offsets"] for item in header.values())
    return ((8 + length + begin, 8 + length + end) for begin, end in sorted(spans))


def copy_mapped(path: Path, pool: concurrent.futures.Executor | None) -> int:
    """Copy every tensor of a file out of its mapping; with a pool, all its threads share one."""
    size = 0
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    view = np.frombuffer(mapped, np.uint8)
    for begin, end in tensors(mapped):
        target = np.empty(end - begin, np.uint8)
        if pool is None or end - begin < MIB:
            target[:] = view[begin:end]
        else:
            step = -(-(end - begin) // CORES)
            parts = [slice(at, min(at + step, end - begin)) for at in range(0, end - begin, step)]
            list(pool.map(lambda p: np.copyto(target[p], view[begin:end][p]), parts))  # noqa: B023
        size += end - begin
    return size


def vllm(directory: Path) -> int:
    with concurrent.futures.ThreadPoolExecutor(CORES) as pool:
        return sum(copy_mapped(path, pool) for path in shards(directory))


def threads(directory: Path) -> int:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return sum(pool.map(lambda path: copy_mapped(path, None), shards(directory)))


def safetensors(directory: Path) -> int:
    from safetensors import safe_open

    size = 0
    for path in shards(directory):
        with safe_open(path, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dict
                size += opened.get_tensor(name).nbytes
    return size


def sequential(directory: Path) -> int:
    size = 0
    buffer = bytearray(MIB)
    for path in shards(directory):
        with open(path, "rb", buffering=0) as file:
            while got := file.readinto(buffer):
                size += got
    return size


def direct(directory: Path) -> int:
    def read(job: tuple[Path, int]) -> int:
        path, offset = job
        buffer = mmap.mmap(-1, 8 * MIB)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            return os.preadv(descriptor, [buffer], offset)
        finally:
            os.close(descriptor)
            buffer.close()

    jobs = [
        (path, offset)
        for path in shards(directory)
        for offset in range(0, path.stat().st_size, 8 * MIB)
    ]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return sum(pool.map(read, jobs))


MODES = {mode.__name__: mode for mode in (vllm, threads, safetensors, sequential, direct)}


def main() -> None:
    """Load once; one line of JSON."""
    mode, directory = MODES[sys.argv[1]], Path(sys.argv[2])
    began = time.perf_counter()
    size = mode(directory)
    seconds = time.perf_counter() - began
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu = usage.ru_utime + usage.ru_stime
    print(json.dumps({"seconds": seconds, "bytes": size, "cpu_s": cpu}))


if __name__ == "__main__":
    main()
