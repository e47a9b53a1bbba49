"""Everything goes wrong at once, for as long as you like: is every byte right, and nobody stuck?

    python tests/soak.py SECONDS [--patience SECONDS] [--movers N] [--readers N]

A mount with little memory, and a cache that holds a part of the model, serves 256 reading
threads. In *storms* of some seconds S3 refuses, hangs, resets, cuts off and crawls, workers are
killed, pages are dropped and, for root, inodes are forgotten. After each storm there is a *calm*,
longer than the patience. It fails if a byte is wrong, if a read fails, if a reader waits for longer
than the patience in a calm, or if memory or descriptors of the worker grow. Prints one line of
JSON; where a reader waited too long, it has what the worker said of itself meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from mounting import RUNTIME_DIRECTORY, Mounted, descriptors, worker_pid
from s3 import S3

from lazyfs.control.client import ControlClient, ControlError
from lazyfs.process.mount_records import control_socket

MIB = 1 << 20
SHARD_BYTES = 24 * MIB
SHARDS = 6
HANG_S = 2.0
STEP_S = 1.0
MOST_FAULTS_OF_STORM = 6
# A calm is this much longer than the patience.
CALM_S = 1.0
# Inodes of the whole machine are forgotten, so not often.
FORGET_EVERY = 15
OPTIONS = ["--block-size=1MiB", "--memory-limit=64MiB", "--io-timeout=60s", "--cache-size=64MiB"]
# Waits of this length are noted, and what the worker says meanwhile; the last ones of it are kept.
LONG_S = 3.0
MOST_TOLD = 100
LONGEST_START_S = 120.0
TOLD = (
    "pid", "worker_uptime_s", "restarts", "trouble", "requests_in_flight", "requests_limit",
    "in_flight", "memory_bytes", "fetched_blocks", "from_disk_bytes", "to_disk_bytes",
    "shed_blocks", "pushed_blocks", "cache", "reads", "stalled_s", "readers_waiting", "waiting",
    "retries", "second_requests", "last_error",
)  # fmt: skip

# Each word of a file is its own position, so any part of it can be checked.
READ = """
import json, mmap, os, pathlib, random, sys, threading, time
import numpy as np
paths = sorted(pathlib.Path(sys.argv[1]).glob("*.safetensors"))
readers, stop = int(sys.argv[2]), threading.Event()
waits, wrong, failed, done = [[] for _ in range(readers)], [], [], [0] * readers
long_s = float(sys.argv[3])

