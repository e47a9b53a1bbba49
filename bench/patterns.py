"""Checks that a model loads at the speed of the link, in whatever order it is read.

    python bench/patterns.py [--size 1GiB] [--link 250MB] [--late 20] [--repeat 3]

For each mode of `load.py` it makes a new mount, with nothing cached, against an origin with a
shaped link (`origin.py`, throttled). It prints the seconds from the start of the mount to the last
tensor, divided by size / bandwidth, as medians. Then it does the same for a loader that starts
`--late` seconds after the mount, and compares that with the same load from local files. Needs root,
and no other traffic on the loopback device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import origin as origins
from accounting import end_in_order, touch_memory, workplace
from model import write_model
from mounts import Lazyfs, Place, forget
from rich.console import Console
from rich.table import Table

from lazyfs.options.option_types import parse_size

HERE = Path(__file__).parent
MODES = ("vllm", "sequential", "safetensors", "transformers", "threads", "direct")
TIMEOUT_S = 120


def load(mode: str, directory: Path) -> dict[str, Any]:
    """Run a load in a process of its own."""
    answer = subprocess.run(
        [sys.executable, HERE / "load.py", mode, directory],
        check=True, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    result: dict[str, Any] = json.loads(answer.stdout)
    return result


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="Loads over a shaped link")
    parser.add_argument("--size", default="1GiB", type=parse_size)
    parser.add_argument("--link", default="250MB", type=parse_size)
    parser.add_argument("--late", default=20, type=int)
    parser.add_argument("--repeat", default=3, type=int)
    parser.add_argument("--only", nargs="+", default=list(MODES))
    arguments = parser.parse_args()
    end_in_order()
    table = Table("load", "seconds", "size / bandwidth", "over it", "fetched / size", box=None)
    lazyfs = Lazyfs(HERE.parent)
    with workplace("lazyfs-bench-") as base:
        served, source = base / "served", base / "served" / "model"
        mountpoint = base / "mnt"
        mountpoint.mkdir()
        size = write_model(source, arguments.size, 6)
        with origins.serve(served, "throttled", arguments.link) as origin:
            place = Place(origin, source.name, mountpoint, base / "cache")
            least_s = size / arguments.link
            for mode in arguments.only:
                took_s, fetched = [], []
                for _ in range(arguments.repeat):
                    forget(place)
                    touch_memory()
                    origin.mark()
                    with lazyfs.mount(place) as mounted:
                        took_s.append(load(mode, mountpoint)["ended"] - mounted.began)
                    fetched.append(origin.requests().bytes / size)
                median_s = statistics.median(took_s)
                table.add_row(
                    mode, f"{median_s:.2f}", f"{least_s:.2f}", f"{median_s / least_s - 1:.1%}",
                    f"{statistics.median(fetched):.3f}",
                )  # fmt: skip
            late, local = [], []
            for _ in range(arguments.repeat):
                forget(place)
                with lazyfs.mount(place):
                    time.sleep(arguments.late)
                    late.append(load("vllm", mountpoint))
                local.append(load("vllm", source))
        for name, runs in ((f"vllm, {arguments.late} s after mount", late),
                           ("vllm, local files", local)):  # fmt: skip
            seconds = statistics.median(run["ended"] - run["opened"] for run in runs)
            table.add_row(name, f"{seconds:.2f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
