"""Measures the cost of recording events and metrics.

    python bench/observing.py [--rate 1GB] [--block-size 8MiB] [--rounds 6 [--size 1GiB]]

With --rounds it loads through real mounts, in interleaved rounds (see ab.py, which needs root and
nginx): `base` is lazyfs with a recorder that ignores requests, blocks and reads, and `head` is
lazyfs as it is.

Without --rounds it measures the processor time of the recorder alone. It records a load in which
every block is fetched, pushed and read through the daemon in requests of 1 MiB, which is more than
happens in a real load, and compares that time with the duration of the load at a given rate. It
also measures for how long a report stops the event loop.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from lazyfs.blocks import BlockId, Span
from lazyfs.listed_object import File
from lazyfs.observe.events import Activity, Purpose
from lazyfs.observe.recorder import Recorder, Tier
from lazyfs.options.option_types import format_size, parse_size

BLOCKS = 20_000
REQUEST = 1 << 20
ROOT = Path(__file__).parent.parent
# State that other modules read from a recorder (requests in flight, open files, waits) is kept.
FORGETFUL = """

def _nothing(*_, **__): pass

EventRing.add = Histogram.observe = _nothing
Recorder.read = Recorder.landed = Recorder.pushed = Recorder.written = _nothing
"""


def tell(recorder: Recorder, file: File, number: int, block_size: int) -> None:
    """Record all events of one block."""
    block = BlockId(file.inode, number)
    recorder.prefetch_is(Activity.FETCHING)
    began_s = recorder.begun(block)
    asked_s = recorder.asked("get")
    recorder.answered("get", asked_s, block_size, failed=False)
    recorder.landed(file, block, block_size, Tier.S3, Purpose.AHEAD, began_s)
    recorder.pushed(file, block, block_size, recorder.clock())
    for start in range(0, block_size, REQUEST):
        span = Span(number, start, min(start + REQUEST, block_size))
        if not start:
            wait = recorder.begin_wait(file, span, coming=True)
            recorder.end_wait(wait, Tier.S3)
        recorder.read(file, span, Tier.MEMORY, recorder.clock())
    recorder.written(block_size)
    recorder.prefetch_is(Activity.NO_ROOM)


def main() -> None:
    """Measure and print the results."""
    parser = argparse.ArgumentParser(description="measure the cost of recording")
    parser.add_argument(
        "--rate", default="1GB", type=parse_size, help="rate of the load, per second"
    )
    parser.add_argument("--block-size", default="8MiB", type=parse_size)
    parser.add_argument("--rounds", type=int, help="rounds of loads through mounts")
    parser.add_argument("--size", default="1GiB", help="size of the model for the rounds")
    parser.add_argument(
        "--origins", nargs="+", default=["throttled"], help="origins for the rounds"
    )
    arguments = parser.parse_args()
    recorder = Recorder()
    file = File(5, 1, "f", "f", BLOCKS * arguments.block_size, "e", 0)
    began_s = time.process_time()
    for number in range(BLOCKS):
        tell(recorder, file, number, arguments.block_size)
    took_s = time.process_time() - began_s
    load_s = BLOCKS * arguments.block_size / arguments.rate
    print(
        f"{took_s / BLOCKS * 1e6:.1f} us a block; {took_s / load_s:.2%} of one processor in a load "
        f"at {format_size(arguments.rate)}/s"
    )
    began_s = time.perf_counter()
    size = len(recorder.events.dump())
    print(f"a report copies {format_size(size)} in {(time.perf_counter() - began_s) * 1e3:.1f} ms")
    if arguments.rounds:
        compare(arguments.rounds, arguments.size, arguments.origins)


def compare(rounds: int, size: str, origins: Sequence[str]) -> None:
    """Load through mounts that record events and mounts that do not."""
    with tempfile.TemporaryDirectory(prefix="lazyfs-observing-") as base:
        shutil.copytree(ROOT / "lazyfs", f"{base}/lazyfs")
        with open(f"{base}/lazyfs/observe/recorder.py", "a") as recorder:
            recorder.write(FORGETFUL)
        sys.stdout.flush()
        subprocess.run(
            [sys.executable, ROOT / "bench/ab.py", "--base", base, "--head", ROOT,
             "--origins", *origins, "--cache", "none", "--rounds", str(rounds),
             "--size", size],
            check=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
