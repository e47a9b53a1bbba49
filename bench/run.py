"""The bench: lazyfs beside what people use today, in one run, on one machine.

    make bench            everything: about an hour
    make bench RUN=quick  less of everything: about five minutes
    python bench/run.py [quick|full] [--size 2GiB] [--repeat 3] [--origins ...] [--without ...]

Prints tables and writes them, `results.json` and `results.png` to `bench/results/`
after each origin.
What is counted is told in measure.py, the states in scenarios.py, the peers and their settings in
peers.py. Needs root, control groups of version 2, and nginx with Lua; `bench/install` brings that
and the peers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import origin as origins
import report
from accounting import FuseRequests, end_in_order, fuse_requests
from bars import judge
from measure import Run
from model import write_model, write_recorded, write_small_files
from mounts import Contender, Lazyfs
from peers import PEERS, point_juicefs_at, prepare_juicefs
from scenarios import MODEL, RECORDED, SMALL, TRACES, Line, Lines, Scenarios, left_out

from lazyfs.kinds import parse_size

HERE = Path(__file__).parent
OBJECTS = 5000


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        size: of the model, in bytes, and its number of shards.
        repeat: how often each line is measured.
        workloads: by origin, what lazyfs is asked beside `vllm` and `sequential`.
        peers: at which origins they are measured.
        small_by_peers: whether they are asked for small files as well.
    """

    size: int
    shards: int
    repeat: int
    workloads: dict[str, tuple[str, ...]]
    peers: tuple[str, ...] = origins.PROFILES
    small_by_peers: bool = True


_EVERY_WORKLOAD = (
    "safetensors", "transformers", "threads", "direct", "vllm, 2 ranks", "vllm, 8 ranks",
    "replay vllm-lazy-ra1024", "replay vllm-lazy-ra128", "replay transformers-ra1024",
)  # fmt: skip
PLANS = {
    "quick": Plan(
        3 << 28,
        3,
        1,
        {"s3like": ("direct", "replay vllm-lazy-ra1024")},
        ("s3like", "unlimited"),
        small_by_peers=False,
    ),
    "full": Plan(2 << 30, 8, 3, {"s3like": _EVERY_WORKLOAD, "unlimited": ("direct", "threads")}),
}


