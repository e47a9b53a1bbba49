"""The measurements at one origin. Each scenario yields lines as soon as it has them.

States: *cold*, nothing is cached; *later*, a second load of the same mount, after its processes
became idle; *hot*, another load directly after that, with the data in the page cache as far as
there is room; *warm*, a new mount with the disk cache of the last one, while the files of that
cache are not in the page cache.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import origin as origins
from accounting import FuseRequests, drop_page_cache, settle
from measure import (
    Loader,
    Meter,
    Run,
    answer_of,
    beside_metadata,
    download,
    limit,
    local,
    program,
    runai,
)
from mounts import Contender, Lazyfs, Place, forget, from_disk

MODEL, RECORDED, SMALL = "model", "recorded", "small"
TRACES = Path(__file__).parent / "traces"
SMALL_FILES = 100


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the results: contender, workload, state, and figures."""

    contender: str
    workload: str
    state: str

    def __str__(self) -> str:
        return ", ".join(word for word in (self.contender, self.workload, self.state) if word)


Lines = Iterator[tuple[Line, Run]]
LIMIT = Line("limit", "ranged GETs, thrown away", "")
RUNAI = Line("Run:ai, from S3", "its own", "cold")
# Where `make loaders` has installed it.
LOADERS = Path(os.environ.get("LAZYFS_LOADERS", Path.home() / ".cache" / "lazyfs-loaders"))
RUNAI_PYTHON = LOADERS / "venv" / "bin" / "python"
DOWNLOAD = Line("download, then load", "vllm", "cold")
DOWNLOADED = "local file, as written"


