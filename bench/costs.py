"""Whether costs grow with the work and no faster: loads of several sizes, and several at once.

    python bench/costs.py [--sizes 1GiB 10GiB 50GiB] [--mounts 1 5 20] [--each 512MiB]
        [--origin unlimited] [--cache none] [--rounds 3] [--option --NAME=VALUE]

A large model is one shard of 1 GiB under many names (hard links), so that the origin keeps it in
the page cache, while each shard of the mount has pages of its own. Rounds are interleaved, and
prefetching begins when a file is opened. Times are those of the load, from before the first open to
the last tensor; processor time counts from the moment at which the mount was ready. Before each
load the page cache is full, as on a node that has worked for a while. Needs root and nginx with
Lua.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import origin as origins
from accounting import end_in_order, fill_page_cache, workplace
from measure import Loader, Meter, Run
from model import write_model
from mounts import Lazyfs, Mounted, Place, forget

from lazyfs.options.option_types import parse_size

ROOT = Path(__file__).parent.parent
SHARD = 1 << 30


@dataclass(frozen=True, slots=True)
class Case:
    """Loads that begin together.

    Attributes:
        prefix: of the model.
        mounts: how many load it, each through a mount of its own.
        label: its name in the table.
    """

    prefix: str
    mounts: int
    label: str


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="measure what loads cost as they grow")
    parser.add_argument("--sizes", nargs="*", type=parse_size, metavar="SIZE",
                        default=[1 << 30, 10 << 30, 50 << 30])  # fmt: skip
    parser.add_argument("--mounts", nargs="*", type=int, default=[1, 5, 20], metavar="COUNT")
    parser.add_argument("--each", type=parse_size, default=512 << 20, metavar="SIZE",
                        help="of the model that several mounts load")  # fmt: skip
    parser.add_argument("--origin", default="unlimited", choices=origins.PROFILES)
    parser.add_argument("--cache", default="none", choices=["disk", "none"])
    parser.add_argument("--rounds", default=3, type=int)
    parser.add_argument("--option", action="append", default=[], metavar="--NAME=VALUE")
    arguments = parser.parse_args()
    end_in_order()
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(workplace("lazyfs-costs-"))
        served = base / "served"
        (base / "holes").mkdir()
        cases = []
        for size in arguments.sizes:
            shards, rest = divmod(size, SHARD)
            if rest:
                raise SystemExit(f"bench: {size} bytes: sizes are multiples of 1GiB")
            write_linked(served / f"size-{shards}", shards)
            cases.append(Case(f"size-{shards}", 1, f"{shards} GiB"))
        if arguments.mounts:
            write_model(served / "each", arguments.each, 1)
            cases += [Case("each", count, f"{count} mounts") for count in arguments.mounts]
        lazyfs = Lazyfs(
            ROOT, keeps=arguments.cache == "disk", options=("--prefetch-on=open", *arguments.option)
        )
        found: defaultdict[Case, list[Run]] = defaultdict(list)
        with origins.serve(served, arguments.origin) as origin:
            for turn in range(arguments.rounds):
                for case in cases if turn % 2 == 0 else cases[::-1]:
                    found[case].append(measure(lazyfs, origin, case, base))
                    print(case.label, found[case][-1], file=sys.stderr, flush=True)
    print(f"{arguments.origin}, cache {arguments.cache}, medians of {arguments.rounds}")
    print(f"{'':12}{'GB/s':>8}{'s/GB':>8}{'CPU s/GB':>10}{'peak MiB':>10}{'fetched/needed':>16}")
    for case, runs in found.items():
        print(
            f"{case.label:12}"
            f"{statistics.median(run.bytes / run.load_s / 1e9 for run in runs):8.2f}"
            f"{statistics.median(run.load_s / run.bytes * 1e9 for run in runs):8.3f}"
            f"{statistics.median(cpu_s(run) / run.bytes * 1e9 for run in runs):10.3f}"
            f"{statistics.median(run.peak_mib or 0 for run in runs):10.0f}"
            f"{statistics.median(run.fetched_over_needed or 0 for run in runs):16.3f}"
        )


def cpu_s(run: Run) -> float:
    """Processor time of the mounts after they were ready, in seconds."""
    return (run.client_cpu_s or 0.0) - (run.start_cpu_s or 0.0)


def write_linked(directory: Path, shards: int) -> None:
    """Write a model of one shard under many names."""
    write_model(directory, SHARD, 1)
    (first,) = directory.glob("*.safetensors")
    names = [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    first = first.rename(directory / names[0])
    for name in names[1:]:
        (directory / name).hardlink_to(first)
    index = directory / "model.safetensors.index.json"
    tensors = json.loads(index.read_text())["weight_map"]
    weight_map = {f"{name}.{tensor}": name for name in names for tensor in tensors}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def measure(lazyfs: Lazyfs, origin: origins.Origin, case: Case, base: Path) -> Run:
    """One cold load, or several at the same time, each with a cache of its own."""
    places = [
        Place(origin, case.prefix, base / f"mnt{number}", base / f"cache{number}")
        for number in range(case.mounts)
    ]
    for place in places:
        place.mountpoint.mkdir(exist_ok=True)
        forget(place)
    fill_page_cache(base / "holes" / "file")
    meter = Meter(origin, None)
    meter.mark(base / "served" / case.prefix)
    with contextlib.ExitStack() as stack:
        mounted: list[Mounted] = [stack.enter_context(lazyfs.mount(place)) for place in places]
        return meter.together(Loader("vllm"), mounted, places)


if __name__ == "__main__":
    main()