def read(me):
    rng = random.Random(me)
    while not stop.is_set():
        path = rng.choice(paths)
        size = path.stat().st_size
        at = rng.randrange(0, size, 8)
        length = min(rng.choice((8, 4096, 65536, 300_000)) // 8 * 8, size - at)
        began = time.monotonic()
        try:
            file = os.open(path, os.O_RDONLY)
            try:
                if me % 2:
                    with mmap.mmap(file, 0, prot=mmap.PROT_READ) as mapped:
                        data = mapped[at : at + length]
                else:
                    data = os.pread(file, length, at)
            finally:
                os.close(file)
        except OSError as error:
            failed.append(f"{path.name} at {at}: {error}")
            return
        ended = time.monotonic()
        if ended - began >= long_s:
            waits[me].append((began, ended, f"{path.name} at {at}, {length} bytes"))
        expected = np.arange(at // 8, (at + length) // 8, dtype="<u8").tobytes()
        if data != expected:
            wrong.append(f"{path.name} at {at}, {length} bytes")
        done[me] += 1
        time.sleep(rng.random() * 0.05)

threads = [threading.Thread(target=read, args=(me,), daemon=True) for me in range(readers)]
for thread in threads:
    thread.start()
sys.stdin.read()
stop.set()
end = time.monotonic() + 90
for thread in threads:
    thread.join(max(0.0, end - time.monotonic()))
stuck = sum(thread.is_alive() for thread in threads)
print(json.dumps({"reads": sum(done), "waits": sum(waits, []), "wrong": wrong, "failed": failed,
                  "stuck": stuck}), flush=True)
os._exit(0)
"""
DROP = """
import os, pathlib, sys
for path in pathlib.Path(sys.argv[1]).glob("*.safetensors"):
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
"""


@dataclass(slots=True)
class Soak:
    """One mount in trouble. Times are of the monotonic clock.

    Attributes:
        calm_s: how long a calm lasts.
        asked: how many blocks S3 was asked for in storms.
        calms: when each began and ended.
        memory, open_files: of the worker in MiB and descriptors, sampled all the time.
        told: what the worker said while a reader waited for long, with the time.
    """

    s3: S3
    mounted: Mounted
    calm_s: float
    # Its first two storms have faults of almost every kind.
    rng: random.Random = field(default_factory=lambda: random.Random(6))
    faults: int = 0
    asked: int = 0
    calms: list[tuple[float, float]] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    open_files: list[int] = field(default_factory=list)
    told: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MOST_TOLD))

    def run(self, seconds: float) -> None:
        """Make storms and calms, one after the other."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            self._storm()
            began_s = time.monotonic()
            while time.monotonic() < began_s + self.calm_s:
                time.sleep(STEP_S / 2)
                self._look()
            self.calms.append((began_s, time.monotonic()))

    def _storm(self) -> None:
        """A few faults; over when S3 is well and a worker serves."""
        kinds = [self._refuse, self._reset, self._cut_off, self._hang, self._crawl, self._kill,
                 self._drop]  # fmt: skip
        for _ in range(self.rng.randint(1, MOST_FAULTS_OF_STORM)):
            self.rng.choice(kinds)()
            self.faults += 1
            if self.faults % FORGET_EVERY == 0:
                self._forget()
            time.sleep(STEP_S)
            self._look()
        self.asked += len(self.s3.data_requests())
        self.s3.forget()
        time.sleep(HANG_S)  # of requests that hang or crawl
        self._wait_for_a_worker()

    def _look(self) -> None:
        """Sample what the worker uses, and keep what it says if a reader waits for long."""
        with contextlib.suppress(OSError, AssertionError, ControlError):  # between two workers
            pid = worker_pid(self.mounted.path)
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            self.memory.append(pages * os.sysconf("SC_PAGE_SIZE") / MIB)
            self.open_files.append(descriptors(pid))
            status = self._status()
            if status["waiting"] and status["waiting"][0]["for_s"] >= LONG_S:
                self.told.append({"at_s": time.monotonic(), **{key: status[key] for key in TOLD}})

    def _status(self) -> dict[str, Any]:
        found: dict[str, Any] = ControlClient(control_socket(self.mounted.path)).get("/status")
        return found

    def _wait_for_a_worker(self) -> None:
        end_s = time.monotonic() + LONGEST_START_S
        while time.monotonic() < end_s:
            with contextlib.suppress(ControlError):
                self._status()
                return
            time.sleep(0.05)
        raise AssertionError("no worker serves")

    def _refuse(self) -> None:
        status, code = self.rng.choice(
            ((500, "InternalError"), (503, "SlowDown"), (400, "ExpiredToken"))
        )
        self.s3.fault("GET /soak/m/", "status", times=8, status=status, code=code)

    def _reset(self) -> None:
        self.s3.fault("GET /soak/m/", "reset", times=4)

    def _cut_off(self) -> None:
        kind = self.rng.choice(("truncate", "corrupt_range"))
        self.s3.fault("GET /soak/m/", kind, times=4)

    def _hang(self) -> None:
        self.s3.fault("GET /soak/m/", "hang", times=4, seconds=HANG_S)

    def _crawl(self) -> None:
        self.s3.fault("GET /soak/m/", "slow", times=4, seconds=HANG_S / 10)

    def _kill(self) -> None:
        """Kill the worker, also one that has only just started."""
        with contextlib.suppress(ProcessLookupError, AssertionError):
            os.kill(worker_pid(self.mounted.path), signal.SIGKILL)

    def _drop(self) -> None:
        command = [sys.executable, "-c", DROP, str(self.mounted.path)]
        subprocess.run(command, check=True, timeout=90)

    def _forget(self) -> None:
        with contextlib.suppress(OSError):  # not root
            Path("/proc/sys/vm/drop_caches").write_text("2\n")


@contextlib.contextmanager
def soaking(directory: Path, patience_s: float, movers: int = 0) -> Iterator[Soak]:
    """A mount of a model whose every word says where it is."""
    # Where the clients of the control socket look for it, as the command line does.
    os.environ["LAZYFS_RUNTIME_DIR"] = RUNTIME_DIRECTORY
    s3 = S3()
    body = np.arange(SHARD_BYTES // 8, dtype="<u8").tobytes()
    try:
        s3.put("soak", {f"m/model-{n:05}-of-{SHARDS:05}.safetensors": body
                        for n in range(1, SHARDS + 1)})  # fmt: skip
        mounted = Mounted(
            "s3://soak/m", directory / "mnt", directory / "cache", s3.url, *OPTIONS,
            f"--movers={movers}",
        )  # fmt: skip
        try:
            yield Soak(s3, mounted, patience_s + CALM_S)
        finally:
            s3.forget()
            mounted.end()
    finally:
        s3.stop()


def longest_calm_s(began_s: float, ended_s: float, calms: Sequence[tuple[float, float]]) -> float:
    """For how long there was a calm, at most, while a reader waited."""
    return max((min(ended_s, end) - max(began_s, begin) for begin, end in calms), default=0.0)


def problems_of(soak: Soak, told: dict[str, Any], patience_s: float) -> list[str]:
    """What is not as it should be."""
    found = [f"{what}: {told[what]}" for what in ("wrong", "failed", "stuck") if told[what]]
    for began_s, ended_s, what in told["waits"]:
        calm_s = longest_calm_s(began_s, ended_s, soak.calms)
        if calm_s > patience_s:
            said = [each for each in soak.told if began_s <= each["at_s"] <= ended_s]
            found.append(
                f"a reader of {what} waited {ended_s - began_s:.1f} s, {calm_s:.1f} s of them in "
                f"a calm; the worker said {json.dumps(said)}"
            )
    third = len(soak.memory) // 3
    for what, samples, more in (
        ("MiB of memory", soak.memory, 64), ("descriptors", soak.open_files, 64),
    ):  # fmt: skip
        before, after = max(samples[: 2 * third], default=0), max(samples[-third:], default=0)
        if third and after > before * 1.2 + more:
            found.append(f"{what} of the worker grew from {before:.0f} to {after:.0f}")
    return found


def main() -> None:
    """Soak for as long as the arguments say."""
    parser = argparse.ArgumentParser(description="everything goes wrong at once")
    parser.add_argument("seconds", type=float)
    parser.add_argument("--patience", type=float, default=5.0)
    parser.add_argument("--movers", type=int, default=0, help="processes that move bytes")
    parser.add_argument("--readers", type=int, default=256, help="threads")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="lazyfs-soak-") as directory,
        soaking(Path(directory), arguments.patience, arguments.movers) as soak,
        subprocess.Popen(
            [sys.executable, "-c", READ, str(soak.mounted.path), str(arguments.readers),
             str(LONG_S)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as readers,
    ):  # fmt: skip
        try:
            soak.run(arguments.seconds)
            output, _ = readers.communicate(timeout=120)
        finally:
            readers.kill()
        told = json.loads(output)
        problems = problems_of(soak, told, arguments.patience)
    waits = told.pop("waits")
    print(json.dumps({"faults": soak.faults, "storms": len(soak.calms),
                      "longest_s": max((end - begin for begin, end, _ in waits), default=0.0),
                      "longest_in_a_calm_s": max(
                          (longest_calm_s(begin, end, soak.calms) for begin, end, _ in waits),
                          default=0.0,
                      ),
                      "asked": soak.asked,
                      "most_mib": max(soak.memory, default=0),
                      "most_descriptors": max(soak.open_files, default=0),
                      **told, "problems": problems}))  # fmt: skip
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
