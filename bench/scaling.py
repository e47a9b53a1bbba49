"""What movers give: cold loads with several numbers of them, in interleaved rounds.

    python bench/scaling.py [--movers 0 1 2 4] [--origins unlimited tls] [--cache disk none]
        [--rounds 3] [--size 2GiB] [--quota 0.25]

With `--quota` each mover gets that share of a processor, so that a machine with few processors
shows how throughput grows with the number of (slow) ones. The worker's processor time counts from
the moment at which the mount was ready. Needs root and nginx with Lua.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import origin as origins
from accounting import Group, end_in_order, fuse_requests, workplace
from measure import Loader, Meter
from model import write_model
from mounts import Lazyfs, Mounted, Place, forget

from lazyfs.options.option_types import parse_size

ROOT = Path(__file__).parent.parent
# Of a quota. The kernel's own, 100 ms, would make each block wait that long.
PERIOD_US = 20_000
# What a mover needs to start.
START_S = 0.1
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Scale:
    """One load.

    Attributes:
        rate: GB/s, from before the first open to the last tensor.
        worker_cpu, movers_cpu: processor seconds for each GB.
        memory_mib: proportional share of memory of worker and movers (PSS), after the load.
    """

    rate: float
    worker_cpu: float
    movers_cpu: float
    memory_mib: float


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="measure movers")
    parser.add_argument("--movers", nargs="+", type=int, default=[0, 1, 2, 4])
    parser.add_argument("--origins", nargs="+", default=["unlimited", "tls"],
                        choices=origins.PROFILES)  # fmt: skip
    parser.add_argument("--cache", nargs="+", default=["disk", "none"], choices=["disk", "none"])
    parser.add_argument("--rounds", default=3, type=int)
    parser.add_argument("--size", default="2GiB", type=parse_size)
    parser.add_argument("--quota", type=float, help="of a processor, for each mover")
    parser.add_argument("--option", action="append", default=[], metavar="--NAME=VALUE")
    arguments = parser.parse_args()
    end_in_order()
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(workplace("lazyfs-scaling-"))
        requests = stack.enter_context(fuse_requests(base))
        write_model(base / "served" / "model", arguments.size, 4)
        for profile, cache in itertools.product(arguments.origins, arguments.cache):
            found: defaultdict[int, list[Scale]] = defaultdict(list)
            with origins.serve(base / "served", profile) as origin:
                place = Place(origin, "model", base / "mnt", base / "cache")
                place.mountpoint.mkdir(exist_ok=True)
                for turn in range(arguments.rounds):
                    counts = arguments.movers if turn % 2 == 0 else arguments.movers[::-1]
                    for count in counts:
                        options = (f"--movers={count}", *arguments.option)
                        if arguments.quota:  # otherwise much is fetched before there is one
                            options += ("--prefetch-on=open",)
                        lazyfs = Lazyfs(ROOT, keeps=cache == "disk", options=options)
                        meter = Meter(origin, requests)
                        found[count].append(measure(lazyfs, meter, place, arguments.quota))
                        print(profile, cache, count, found[count][-1], file=sys.stderr, flush=True)
            print(f"\n{profile}, cache {cache}, quota {arguments.quota or 'none'}")
            print(f"{'movers':>8}{'GB/s':>8}{'worker s/GB':>13}{'movers s/GB':>13}{'MiB':>7}")
            for count, scales in found.items():
                median = [
                    statistics.median(getattr(scale, name) for scale in scales)
                    for name in ("rate", "worker_cpu", "movers_cpu", "memory_mib")
                ]
                print("{:8}{:8.2f}{:13.3f}{:13.3f}{:7.0f}".format(count, *median), flush=True)


def measure(lazyfs: Lazyfs, meter: Meter, place: Place, quota: float | None) -> Scale:
    """One cold load."""
    forget(place)
    meter.mark()
    with lazyfs.mount(place) as mounted:
        before = {pid: _cpu_seconds(pid) for pid in _pids(mounted.group, "process.worker")}
        with _limited(mounted, quota):
            run = meter.first(Loader("vllm"), mounted, place)
        workers = _pids(mounted.group, "process.worker")
        movers = _pids(mounted.group, "movers.process")
        worker_s = sum(_cpu_seconds(pid) - before.get(pid, 0.0) for pid in workers)
        return Scale(
            run.bytes / run.load_s / 1e9,
            worker_s / run.bytes * 1e9,
            sum(map(_cpu_seconds, movers)) / run.bytes * 1e9,
            sum(map(_pss_mib, [*workers, *movers])),
        )


@contextlib.contextmanager
def _limited(mounted: Mounted, quota: float | None) -> Iterator[None]:
    """Give each mover that has started a control group with a share of a processor."""
    if quota is None:
        yield
        return
    ended = threading.Event()
    groups: dict[int, Path] = {}

    def limit() -> None:
        while not ended.wait(0.02):
            for pid in _pids(mounted.group, "movers.process"):
                if pid not in groups and _cpu_seconds(pid) >= START_S:
                    groups[pid] = _quota_group(pid, quota)

    thread = threading.Thread(target=limit)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        # Back to where they are counted and ended.
        for pid, path in groups.items():
            of_mount = mounted.group.path if (path / "cpu.max").exists() else path.parent
            with contextlib.suppress(OSError):
                (of_mount / "cgroup.procs").write_text(str(pid))
            path.rmdir()


def _quota_group(pid: int, quota: float) -> Path:
    for root in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/cpu")):
        if not (root / "cgroup.procs").exists():
            continue  # no control group, but the place of several hierarchies
        path = root / f"lazyfs-bench-mover-{pid}"
        with contextlib.suppress(OSError):
            path.mkdir()
            quota_us = int(quota * PERIOD_US)
            if (path / "cpu.cfs_quota_us").exists():
                (path / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (path / "cpu.cfs_quota_us").write_text(str(quota_us))
            else:
                (path / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")
            (path / "cgroup.procs").write_text(str(pid))
            return path
    raise SystemExit("bench: no control group can limit processor time here")


def _pids(group: Group, name: str) -> list[int]:
    return [pid for pid in group.processes() if name in _command(pid)]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _pss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0


if __name__ == "__main__":
    main()
