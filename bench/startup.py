"""Compares the startup time of two versions of lazyfs in interleaved rounds.

    python bench/startup.py --base main [--head TREE] [--rounds 9] [--cache disk none]

The output has medians in milliseconds of the time from the command until

- the mount is ready (`lazyfs mount` returns),
- the first GET of a block reaches the origin (the model has only a few MiB, because this does not
  measure the link),

and of the processor time of all processes of the mount until it is ready, and until they are idle.
Needs root and nginx with Lua.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections import defaultdict

import origin as origins
from ab import ROOT, tree
from accounting import end_in_order, settle, workplace
from model import write_model
from mounts import Lazyfs, Place, forget

COLUMNS = ("ready", "first block", "CPU at ready", "CPU at rest")


def measure(lazyfs: Lazyfs, place: Place) -> tuple[float, ...]:
    """Measure one mount. Returns the columns in seconds."""
    forget(place)
    place.origin.mark()
    offset = time.time() - time.monotonic()
    with lazyfs.mount(place) as mounted:
        cpu = mounted.group.cpu_seconds()
        settle(mounted.group)
        first = place.origin.first_range() - offset - mounted.began
        return mounted.ready - mounted.began, first, cpu, mounted.group.cpu_seconds()


def main() -> None:
    """Compare the versions that the arguments name."""
    parser = argparse.ArgumentParser(description="compare the startup time of two versions")
    parser.add_argument("--base", required=True, help="a revision or a directory")
    parser.add_argument("--head", default=str(ROOT), help="a revision or a directory")
    parser.add_argument("--rounds", default=9, type=int)
    parser.add_argument("--cache", nargs="+", default=["disk"], choices=["disk", "none"])
    arguments = parser.parse_args()
    end_in_order()
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(workplace("lazyfs-startup-"))
        trees = [stack.enter_context(tree(each, base)) for each in (arguments.base, arguments.head)]
        write_model(base / "served" / "model", 8 << 20, 2)
        origin = stack.enter_context(origins.serve(base / "served", "unlimited"))
        place = Place(origin, "model", base / "mnt", base / "cache")
        place.mountpoint.mkdir()
        for cache in arguments.cache:
            found: defaultdict[str, list[tuple[float, ...]]] = defaultdict(list)
            for turn in range(arguments.rounds + 1):
                for name, path in zip(("base", "head"), trees, strict=True):
                    row = measure(Lazyfs(path, name, keeps=cache == "disk"), place)
                    if turn:  # the first round only fills the page cache
                        found[name].append(row)
            print(f"cache {cache}: medians of {arguments.rounds}, in ms")
            print(f"{'':14}{'base':>8}{'head':>8}{'head/base':>11}")
            for at, column in enumerate(COLUMNS):
                first, second = (
                    statistics.median(row[at] for row in found[name]) for name in ("base", "head")
                )
                ratio = second / first
                print(f"{column:14}{first * 1e3:8.0f}{second * 1e3:8.0f}{ratio:11.2f}")


if __name__ == "__main__":
    main()
