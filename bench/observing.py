"""What it costs that a mount records what it does: processor time of the recorder for a load.

    python bench/observing.py [--rate 1GB] [--block-size 8MiB]

Tells a recorder what it is told of a load whose every block is fetched, pushed and read through the
daemon in requests of 1 MiB, which is more than happens in a real one, and sets the time against the
time that the load takes at a rate. Also the time for which a report stops the loop.
"""

from __future__ import annotations

import argparse
import time

from lazyfs.blocks import BlockId, Span
from lazyfs.kinds import format_size, parse_size
from lazyfs.observe.events import Activity, Purpose
from lazyfs.observe.recorder import Recorder, Tier
from lazyfs.tree import File

BLOCKS = 20_000
REQUEST = 1 << 20


def tell(recorder: Recorder, file: File, number: int, block_size: int) -> None:
    """All that a recorder is told of one block."""
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
    """Measure, and print."""
    parser = argparse.ArgumentParser(description="the cost of observing")
    parser.add_argument("--rate", default="1GB", type=parse_size, help="of the load, a second")
    parser.add_argument("--block-size", default="8MiB", type=parse_size)
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


if __name__ == "__main__":
    main()