class Scenarios:
    """All measurements at one origin.

    Args:
        base: a directory for mountpoints and caches. The origin serves `base / "served"`.
    """

    def __init__(self, origin: origins.Origin, requests: FuseRequests | None, base: Path) -> None:
        self._origin = origin
        self._meter = Meter(origin, requests)
        self._base = base
        self._source = base / "served" / MODEL

    def place(self, prefix: str, name: str = "mnt") -> Place:
        """A mountpoint with its cache. All places share one cache."""
        mountpoint = self._base / name
        mountpoint.mkdir(exist_ok=True)
        return Place(self._origin, prefix, mountpoint, self._base / "state" / "cache")

    def download_and_local(self, *modes: str) -> Lines:
        """A download followed by a load, and loads of local files, in modes of load.py."""
        target = self._base / "downloaded"
        yield DOWNLOAD, download(self._origin, self._source, target)
        for mode in modes:
            # Written pages are in larger pieces of memory than mapped ones, and map faster.
            yield Line(DOWNLOADED, mode, "hot"), local(Loader(mode), target, hot=True)
        for mode in modes:
            drop_page_cache(target)
            yield Line("local file", mode, "cold"), local(Loader(mode), target, hot=False)
            yield Line("local file", mode, "hot"), local(Loader(mode), target, hot=True)
        shutil.rmtree(target)

    def runai(self) -> Lines:
        """Run:ai's streamer without a mount, where it is installed."""
        if RUNAI_PYTHON.exists():
            yield RUNAI, runai(self._origin, self._source, RUNAI_PYTHON)

    def limit(self) -> Lines:
        """The limit of the origin."""
        yield LIMIT, limit(self._origin, self._source)

    def cold(self, contender: Contender, workload: str) -> Lines:
        """One workload in one state.

        Args:
            workload: a mode of load.py; `vllm, N ranks`; or `replay NAME`, a trace.

        Raises:
            SystemExit: the contender does not mount or does not read.
        """
        loader, prefix = self._loader(workload)
        place = self.place(prefix)
        forget(place)
        self._meter.mark(self._origin.directory / (contender.folder or prefix))
        with contender.mount(place) as mounted:
            run = self._meter.first(loader, mounted, place)
        shutil.rmtree(place.state)
        yield Line(contender.name, workload, "cold"), run

    def load(self, contender: Contender, workload: str) -> Lines:
        """One workload in all states, and a check of the bytes.

        Args:
            workload: as above.

        Raises:
            SystemExit: the contender does not mount, does not read or gives wrong bytes.
        """
        loader, prefix = self._loader(workload)
        place = self.place(prefix)
        served = self._origin.directory / (contender.folder or prefix)
        forget(place)
        self._meter.mark(served)
        with contender.mount(place) as mounted:
            run = self._meter.first(loader, mounted, place)
            ended_cpu_s = mounted.group.cpu_seconds()
            settle(mounted.group)
            after_cpu_s = mounted.group.cpu_seconds() - ended_cpu_s
            yield Line(contender.name, workload, "cold"), replace(run, after_cpu_s=after_cpu_s)
            # This load brings back pages that the kernel has reclaimed. The next one is measured
            # like that of a local file: directly after another load.
            run = self._meter.again(loader, mounted, place)
            if workload == "vllm":
                yield Line(contender.name, workload, "later"), run
            run = self._meter.again(loader, mounted, place)
            yield Line(contender.name, workload, "hot"), run
            against = self._origin.directory / prefix
            Loader("check", f"--against={against}").load(mounted.directory)
            settle(mounted.group)
        if contender.keeps:
            from_disk(place)
            self._meter.mark(served)
            with contender.mount(place) as mounted:
                run = self._meter.first(loader, mounted, place)
                yield Line(contender.name, workload, "warm"), run
        shutil.rmtree(place.state)

    def two_mounts(self, lazyfs: Lazyfs) -> Lines:
        """Two mounts of one model with one cache, loaded at the same time."""
        first, second = self.place(MODEL), self.place(MODEL, "mnt2")
        forget(first)
        self._meter.mark(self._source)
        with lazyfs.mount(first) as one, lazyfs.mount(second) as two:
            run = self._meter.together(Loader("vllm"), [one, two], [first, second])
            yield Line(lazyfs.name, "vllm, 2 mounts at once", "cold"), run

    def _loader(self, workload: str) -> tuple[Loader, str]:
        mode, _, rest = workload.partition(" ")
        if mode == "replay":
            return Loader("replay", f"--trace={TRACES / rest}.csv.gz"), RECORDED
        if mode == "vllm,":
            return Loader("vllm", ranks=int(rest.split()[0])), MODEL
        return Loader(mode), MODEL

    def metadata_under_load(self, lazyfs: Lazyfs) -> dict[str, float]:
        """Latency of metadata calls during a cold load, from latency.py."""
        place = self.place(MODEL)
        forget(place)
        self._meter.mark(self._source)
        with lazyfs.mount(place) as mounted:
            return beside_metadata(mounted, lambda: Loader("vllm").load(mounted.directory))[1]

    def small_files(self, contender: Contender, prefix: str) -> dict[str, float]:
        """Mount time of a prefix, and latencies of its small files in each state."""
        place = self.place(prefix)
        forget(place)
        with contender.mount(place) as mounted:
            walked = answer_of(program("latency.py", "walk", mounted.directory))
            first = {
                "files": walked["files"],
                "mount_ms": (mounted.ready - mounted.began) * 1000,
                "mount_and_walk_ms": (walked["ended"] - mounted.began) * 1000,
            }
        forget(place)
        states: dict[str, dict[str, float]] = {}
        with contender.mount(place) as mounted:
            for state in ("cold", "hot"):
                states[state] = _read_small(mounted.directory)
            settle(mounted.group)
        if contender.keeps:
            from_disk(place)
            with contender.mount(place) as mounted:
                states["warm"] = _read_small(mounted.directory)
        shutil.rmtree(place.state)
        return first | {
            f"{state}_{name}": value
            for state, answer in states.items()
            for name, value in answer.items()
            if name.endswith("_ms")
        }


def _read_small(directory: Path) -> dict[str, float]:
    return answer_of(program("latency.py", "small", directory, SMALL_FILES))


def why_left_out(contender: str, error: SystemExit) -> str:
    """One line that says why a peer has no result. Errors that the peer did not cause are raised.

    Raises:
        SystemExit: the bench is being ended.
    """
    if not isinstance(error.code, str):
        raise error
    reason = error.code.strip().splitlines()[0] if error.code.strip() else "no reason given"
    print(f"bench: {contender} is left out: {reason}", file=sys.stderr, flush=True)
    return reason