@dataclass(slots=True)
class Results:
    """What was measured so far."""

    about: dict[str, Any]
    runs: dict[str, defaultdict[Line, list[Run]]] = field(default_factory=dict)
    small: dict[str, dict[str, float]] = field(default_factory=dict)
    metadata: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def medians(self) -> dict[str, dict[Line, Run]]:
        return {
            profile: {line: report.median(runs) for line, runs in lines.items()}
            for profile, lines in self.runs.items()
        }

    def add(self, profile: str, lines: Lines) -> None:
        """Measure lines, and say so."""
        for line, run in lines:
            self.runs[profile][line].append(run)
            count = len(self.runs[profile][line])
            print(f"{profile}, {count}: {line}: {run.seconds:.2f} s", file=sys.stderr, flush=True)

    def as_markdown(self) -> str:
        """All tables."""
        medians = self.medians()
        about = self.about
        parts = [
            f"{about['bytes'] / 1e9:.2f} GB in {about['shards']} shards, medians of "
            f"{about['repeat']}; {about['machine']}; {', '.join(about['versions'])}.",
            f"### Bars\n\n{report.bars_table(judge(medians))}",
            *(
                f"### {profile}\n\n{report.loads_table(lines)}"
                for profile, lines in medians.items()
            ),
            f"### Small files\n\n{report.small_table(self.small)}" if self.small else "",
            f"### Metadata during a cold load\n\n{report.metadata_table(self.metadata)}",
            *(f"{name} is left out: {reason}" for name, reason in self.left_out.items()),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def write(self, directory: Path) -> None:
        """Write the tables, the JSON and the picture."""
        (directory / "results.md").write_text(self.as_markdown())
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
        (directory / "results.json").write_text(json.dumps(everything, indent=1) + "\n")
        about = self.about
        title = (f"Mapped load of {about['bytes'] / 1e9:.1f} GB in vLLM's order: medians of "
                 f"{about['repeat']}, {about['machine']}")  # fmt: skip
        report.plot(medians, title, directory / "results.png")


def measure(
    profile: str, plan: Plan, peers: Sequence[Contender], requests: FuseRequests | None,
    base: Path, results: Results,
) -> None:  # fmt: skip
    """Measure all that the plan has for one origin, in turns."""
    lazyfs = Lazyfs(HERE.parent)
    contenders: list[Contender] = [lazyfs, Lazyfs(HERE.parent, "lazyfs, no disk", keeps=False)]
    contenders += peers if profile in plan.peers else ()
    results.runs[profile] = defaultdict(list)
    with origins.serve(base / "served", profile) as origin:
        scenarios = Scenarios(origin, requests, base)
        if any(peer.name == "juicefs" for peer in peers):
            point_juicefs_at(origin)
        for turn in range(plan.repeat):
            results.add(profile, scenarios.references())
            for contender in contenders:
                if contender.name in results.left_out:
                    continue
                try:
                    results.add(profile, scenarios.load(contender, "vllm", check=turn == 0))
                except SystemExit as error:
                    if contender not in peers:
                        raise
                    results.left_out[contender.name] = left_out(contender.name, error)
            for workload in ("sequential", *plan.workloads.get(profile, ())):
                results.add(profile, scenarios.load(lazyfs, workload, check=turn == 0))
            if profile in plan.workloads:
                results.add(profile, scenarios.two_mounts(lazyfs))
        results.metadata[profile] = scenarios.metadata_under_load(lazyfs)
        if profile == "s3like":
            results.small[f"{lazyfs.name}, one model"] = scenarios.small_files(lazyfs, MODEL)
            results.small[lazyfs.name] = scenarios.small_files(lazyfs, SMALL)
            for peer in peers if plan.small_by_peers else ():
                if peer.name != "juicefs" and peer.name not in results.left_out:
                    results.small[peer.name] = scenarios.small_files(peer, SMALL)


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description="lazyfs beside what people use today")
    parser.add_argument("plan", nargs="?", default="full", choices=PLANS)
    parser.add_argument("--size", type=parse_size, help="of the model")
    parser.add_argument("--shards", type=int)
    parser.add_argument("--repeat", type=int, help="how often each line is measured")
    parser.add_argument("--origins", nargs="+", default=list(origins.PROFILES),
                        choices=origins.PROFILES)  # fmt: skip
    parser.add_argument("--without", nargs="+", default=[], metavar="PEER",
                        choices=[peer.name for peer in PEERS])  # fmt: skip
    parser.add_argument("--results", default=HERE / "results", type=Path)
    arguments = parser.parse_args()
    preset = PLANS[arguments.plan]
    plan = Plan(
        arguments.size or preset.size, arguments.shards or preset.shards,
        arguments.repeat or preset.repeat, preset.workloads, preset.peers, preset.small_by_peers,
    )  # fmt: skip
    end_in_order()
    arguments.results.mkdir(exist_ok=True, parents=True)
    peers = [peer for peer in PEERS if peer.path and peer.name not in arguments.without]
    versions = [Lazyfs(HERE.parent).version(), *(peer.version() for peer in peers)]
    machine = f"{os.cpu_count()} cores, Linux {platform.release().split('-')[0]}"
    print(f"{', '.join(versions)}; {machine}", file=sys.stderr, flush=True)
    with contextlib.ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="lazyfs-bench-", dir="/var/tmp")
        base = Path(stack.enter_context(temporary))
        requests = stack.enter_context(fuse_requests(base))
        served = base / "served"
        size = write_model(served / MODEL, plan.size, plan.shards)
        write_recorded(served / RECORDED, TRACES / "layout.json")
        write_small_files(served / SMALL, OBJECTS)
        if any(peer.name == "juicefs" for peer in peers):
            prepare_juicefs(served, MODEL)
        results = Results({
            "plan": arguments.plan, "bytes": size, "shards": plan.shards, "repeat": plan.repeat,
            "machine": machine, "versions": versions, "began": time.strftime("%Y-%m-%d %H:%M"),
        })  # fmt: skip
        for profile in arguments.origins:
            measure(profile, plan, peers, requests, base, results)
            results.write(arguments.results)
    print(results.as_markdown())


if __name__ == "__main__":
    main()
