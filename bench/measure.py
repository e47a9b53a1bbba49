"""One measured load through one mount.

The time runs from just before the first process starts, which is that of the mount, until the last
tensor is copied. It covers the mount, the start of the loader (the interpreter, numpy, safetensors)
and the load itself (`load_s`). For a download it starts with the client; for a local file that is
not in the page cache, with the loader. If everything is in the page cache (hot), only the load
itself counts, for all contenders.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import origin as origins
from accounting import FuseRequests, keep_in_page_cache, touch_memory
from mounts import Mounted, Place

T = TypeVar("T")

HERE = Path(__file__).parent
TIMEOUT_S = 180


@dataclass(frozen=True, slots=True)
class Run:
    """The figures of a load. Fields that do not apply are None.

    Attributes:
        seconds: as above.
        load_s: from before the first open to the last tensor.
        mount_s: until the mount was ready.
        bytes: bytes that the loader copied.
        client_cpu_s: processor time of the mount's processes, or of the download client, from
            their start to the last tensor.
        start_cpu_s: the part of it before the mount was ready, or before the client's first
            request.
        after_cpu_s: additional processor time of the mount's processes, from the last tensor until
            they were idle.
        reader_cpu_s: processor time of the loader during the load.
        peak_mib: peak of resident memory of the mount's processes, or of the download client.
        fuse_requests, fuse_reads: requests, and reads among them, that the kernel sent.
        gets: GETs that the origin answered.
        fetched_over_needed: bytes of these answers divided by `bytes`.
    """

    seconds: float
    load_s: float
    bytes: int
    reader_cpu_s: float
    mount_s: float | None = None
    client_cpu_s: float | None = None
    start_cpu_s: float | None = None
    after_cpu_s: float | None = None
    peak_mib: float | None = None
    fuse_requests: int | None = None
    fuse_reads: int | None = None
    gets: int | None = None
    fetched_over_needed: float | None = None

    @property
    def rate(self) -> float:
        """GB/s."""
        return self.bytes / self.seconds / 1e9

    def as_json(self) -> dict[str, float | None]:
        return asdict(self)


class Loader:
    """Starts load.py, as one process or several."""

    def __init__(self, mode: str, *arguments: object, ranks: int = 1) -> None:
        self._mode = mode
        self._arguments = arguments
        self._ranks = ranks

    def load(self, *directories: Path) -> list[dict[str, float]]:
        """Load all directories at the same time, each with all ranks."""
        started = [
            program("load.py", self._mode, directory, *self._arguments, f"--ranks={self._ranks}",
                    f"--rank={rank}")
            for directory in directories
            for rank in range(self._ranks)
        ]  # fmt: skip
        try:
            return [answer_of(process) for process in started]
        finally:
            for process in started:
                process.kill()  # nothing happens to those that have ended
                process.wait()


class Meter:
    """Measures loads, with figures from the origin and the kernel."""

    def __init__(self, origin: origins.Origin, requests: FuseRequests | None) -> None:
        self._origin = origin
        self._requests = requests

    def mark(self, served: Path | None = None) -> None:
        """Start to count requests, before the mount begins.

        Args:
            served: the directory that the origin will serve; it is read into the page cache.
        """
        if served:
            keep_in_page_cache(served)
        touch_memory()
        self._mark()

    def _mark(self) -> None:
        self._origin.mark()
        if self._requests:
            self._requests.mark()

    def first(self, loader: Loader, mounted: Mounted, place: Place) -> Run:
        """The first load of a mount that has just been made."""
        return self._load(loader, [mounted], [place], began=mounted.began, cpu_s=0.0)

    def again(self, loader: Loader, mounted: Mounted, place: Place) -> Run:
        """A further load of the same mount."""
        self._mark()
        return self._load(loader, [mounted], [place], None, mounted.group.cpu_seconds())

    def together(self, loader: Loader, mounts: Sequence[Mounted], places: Sequence[Place]) -> Run:
        """The first loads of several mounts at the same time, until the last one ends."""
        return self._load(loader, mounts, places, min(m.began for m in mounts), 0.0)

    def _load(
        self, loader: Loader, mounts: Sequence[Mounted], places: Sequence[Place],
        began: float | None, cpu_s: float,
    ) -> Run:  # fmt: skip
        answers = loader.load(*(mounted.directory for mounted in mounts))
        client_cpu_s = sum(mounted.group.cpu_seconds() for mounted in mounts) - cpu_s
        size = int(sum(answer["bytes"] for answer in answers))
        ended = max(answer["ended"] for answer in answers)
        load_s = ended - min(answer["opened"] for answer in answers)
        asked = self._origin.requests()
        fuse = [self._requests.of(place.mountpoint) for place in places if self._requests]
        return Run(
            seconds=load_s if began is None else ended - began,
            load_s=load_s,
            bytes=size,
            reader_cpu_s=sum(answer["cpu_s"] for answer in answers),
            mount_s=None if began is None else max(m.ready - m.began for m in mounts),
            client_cpu_s=client_cpu_s,
            start_cpu_s=None if began is None else sum(m.start_cpu_s for m in mounts),
            peak_mib=max(mounted.group.peak_mib() for mounted in mounts),
            fuse_requests=sum(counts.total() for counts in fuse) if fuse else None,
            fuse_reads=sum(counts["READ"] for counts in fuse) if fuse else None,
            gets=asked.gets,
            fetched_over_needed=asked.bytes / size,
        )


def local(loader: Loader, directory: Path, *, hot: bool) -> Run:
    """A load from a local directory, in the page cache (hot) or not."""
    if not hot:
        touch_memory()
    began = time.monotonic()
    (answer,) = loader.load(directory)
    load_s = answer["ended"] - answer["opened"]
    seconds = load_s if hot else answer["ended"] - began
    return Run(seconds, load_s, int(answer["bytes"]), answer["cpu_s"])


def limit(origin: origins.Origin, source: Path) -> Run:
    """All bytes by parallel ranged GETs, thrown away: first request to last byte, the better of
    16 and 32 in flight."""
    keep_in_page_cache(source)
    runs = [fetch(origin, "raw", source, in_flight) for in_flight in (16, 32)]
    best = min(runs, key=lambda run: run["seconds"])
    return Run(
        seconds=best["seconds"],
        load_s=best["seconds"],
        bytes=int(best["bytes"]),
        reader_cpu_s=0.0,
        client_cpu_s=best["cpu_s"],
        start_cpu_s=best["start_cpu_s"],
        peak_mib=best["peak_mib"],
    )


def runai(origin: origins.Origin, source: Path, python: Path) -> Run:
    """A load by Run:ai's streamer straight from S3, without the start of its interpreter.

    Args:
        python: of an environment that has it.
    """
    keep_in_page_cache(source)
    touch_memory()
    process = subprocess.Popen(
        [python, HERE / "runai.py", f"s3://{origins.BUCKET}/{source.name}/"],
        env={**origin.environment, "AWS_ENDPOINT_URL": origin.url,
             "AWS_EC2_METADATA_DISABLED": "true", "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    origin.mark()
    answer = answer_of(process)
    asked, size = origin.requests(), int(answer["bytes"])
    load_s = answer["ended"] - answer["opened"]
    return Run(
        seconds=load_s,
        load_s=load_s,
        bytes=size,
        reader_cpu_s=0.0,
        client_cpu_s=answer["cpu_s"] + answer["start_cpu_s"],
        start_cpu_s=answer["start_cpu_s"],
        peak_mib=answer["peak_mib"],
        gets=asked.gets,
        fetched_over_needed=asked.bytes / size,
    )


def download(origin: origins.Origin, source: Path, target: Path) -> Run:
    """Download everything by parallel ranged GETs, then load it from there."""
    keep_in_page_cache(source)
    touch_memory()
    began = time.monotonic()
    fetched = fetch(origin, "download", source, 32, target)
    (loaded,) = Loader("vllm").load(target)
    return Run(
        seconds=loaded["ended"] - began,
        load_s=loaded["ended"] - loaded["opened"],
        bytes=int(loaded["bytes"]),
        reader_cpu_s=loaded["cpu_s"],
        client_cpu_s=fetched["cpu_s"],
        start_cpu_s=fetched["start_cpu_s"],
        peak_mib=fetched["peak_mib"],
    )


def fetch(origin: origins.Origin, mode: str, *arguments: object) -> dict[str, float]:
    """Run fetch.py."""
    return answer_of(program("fetch.py", mode, origin.url, *arguments, clients_of=origin))


def program(
    script: str, *arguments: object, clients_of: origins.Origin | None = None
) -> subprocess.Popen[str]:
    """Start a program of the bench. With an origin, it gets the environment for its clients."""
    return subprocess.Popen(
        [sys.executable, str(HERE / script), *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=clients_of.environment if clients_of else origins.environment(),
    )  # fmt: skip


def beside_metadata(mounted: Mounted, load: Callable[[], T]) -> tuple[T, dict[str, float]]:
    """What a load returns, and the latencies of metadata calls during it, from latency.py."""
    asking = program("latency.py", "metadata", mounted.directory)
    try:
        return load(), answer_of(asking)
    finally:
        asking.kill()


def answer_of(process: subprocess.Popen[str]) -> dict[str, float]:
    """The line of JSON that a program prints."""
    try:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"bench: {process.args!r}: no end after {TIMEOUT_S} s") from None
    finally:
        process.kill()  # nothing happens to one that has ended
        process.wait()
    if process.returncode != 0:
        raise SystemExit(f"bench: {process.args!r}: exit {process.returncode}: {errors.strip()}")
    answer: dict[str, float] = json.loads(output)
    return answer
