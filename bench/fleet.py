"""A fleet that loads one model: machines as network namespaces, real S3, nginx and mounts.

    bench/fleet.py                 all rows of docs/SCALE.md
    bench/fleet.py herd kills      some of them
    bench/fleet.py herd --nodes 8  with other numbers

Each node has a network namespace with a link of its own; the store (versitygw) has one whose link a
token bucket (tc-tbf) makes scarce. A load is timed from the start of the mount to the last byte of
the last shard. What left the store is counted by an nginx before it. Needs root, nginx and
versitygw (`.ci/s3-servers`). `bench/fleet_plan.py` has fleets that fit no machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import fleet as machines
from mounting import is_mounted, lazyfs

from lazyfs.machine import processor_time_s

_NET = "10.213.7"
_READ = """
import os, sys
for path in sys.argv[1:]:
    with open(path, "rb", buffering=0) as file:
        while file.readinto(BUFFER := bytearray(1 << 20)):
            pass
"""


def run(*command: object, check: bool = True) -> None:
    subprocess.run([*map(str, command)], check=check, capture_output=True, timeout=60)


@dataclass
class Network:
    """Namespaces on one bridge, which are gone at the end."""

    name: str
    made: list[str] = field(default_factory=list)

    def __enter__(self) -> Network:
        run("ip", "link", "add", self.name, "type", "bridge")
        run("ip", "addr", "add", f"{_NET}.254/24", "dev", self.name)
        run("ip", "link", "set", self.name, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.made:
            run("ip", "netns", "del", each, check=False)
        run("ip", "link", "del", self.name, check=False)

    def machine(self, number: int) -> tuple[str, tuple[str, ...]]:
        """Add one; its address, and what runs a command there."""
        name, address = f"{self.name}-{number}", f"{_NET}.{number}"
        inner = ("nsenter", f"--net=/run/netns/{name}")  # `ip netns exec` would hide mounts
        run("ip", "netns", "add", name)
        self.made.append(name)
        run("ip", "link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "link", "set", f"v{name}", "master", self.name, "up")
        run(*inner, "ip", "addr", "add", f"{address}/24", "dev", "eth0")
        run(*inner, "ip", "link", "set", "eth0", "up")
        run(*inner, "ip", "link", "set", "lo", "up")
        return address, inner

    def limit(self, number: int, rate: int | None) -> None:
        """What a machine can send, in bytes a second."""
        inner = ("nsenter", f"--net=/run/netns/{self.name}-{number}")
        run(*inner, "tc", "qdisc", "del", "dev", "eth0", "root", check=False)
        if rate:
            run(*inner, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate",
                f"{rate * 8}bit", "burst", "256k", "latency", "400ms")  # fmt: skip


@dataclass
class Load:
    """One node's load: when it began, and how long it took."""

    seconds: float
    failed: bool


