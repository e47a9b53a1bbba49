"""The bench: compares lazyfs with other tools in one run on one machine.

    make bench               about 35 minutes
    make bench RUN=quick     less of everything: about seven minutes
    make bench RUN=full      all workloads several times: an hour and a half
    python bench/run.py [quick|standard|full] [--size 2GiB] [--repeat 3] [--minutes 40]
                        [--origins ...] [--without ...]

First it measures the figures for the bars, in several turns through all origins, then the rest. It
writes tables and `results.json` to `bench/results/` after each line, and `results.png` after each
origin, so a run that ends early has them too. At the end it prints the tables.
measure.py defines the figures, scenarios.py the states, and peers.py the peers with their settings.
Needs root, control groups of version 2, and nginx with Lua. `bench/install` installs nginx and the
peers.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import origin as origins
import report
from accounting import FuseRequests, end_in_order, fuse_requests, workplace
from bars import judge
from measure import Run
from model import write_model, write_recorded, write_small_files
from mounts import Contender, Lazyfs
from peers import PEERS, point_juicefs_at, prepare_juicefs
from scenarios import (
    DOWNLOADED,
    MODEL,
    RECORDED,
    RUNAI,
    SMALL,
    TRACES,
    Line,
    Lines,
    Scenarios,
    why_left_out,
)

from lazyfs.options.option_types import parse_size

HERE = Path(__file__).parent
OBJECTS = 5000
# The origins at which lazyfs has to be faster than its peers.
_BARS_OF_PEERS = ("unlimited", "s3like", "tls")


@dataclass(frozen=True, slots=True)
class Plan:
    """The scope of a run.

    Attributes:
        size: size of the model in bytes.
        shards: number of its shards.
        repeat: how often the figures for the bars are measured.
        repeat_rest: how often the rest is measured.
        workloads: by origin, workloads of lazyfs besides `vllm` and `sequential`.
        peers: origins at which peers are measured.
        slow: peers that are measured only with the rest, and their origins.
        small_by_peers: peers that are also measured with small files.
    """

    size: int
    shards: int
    repeat: int
    workloads: dict[str, tuple[str, ...]]
    repeat_rest: int = 1
    peers: tuple[str, ...] = ("unlimited", "s3like", "throttled", "tls")
    slow: dict[str, tuple[str, ...]] = field(default_factory=lambda: _SLOW)
    small_by_peers: tuple[str, ...] = ("rclone", "mountpoint")


_EVERY_WORKLOAD = (
    "safetensors", "transformers", "threads", "direct", "vllm, 2 ranks", "vllm, 8 ranks",
    "replay vllm-lazy-ra1024", "replay vllm-lazy-ra128", "replay transformers-ra1024",
)  # fmt: skip
_WORKLOADS = {
    "s3like": _EVERY_WORKLOAD,
    "unlimited": ("direct", "threads", "vllm, 2 ranks"),
    "throttled": ("direct",),
}
# If each mapped read is a request of its own, a load at the s3like origin takes minutes.
_SLOW = {"mountpoint": ("unlimited", "s3like"), "goofys": ("unlimited",)}
PLANS = {
    "quick": Plan(
        3 << 28,
        3,
        1,
        {"s3like": ("direct", "replay vllm-lazy-ra1024")},
        peers=("s3like", "unlimited", "tls"),
        small_by_peers=(),
    ),
    "standard": Plan(2 << 30, 8, 3, _WORKLOADS),
    "full": Plan(
        2 << 30,
        8,
        5,
        _WORKLOADS,
        repeat_rest=3,
        small_by_peers=("rclone", "s3fs", "mountpoint"),
    ),
}


@dataclass(slots=True)
class Results:
    """The results so far.

    Attributes:
        about: a description of the run.
        directory: for tables and JSON, which are written again after each line.
        until: time on the monotonic clock after which no further measurement starts.
    """

    about: dict[str, Any]
    directory: Path
    until: float = math.inf
    runs: dict[str, defaultdict[Line, list[Run]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    small: dict[str, dict[str, float]] = field(default_factory=dict)
    metadata: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def medians(self) -> dict[str, dict[Line, Run]]:
        """Medians by origin: first the references, then lazyfs, then its peers."""
        return {
            profile: {line: report.median(lines[line]) for line in _as_shown(lines)}
            for profile, lines in self.runs.items()
        }

    @property
    def time_is_up(self) -> bool:
        """Whether the time for new measurements is over."""
        return time.monotonic() >= self.until

    def add(self, profile: str, lines: Lines) -> None:
        """Measure lines and log them, unless time is up."""
        if self.time_is_up:
            return
        with contextlib.closing(lines):
            for line, run in lines:
                self.runs[profile][line].append(run)
                count = len(self.runs[profile][line])
                say(f"{profile}, {count}: {line}: {run.seconds:.2f} s")
                self.write()

    def as_markdown(self) -> str:
        """All tables."""
        medians = self.medians()
        about = self.about
        parts = [
            f"{about['bytes'] / 1e9:.2f} GB in {about['shards']} shards, medians of at most "
            f"{about['repeat']}; {about['machine']}; {', '.join(about['versions'])}; began "
            f"{about['began']}, {about['ended']}.",
            f"### Bars\n\n{report.bars_table(judge(medians))}",
            *(
                f"### {profile}\n\n{report.loads_table(lines, self.runs[profile])}"
                for profile, lines in medians.items()
            ),
            f"### Small files\n\n{report.small_table(self.small)}" if self.small else "",
            f"### Metadata during a cold load\n\n{report.metadata_table(self.metadata)}"
            if self.metadata
            else "",
            *(f"{name} is left out: {reason}" for name, reason in self.left_out.items()),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def write(self) -> None:
        """Write the tables and the JSON."""
        (self.directory / "results.md").write_text(self.as_markdown())
        medians = self.medians()
        loads = {
            profile: [
                asdict(line)
                | {"median": median.as_json(), "GB/s": median.rate,
                   "runs": [run.as_json() for run in self.runs[profile][line]]}
                for line, median in lines.items()
            ]
            for profile, lines in medians.items()
        }  # fmt: skip
        everything = self.about | {
            "loads": loads,
            "small_files": self.small,
            "metadata_under_load": self.metadata,
            "bars": [asdict(bar) for bar in judge(medians)],
            "left_out": self.left_out,
        }
        (self.directory / "results.json").write_text(json.dumps(everything, indent=1) + "\n")

    def draw(self) -> None:
        """Draw the picture."""
        about = self.about
        title = (f"Mapped load of {about['bytes'] / 1e9:.1f} GB in vLLM's order: medians of "
                 f"{about['repeat']}, {about['machine']}")  # fmt: skip
        report.plot(self.medians(), title, self.directory / "results.png")


def _as_shown(lines: Iterable[Line]) -> list[Line]:
    lines = list(lines)
    first = (
        "limit",
        RUNAI.contender,
        "download, then load",
        DOWNLOADED,
        "local file",
        "lazyfs",
        "lazyfs, no disk",
    )
    places = list(dict.fromkeys((*first, *(line.contender for line in lines))))
    return sorted(lines, key=lambda line: places.index(line.contender))


def say(words: str) -> None:
    """Print a message with the time of day to standard error."""
    print(f"{time.strftime('%H:%M:%S')} {words}", file=sys.stderr, flush=True)


class Bench:
    """One run of a plan.

    Args:
        peers: the peers that are installed.
        base: a directory with `served`, which the origins serve; mounts and caches are put there.
    """

    def __init__(
        self, plan: Plan, peers: Sequence[Contender], requests: FuseRequests | None, base: Path,
        results: Results,
    ) -> None:  # fmt: skip
        self._plan = plan
        self._peers = peers
        self._requests = requests
        self._base = base
        self._results = results
        self._lazyfs = Lazyfs(HERE.parent)

    def measure_bars(self, profile: str) -> None:
        """Measure the figures for the bars once, at one origin."""
        if self._results.time_is_up:
            return
        with self._at(profile) as scenarios:
            add = self._results.add
            add(profile, scenarios.limit())
            add(profile, scenarios.runai())
            add(profile, scenarios.download_and_local("vllm"))
            add(profile, scenarios.load(self._lazyfs, "vllm"))
            add(profile, scenarios.cold(self._lazyfs, "sequential"))
            if profile in _BARS_OF_PEERS:
                for peer in self._peers_of(profile, slow=False):
                    self._try(profile, peer, scenarios.cold(peer, "vllm"))

    def measure_rest(self, profile: str) -> None:
        """Measure everything else once, at one origin."""
        if self._results.time_is_up:
            return
        with self._at(profile) as scenarios:
            add = self._results.add
            without_disk = Lazyfs(HERE.parent, "lazyfs, no disk", keeps=False)
            add(profile, scenarios.load(without_disk, "vllm"))
            if profile == "tls":
                return
            for peer in self._peers_of(profile):
                measure = scenarios.cold if peer.name in self._plan.slow else scenarios.load
                self._try(profile, peer, measure(peer, "vllm"))
            add(profile, scenarios.download_and_local("sequential"))
            add(profile, scenarios.load(self._lazyfs, "sequential"))
            for workload in self._plan.workloads.get(profile, ()):
                add(profile, scenarios.load(self._lazyfs, workload))
            if profile in self._plan.workloads:
                add(profile, scenarios.two_mounts(self._lazyfs))
            if not self._results.time_is_up:
                self._latencies(profile, scenarios)

    @contextlib.contextmanager
    def _at(self, profile: str) -> Iterator[Scenarios]:
        with origins.serve(self._base / "served", profile) as origin:
            if any(peer.name == "juicefs" for peer in self._peers):
                point_juicefs_at(origin)
            yield Scenarios(origin, self._requests, self._base)

    def _peers_of(self, profile: str, *, slow: bool = True) -> list[Contender]:
        if profile not in self._plan.peers:
            return []
        # Other peers are measured at all origins of peers.
        where = {peer.name: self._plan.slow.get(peer.name) for peer in self._peers}
        return [
            peer
            for peer in self._peers
            if peer.name not in self._results.left_out
            and ((at := where[peer.name]) is None or (slow and profile in at))
        ]

    def _try(self, profile: str, peer: Contender, lines: Lines) -> None:
        try:
            self._results.add(profile, lines)
        except SystemExit as error:
            self._results.left_out[peer.name] = why_left_out(peer.name, error)

    def _latencies(self, profile: str, scenarios: Scenarios) -> None:
        results = self._results
        say(f"{profile}: metadata during a load")
        results.metadata[profile] = scenarios.metadata_under_load(self._lazyfs)
        if profile != "s3like":
            return
        say(f"{profile}: small files")
        name = self._lazyfs.name
        results.small[f"{name}, one model"] = scenarios.small_files(self._lazyfs, MODEL)
        results.small[name] = scenarios.small_files(self._lazyfs, SMALL)
        for peer in self._peers_of(profile):
            if peer.name in self._plan.small_by_peers and not results.time_is_up:
                say(f"{profile}: small files, {peer.name}")
                try:
                    results.small[peer.name] = scenarios.small_files(peer, SMALL)
                except SystemExit as error:
                    results.left_out[f"{peer.name}, small files"] = why_left_out(peer.name, error)


def main() -> None:
    """Run the plan that the arguments choose."""
    parser = argparse.ArgumentParser(description="compare lazyfs with other tools")
    parser.add_argument("plan", nargs="?", default="standard", choices=PLANS)
    parser.add_argument("--size", type=parse_size, help="size of the model")
    parser.add_argument("--shards", type=int)
    parser.add_argument(
        "--repeat", type=int, metavar="TURNS", help="how often everything is measured"
    )
    parser.add_argument("--minutes", type=float, default=math.inf,
                        help="start no further measurement after this time")  # fmt: skip
    parser.add_argument("--origins", nargs="+", default=list(origins.PROFILES),
                        choices=origins.PROFILES)  # fmt: skip
    parser.add_argument("--without", nargs="+", default=[], metavar="PEER",
                        choices=[peer.name for peer in PEERS])  # fmt: skip
    parser.add_argument("--results", default=HERE / "results", type=Path)
    arguments = parser.parse_args()
    until = time.monotonic() + arguments.minutes * 60
    preset = PLANS[arguments.plan]
    plan = replace(
        preset,
        size=arguments.size or preset.size,
        shards=arguments.shards or preset.shards,
        repeat=arguments.repeat or preset.repeat,
    )
    end_in_order()
    arguments.results.mkdir(exist_ok=True, parents=True)
    peers = [peer for peer in PEERS if peer.path and peer.name not in arguments.without]
    versions = [Lazyfs(HERE.parent).version(), *(peer.version() for peer in peers)]
    machine = f"{os.cpu_count()} cores, Linux {platform.release().split('-')[0]}"
    say(f"{', '.join(versions)}; {machine}")
    with workplace("lazyfs-bench-") as base, fuse_requests(base) as requests:
        served = base / "served"
        size = write_model(served / MODEL, plan.size, plan.shards)
        write_recorded(served / RECORDED, TRACES / "layout.json")
        write_small_files(served / SMALL, OBJECTS)
        if any(peer.name == "juicefs" for peer in peers):
            prepare_juicefs(served, MODEL)
        results = Results({
            "plan": arguments.plan, "bytes": size, "shards": plan.shards, "repeat": plan.repeat,
            "machine": machine, "versions": versions, "began": time.strftime("%Y-%m-%d %H:%M"),
            "ended": "not ended yet",
        }, arguments.results, until)  # fmt: skip
        bench = Bench(plan, peers, requests, base, results)
        turns = [bench.measure_bars] * plan.repeat + [bench.measure_rest] * plan.repeat_rest
        cut_off = True
        try:
            for turn, profile in itertools.product(turns, arguments.origins):
                turn(profile)
                results.draw()
            cut_off = results.time_is_up
        finally:
            how = "cut off" if cut_off else "ended"
            results.about["ended"] = f"{how} {time.strftime('%H:%M')}"
            results.write()
            results.draw()
    print(results.as_markdown())


if __name__ == "__main__":
    main()
