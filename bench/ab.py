"""Compares two versions of lazyfs in interleaved rounds, to see whether a change is a gain.

    python bench/ab.py --base main [--head TREE] [--rounds 5] [--workload vllm]
        [--origins s3like unlimited] [--cache disk none] [--state cold] [--size 1GiB] [--metadata]

BASE and HEAD are git revisions, or directories with the package `lazyfs`. HEAD defaults to the work
tree of this program. Each round measures both, in alternating order, so that drift of the machine
affects both alike. The output has medians of the figures of measure.py, the ratio of seconds
HEAD/BASE (below 1: HEAD is faster), and the number of rounds in which HEAD was faster. With
`--metadata`, each cold load is measured beside calls of latency.py, whose latencies are shown too.
Needs root, nginx with Lua and, for the throttled origin, tc.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import load
import origin as origins
from accounting import FuseRequests, end_in_order, fuse_requests, settle, workplace
from measure import Loader, Meter, Run, beside_metadata
from model import write_model
from mounts import Lazyfs, Place, forget, from_disk

from lazyfs.options.option_types import parse_size

HERE = Path(__file__).parent
ROOT = HERE.parent
STATES = ("cold", "warm", "hot")
COLUMNS = {
    "seconds": lambda run: run.seconds,
    "mount s": lambda run: run.mount_s or 0,
    "load s": lambda run: run.load_s,
    "GB/s": lambda run: run.rate,
    "daemon CPU s/GB": lambda run: (run.client_cpu_s or 0) / run.bytes * 1e9,
    "reader CPU s/GB": lambda run: run.reader_cpu_s / run.bytes * 1e9,
    "peak MiB": lambda run: run.peak_mib or 0,
    "FUSE reads": lambda run: run.fuse_reads or 0,
    "GETs": lambda run: run.gets or 0,
    "fetched/needed": lambda run: run.fetched_over_needed or 0,
}


@contextlib.contextmanager
def tree(revision: str, base: Path) -> Iterator[Path]:
    """A directory with the files of a revision; a directory is returned as it is."""
    if (Path(revision) / "lazyfs").is_dir():
        yield Path(revision).resolve()
        return
    path = Path(tempfile.mkdtemp(prefix="tree-", dir=base))
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--detach", "-f", path, revision], check=True, timeout=60,
                   capture_output=True)  # fmt: skip
    try:
        subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=path, check=True,
            timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT / "build" / "backend")},
        )  # fmt: skip
        yield path
    finally:
        subprocess.run([*git, "remove", "--force", path], check=True, timeout=60)


def measure(lazyfs: Lazyfs, state: str, loader: Loader, meter: Meter, place: Place) -> Run:
    """Measure one load, with the caches in a given state."""
    forget(place)
    if state == "warm":
        with lazyfs.mount(place) as mounted:
            meter.first(loader, mounted, place)
            settle(mounted.group)
        from_disk(place)
    meter.mark()
    with lazyfs.mount(place) as mounted:
        run = meter.first(loader, mounted, place)
        if state == "hot":
            settle(mounted.group)
            run = meter.again(loader, mounted, place)
    return run


def measure_metadata(
    lazyfs: Lazyfs, loader: Loader, meter: Meter, place: Place
) -> tuple[Run, dict[str, float]]:
    """Measure a cold load beside metadata calls."""
    forget(place)
    meter.mark()
    with lazyfs.mount(place) as mounted:
        return beside_metadata(mounted, lambda: meter.first(loader, mounted, place))


def compare(
    arguments: argparse.Namespace, contenders: Sequence[Lazyfs], base: Path,
    requests: FuseRequests | None,
) -> None:  # fmt: skip
    """Measure every combination and print a table for each."""
    place_of = {lazyfs.name: base / lazyfs.name for lazyfs in contenders}
    loader = Loader(arguments.workload)
    for profile, cache in itertools.product(arguments.origins, arguments.cache):
        runs: defaultdict[str, list[Run]] = defaultdict(list)
        calls: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
        with origins.serve(base / "served", profile) as origin:
            meter = Meter(origin, requests)
            for turn in range(arguments.rounds):
                for lazyfs in contenders if turn % 2 == 0 else contenders[::-1]:
                    directory = place_of[lazyfs.name]
                    place = Place(origin, "model", directory / "mnt", directory / "cache")
                    place.mountpoint.mkdir(parents=True, exist_ok=True)
                    tried = Lazyfs(
                        lazyfs.tree,
                        lazyfs.name,
                        cache == "disk",
                        lazyfs.options,
                    )
                    if arguments.metadata:
                        run, latencies = measure_metadata(tried, loader, meter, place)
                        calls[lazyfs.name].append(latencies)
                    else:
                        run = measure(tried, arguments.state, loader, meter, place)
                    runs[lazyfs.name].append(run)
                    print(f"{profile}, {cache}, {turn + 1}: {lazyfs.name} {run.seconds:.2f} s",
                          file=sys.stderr, flush=True)  # fmt: skip
        print(f"\n{profile}, cache {cache}, {arguments.state}, {arguments.workload}")
        print(table(runs["base"], runs["head"]), flush=True)
        for name in ("stat", "listdir", "statvfs") if calls else ():
            p99 = [statistics.median(call[f"{name}_p99_ms"] for call in calls[who])
                   for who in ("base", "head")]  # fmt: skip
            print(f"{name + ' p99 ms':18}{p99[0]:10.1f}{p99[1]:10.1f}", flush=True)


def table(base: list[Run], head: list[Run]) -> str:
    """A table of the medians of both and their ratio."""
    lines = [f"{'':18}{'base':>10}{'head':>10}{'head/base':>11}"]
    for name, value in COLUMNS.items():
        first, second = (statistics.median(map(value, runs)) for runs in (base, head))
        ratio = f"{second / first:.3f}" if first else ""
        lines.append(f"{name:18}{first:10.3f}{second:10.3f}{ratio:>11}")
    faster = sum(b.seconds > h.seconds for b, h in zip(base, head, strict=True))
    seconds = [" ".join(f"{run.seconds:.2f}" for run in runs) for runs in (base, head)]
    return "\n".join([*lines, f"head faster in {faster} of {len(base)} rounds; "
                      f"base: {seconds[0]}; head: {seconds[1]}"])  # fmt: skip


def main() -> None:
    """Compare the versions that the arguments name."""
    parser = argparse.ArgumentParser(description="compare two versions of lazyfs")
    parser.add_argument("--base", required=True, help="a revision or a directory")
    parser.add_argument("--head", default=str(ROOT), help="a revision or a directory")
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument(
        "--workload",
        default="vllm",
        choices=[m for m in load.MODES if m not in ("replay", "check")],
    )
    parser.add_argument("--origins", nargs="+", default=["s3like", "unlimited"],
                        choices=origins.PROFILES)  # fmt: skip
    parser.add_argument("--cache", nargs="+", default=["disk", "none"], choices=["disk", "none"])
    parser.add_argument("--state", default="cold", choices=STATES)
    parser.add_argument("--metadata", action="store_true")
    parser.add_argument("--size", default="1GiB", type=parse_size)
    parser.add_argument("--shards", default=4, type=int)
    parser.add_argument("--option", action="append", default=[], metavar="--NAME=VALUE",
                        help="for both mounts, such as --option=--memory-limit=512MiB")  # fmt: skip
    arguments = parser.parse_args()
    if arguments.metadata and arguments.state != "cold":
        parser.error("--metadata measures cold loads")
    end_in_order()
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(workplace("lazyfs-ab-"))
        requests = stack.enter_context(fuse_requests(base))
        options = tuple(arguments.option)
        contenders = [
            Lazyfs(stack.enter_context(tree(revision, base)), name, options=options)
            for name, revision in (("base", arguments.base), ("head", arguments.head))
        ]
        for lazyfs in contenders:
            (base / lazyfs.name).mkdir()
            print(f"{lazyfs.name}: {lazyfs.version()}", file=sys.stderr, flush=True)
        write_model(base / "served" / "model", arguments.size, arguments.shards)
        compare(arguments, contenders, base, requests)


if __name__ == "__main__":
    main()
