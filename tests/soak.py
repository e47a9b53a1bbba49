"""Everything goes wrong at once, for as long as you like: is every byte right, and nobody stuck?

    python tests/soak.py SECONDS [--patience SECONDS]

A mount with little memory serves 256 reading threads while S3 refuses, hangs, resets, cuts off and
crawls, workers are killed, pages are dropped and, for root, inodes are forgotten. It fails if a
byte is wrong, if a read fails, if a reader waits longer than the longest fault lasted and the
patience, or if memory or descriptors of the worker grow. Prints one line of JSON.
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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from mounting import Mounted, descriptors, worker_pid
from s3 import S3

MIB = 1 << 20
SHARD_BYTES = 24 * MIB
SHARDS = 6
READERS = 256
HANG_S = 2.0
STEP_S = 1.0
# Inodes of the whole machine are forgotten, so not often.
FORGET_EVERY = 15
OPTIONS = ["--block-size=1MiB", "--memory-limit=64MiB", "--io-timeout=60s"]

# Each word of a file is its own position, so any part of it can be checked.
READ = """
import json, mmap, os, pathlib, random, sys, threading, time
import numpy as np
paths = sorted(pathlib.Path(sys.argv[1]).glob("*.safetensors"))
readers, stop = int(sys.argv[2]), threading.Event()
longest, wrong, failed, done = [0.0] * readers, [], [], [0] * readers

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
        longest[me] = max(longest[me], time.monotonic() - began)
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
print(json.dumps({"reads": sum(done), "longest_s": max(longest), "wrong": wrong, "failed": failed,
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
    """One mount in trouble.

    Attributes:
        longest_fault_s: of those that were made; of a kill, until another worker was there.
        memory, open_files: of the worker in MiB and descriptors, sampled at every step.
    """

    s3: S3
    mounted: Mounted
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    longest_fault_s: float = HANG_S
    faults: int = 0
    memory: list[float] = field(default_factory=list)
    open_files: list[int] = field(default_factory=list)

    def run(self, seconds: float) -> None:
        """Make faults, one after the other."""
        end_s = time.monotonic() + seconds
        kinds = [self._refuse, self._reset, self._cut_off, self._hang, self._crawl, self._kill,
                 self._drop]  # fmt: skip
        while time.monotonic() < end_s:
            self.rng.choice(kinds)()
            self.faults += 1
            if self.faults % FORGET_EVERY == 0:
                self._forget()
            time.sleep(STEP_S)
            self._sample()
        self.s3.forget()

    def _sample(self) -> None:
        with contextlib.suppress(OSError, AssertionError):  # between two workers
            pid = worker_pid(self.mounted.path)
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            self.memory.append(pages * os.sysconf("SC_PAGE_SIZE") / MIB)
            self.open_files.append(descriptors(pid))

    def _refuse(self) -> None:
        status = self.rng.choice((500, 503))
        self.s3.fault("GET /soak/m/", "status", times=8, status=status, code="SlowDown")

    def _reset(self) -> None:
        self.s3.fault("GET /soak/m/", "reset", times=4)

    def _cut_off(self) -> None:
        self.s3.fault("GET /soak/m/", "truncate", times=4)

    def _hang(self) -> None:
        self.s3.fault("GET /soak/m/", "hang", times=4, seconds=HANG_S)

    def _crawl(self) -> None:
        self.s3.fault("GET /soak/m/", "slow", times=4, seconds=HANG_S / 10)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, AssertionError):
            killed = worker_pid(self.mounted.path)
            began_s = time.monotonic()
            os.kill(killed, signal.SIGKILL)
            while not self._is_served_by_another(killed):
                time.sleep(0.05)
            self.longest_fault_s = max(self.longest_fault_s, time.monotonic() - began_s)

    def _is_served_by_another(self, killed: int) -> bool:
        with contextlib.suppress(AssertionError):
            return worker_pid(self.mounted.path) != killed
        return False

    def _drop(self) -> None:
        command = [sys.executable, "-c", DROP, str(self.mounted.path)]
        subprocess.run(command, check=True, timeout=90)

    def _forget(self) -> None:
        with contextlib.suppress(OSError):  # not root
            Path("/proc/sys/vm/drop_caches").write_text("2\n")


@contextlib.contextmanager
def soaking(directory: Path) -> Iterator[Soak]:
    """A mount of a model whose every word says where it is."""
    s3 = S3()
    body = np.arange(SHARD_BYTES // 8, dtype="<u8").tobytes()
    try:
        s3.put("soak", {f"m/model-{n:05}-of-{SHARDS:05}.safetensors": body
                        for n in range(1, SHARDS + 1)})  # fmt: skip
        mounted = Mounted("s3://soak/m", directory / "mnt", directory / "cache", s3.url, *OPTIONS)
        try:
            yield Soak(s3, mounted)
        finally:
            s3.forget()
            mounted.end()
    finally:
        s3.stop()


def problems_of(soak: Soak, told: dict[str, object], patience_s: float) -> list[str]:
    """What is not as it should be."""
    found = [f"{what}: {told[what]}" for what in ("wrong", "failed", "stuck") if told[what]]
    longest_s, allowed_s = float(str(told["longest_s"])), soak.longest_fault_s + patience_s
    if longest_s > allowed_s:
        found.append(f"a reader waited {longest_s:.1f} s; {allowed_s:.1f} s are allowed")
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
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="lazyfs-soak-") as directory,
        soaking(Path(directory)) as soak,
        subprocess.Popen(
            [sys.executable, "-c", READ, str(soak.mounted.path), str(READERS)],
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
    print(json.dumps({"faults": soak.faults, "longest_fault_s": soak.longest_fault_s,
                      "most_mib": max(soak.memory, default=0),
                      "most_descriptors": max(soak.open_files, default=0),
                      **told, "problems": problems}))  # fmt: skip
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
