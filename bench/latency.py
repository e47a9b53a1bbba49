"""Measures the latency of single calls on a mount. Runs as a process of its own.

    python bench/latency.py walk DIRECTORY
    python bench/latency.py small DIRECTORY COUNT
    python bench/latency.py metadata DIRECTORY

Prints one line of JSON. Times are in milliseconds; `ended` is on the monotonic clock.

    walk      lists everything below DIRECTORY and gets the size of each file
    small     opens, reads and closes COUNT files without weights, in a shuffled order that is
              always the same, after it has listed the directories
    metadata  until its standard input ends, makes a call every 2 ms that the kernel cannot answer
              itself: `stat` of a new name, `listdir`, or `statvfs`
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import select
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path


def quantile(times: list[float], share: float) -> float:
    """The smallest of `times` that at least this share of them does not exceed."""
    return sorted(times)[max(0, math.ceil(share * len(times)) - 1)]


def timed(call: Callable[[], object]) -> float:
    """Duration of a call in milliseconds."""
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1000


def walk(directory: Path) -> dict[str, float]:
    files = 0

    def visit(folder: str) -> None:
        nonlocal files
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    visit(entry.path)
                else:
                    files += entry.stat().st_size > 0

    took = timed(lambda: visit(str(directory)))
    return {"files": files, "walk_ms": took}


def small(directory: Path, count: int) -> dict[str, float]:
    paths = [path for path in directory.rglob("*") if path.suffix != ".safetensors"]
    files = sorted(path for path in paths if path.is_file())
    chosen = random.Random(1).sample(files, min(count, len(files)))
    times = [timed(path.read_bytes) for path in chosen]
    return {"p50_ms": quantile(times, 0.5), "p99_ms": quantile(times, 0.99), "max_ms": max(times)}


def metadata(directory: Path) -> dict[str, float]:
    def absent(number: int) -> None:
        if os.path.lexists(directory / f"absent-{os.getpid()}-{number}"):
            raise SystemExit("there is a file that cannot be there")

    times: defaultdict[str, list[float]] = defaultdict(list)
    for number in itertools.count():
        times["stat"].append(timed(lambda: absent(number)))  # noqa: B023
        times["listdir"].append(timed(lambda: list(directory.iterdir())))
        times["statvfs"].append(timed(lambda: os.statvfs(directory)))
        if select.select([sys.stdin], [], [], 0.002)[0]:
            break
    return {
        f"{name}_{label}": value
        for name, many in times.items()
        for label, value in (
            ("p50_ms", quantile(many, 0.5)), ("p99_ms", quantile(many, 0.99)),
            ("max_ms", max(many)), ("calls", float(len(many))),
        )
    }  # fmt: skip


def main() -> None:
    """Measure once and print one line of JSON."""
    mode, directory = sys.argv[1], Path(sys.argv[2])
    if mode == "walk":
        answer = walk(directory)
    elif mode == "small":
        answer = small(directory, int(sys.argv[3]))
    else:
        answer = metadata(directory)
    print(json.dumps({**answer, "ended": time.monotonic()}))


if __name__ == "__main__":
    main()