class Bench:
    """A store, and nodes that are added as they are needed."""

    def __init__(self, directory: Path, network: Network, arguments: argparse.Namespace) -> None:
        self.directory, self.network, self.arguments = directory, network, arguments
        self.files = machines.model(arguments.shards, arguments.shard_mib << 20)
        self.size = sum(map(len, self.files.values()))
        self.hosts: dict[int, tuple[str, tuple[str, ...]]] = {}
        self.count = 0
        self.rows: dict[str, Any] = {}

    @contextlib.contextmanager
    def store(self) -> Iterator[None]:
        address, prefix = self.network.machine(1)
        (self.directory / "s3").mkdir()
        with machines.store(self.directory / "s3", address, prefix) as self.s3:
            self.env = self.s3.user("reader", "s3:GetObject", "s3:ListBucket")
            yield

    def host(self, number: int) -> tuple[str, tuple[str, ...]]:
        if number not in self.hosts:
            self.hosts[number] = self.network.machine(10 + number)
        return self.hosts[number]

    def prefix(self) -> str:
        """Where the model is that nobody has heard of yet."""
        self.count += 1
        name = f"m{self.count}"
        self.network.limit(1, None)
        self.s3.put(**{f"{name}/{key}": body for key, body in self.files.items()})
        return name

    @contextlib.contextmanager
    def fleet(self, nodes: int) -> Iterator[machines.Fleet]:
        directory = Path(tempfile.mkdtemp(dir=self.directory))
        made = machines.Fleet(directory, self.s3.url)
        try:
            for number in range(nodes):
                made.add(*self.host(number))
            made.know()
            yield made
        finally:
            made.stop()
            shutil.rmtree(directory)

    def load(self, number: int, prefix: str, *options: str) -> Load:
        """Mount on a node, read all, unmount."""
        _, inner = self.host(number)
        path = Path(tempfile.mkdtemp(dir=self.directory))
        began_s = time.monotonic()
        ran = subprocess.run(
            [*inner, sys.executable, "-m", "lazyfs", "mount", f"s3://{machines.BUCKET}/{prefix}",
             path, f"--endpoint-url={self.s3.url}", f"--cache-dir={path}.cache",
             f"--log-file={path}.log", *options],
            env=self.env, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        try:
            shards = [path / name for name in self.files]
            read = subprocess.run(
                [sys.executable, "-c", _READ, *shards], timeout=900, check=False, env=self.env
            )
            return Load(time.monotonic() - began_s, read.returncode != 0)
        finally:
            lazyfs("umount", path)
            assert not is_mounted(path)
            shutil.rmtree(f"{path}.cache", ignore_errors=True)

    def together(
        self,
        prefix: str,
        nodes: dict[int, tuple[str, ...]],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> tuple[list[Load], float]:
        """Load on several nodes at once; the loads, and how many copies left the store."""
        before = len(self.s3.reads())
        found: dict[int, Load] = {}

        def one(number: int, options: tuple[str, ...]) -> None:
            found[number] = self.load(number, prefix, *options)

        threads = [threading.Thread(target=one, args=item) for item in nodes.items()]
        for each in threads:
            each.start()
        meanwhile()
        for each in threads:
            each.join()
        assert len(found) == len(nodes), "a load ended with an exception"
        return [found[number] for number in nodes], self.s3.sent(before) / self.size

    def say(self, row: str, **values: Any) -> None:
        shown = {name: round(it, 3) if isinstance(it, float) else it for name, it in values.items()}
        self.rows[row] = shown
        print(f"{row:<44} " + ", ".join(f"{name} {it}" for name, it in shown.items()), flush=True)

    # Rows

    def herd(self) -> None:
        """Nodes that start at once, over a scarce link, against one alone: interleaved rounds."""
        rate = self.arguments.rate * 10**6
        counts = sorted(self.arguments.nodes)
        prefix = self.prefix()
        self.network.limit(1, rate)
        alone: list[float] = []
        slowest: dict[int, list[float]] = {count: [] for count in [1, *counts]}
        for number in range(self.arguments.rounds):
            (one,), copies = self.together(prefix, {0: ()})
            alone.append(one.seconds)
            self.say(f"{number}: one node alone, without", seconds=one.seconds, copies=copies,
                     least=self.size / rate)  # fmt: skip
            for count in slowest:
                with self.fleet(count) as made:
                    doors = {node: (each.option,) for node, each in enumerate(made.nodes)}
                    loads, copies = self.together(prefix, doors)
                    self._herd_row(f"{number}: {count} nodes at once, with", loads, copies, one)
                    slowest[count].append(max(each.seconds for each in loads))
                    if (number, count) == (0, counts[-1]):
                        self._late(made, prefix)
        self.say("medians", alone=statistics.median(alone),
                 **{f"of_one_{count}": statistics.median(them) / statistics.median(alone)
                    for count, them in slowest.items()})  # fmt: skip

    def _late(self, made: machines.Fleet, prefix: str) -> None:
        """A node that comes when the fleet has the model; and one that has a shelf since before."""
        count = len(made.nodes)
        new = made.add(*self.host(count))
        made.know()
        for row in ("a new node, fleet warm", "the same once more"):
            (late,), copies = self.together(prefix, {count: (new.option,)})
            self.say(row, seconds=late.seconds, copies=copies)

    def without(self) -> None:
        """The same nodes without a cache."""
        prefix = self.prefix()
        self.network.limit(1, self.arguments.rate * 10**6)
        (alone,), _ = self.together(prefix, {0: ()})
        for count in self.arguments.nodes:
            loads, copies = self.together(prefix, dict.fromkeys(range(count), ()))
            self._herd_row(f"{count} nodes at once, without", loads, copies, alone)

    def _herd_row(self, row: str, loads: list[Load], copies: float, alone: Load) -> None:
        slowest = max(each.seconds for each in loads)
        self.say(row, slowest=slowest, of_one=slowest / alone.seconds, copies=copies,
                 failed=sum(each.failed for each in loads))  # fmt: skip

    def kills(self) -> None:
        """A peer, or one's own door, killed in the middle and coming back."""
        rate = self.arguments.rate * 10**6
        count = min(self.arguments.nodes)
        usual = 0.0
        prefix = self.prefix()
        self.network.limit(1, rate)
        for which in ("nothing", "a peer", "one's own door"):
            with self.fleet(count) as made:
                doors = {number: (each.option,) for number, each in enumerate(made.nodes)}
                if which == "a peer":
                    doors.pop(count - 1)  # its node only keeps a shelf
                dies = made.nodes[count - 1 if which == "a peer" else 0]

                def kill(dies: machines.Node = dies, which: str = which) -> None:
                    if which != "nothing":
                        time.sleep(self.size / rate / 3)
                        dies.kill(service=True)
                        time.sleep(self.size / rate / 4)
                        dies.start()

                loads, copies = self.together(prefix, doors, kill)
                slowest = max(each.seconds for each in loads)
                usual = usual or slowest
                self.say(f"{which} killed -9 in mid-load", slowest=slowest,
                         of_usual=slowest / usual, copies=copies,
                         failed=sum(each.failed for each in loads))  # fmt: skip

    def hop(self) -> None:
        """What the engine costs one node on a fast link, where the shelf has it or not."""
        rates: dict[str, list[float]] = {"without": [], "cold": [], "warm": []}
        processor_s = {"cold": 0.0, "warm": 0.0}
        prefix = self.prefix()
        self.network.limit(1, self.arguments.hop_rate * 10**6)
        for _ in range(self.arguments.rounds):
            with self.fleet(1) as made:
                door = (made.nodes[0].option,)
                for what, options in (("without", ()), ("cold", door), ("warm", door)):
                    before = _processor_s(made.nodes[0].nginx())
                    (one,), _ = self.together(prefix, {0: options})
                    rates[what].append(self.size / one.seconds)
                    if what in processor_s:
                        processor_s[what] += _processor_s(made.nodes[0].nginx()) - before
        middle = {name: statistics.median(them) / 1e6 for name, them in rates.items()}
        gigabytes = self.size * self.arguments.rounds / 1e9
        self.say(f"one node, link of {self.arguments.hop_rate or 'any number of'} MB/s", **middle,
                 cold_of_without=middle["cold"] / middle["without"],
                 warm_of_without=middle["warm"] / middle["without"],
                 cpu_s_a_gb_cold=processor_s["cold"] / gigabytes,
                 cpu_s_a_gb_warm=processor_s["warm"] / gigabytes)  # fmt: skip

    def dead(self) -> None:
        """A door that is dead from the start, in rounds with none at all."""
        times: dict[str, list[float]] = {"without": [], "dead": [], "deaf": []}
        ways = {
            "without": (),
            "dead": ("--fleet-cache=http://127.0.0.1:9",),
            "deaf": (f"--fleet-cache=http://{_NET}.99:9",),  # no machine: nothing answers
        }
        prefix = self.prefix()
        self.network.limit(1, 4 * self.arguments.rate * 10**6)
        for _ in range(self.arguments.rounds):
            for what, options in ways.items():
                (one,), _ = self.together(prefix, {0: options})
                times[what].append(one.seconds)
        middle = {what: statistics.median(them) for what, them in times.items()}
        self.say("a door that is dead from the start (s)", **middle)


def _processor_s(pids: list[int]) -> float:
    """What processes and their threads have used."""
    return sum(processor_time_s(Path(f"/proc/{pid}")) for pid in pids)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    rows = ("herd", "without", "kills", "hop", "dead")
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(rows)}; all if none is named")
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--rate", type=int, default=25, help="MB/s of the scarce link")
    parser.add_argument("--hop-rate", type=int, default=0, help="MB/s in `hop`; 0: no limit")
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--shard-mib", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was made is taken away
    directory = Path(tempfile.mkdtemp(prefix="lazyfs-fleet-"))
    try:
        with Network(f"lf{os.getpid() % 100000}") as network:
            bench = Bench(directory, network, arguments)
            with bench.store():
                for each in arguments.rows or rows:
                    getattr(bench, each)()
        if arguments.json:
            arguments.json.write_text(json.dumps(bench.rows, indent=1))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
