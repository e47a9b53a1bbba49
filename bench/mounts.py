"""Mounts lazyfs for a bench, with the same interface as its peers (see peers.py)."""

from __future__ import annotations

import compileall
import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import origin as origins
from accounting import Group, drop_page_cache, group, is_mounted

TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Place:
    """What a contender mounts, and where.

    Attributes:
        origin: the S3 server.
        prefix: the prefix in the bucket.
        mountpoint: an empty directory.
        state: directory for the disk cache of the contender, which outlives the mount.
    """

    origin: origins.Origin
    prefix: str
    mountpoint: Path
    state: Path


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mount in use.

    Attributes:
        began: when mounting began, on the monotonic clock.
        ready: when the mount was ready.
        start_cpu_s: processor time of its processes until then.
        group: the control group of its processes.
        directory: the directory with the contents of the prefix.
    """

    began: float
    ready: float
    start_cpu_s: float
    group: Group
    directory: Path


class Contender(Protocol):
    """A program that can mount a bucket.

    Attributes:
        name: its name in the tables.
        keeps: whether it has a disk cache that a new mount uses.
        folder: folder of the bucket with its own copy of the data; empty if it mounts the prefix.
    """

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> str: ...

    @property
    def keeps(self) -> bool: ...

    def version(self) -> str: ...

    def mount(self, place: Place) -> contextlib.AbstractContextManager[Mounted]: ...


@dataclass(frozen=True, slots=True)
class Lazyfs:
    """lazyfs from a source tree, which is compiled: as in a release, no start has to do that.

    Workers of root are other users, which cannot write what Python compiles. Each of them would
    compile all its modules again, which takes about as long as the rest of the start.

    Attributes:
        tree: a directory with the package `lazyfs`.
        options: additional options of `lazyfs mount`.
    """

    tree: Path
    name: str = "lazyfs"
    keeps: bool = True
    folder: str = ""
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=origins.environment)

    def __post_init__(self) -> None:
        if not compileall.compile_dir(self.tree / "lazyfs", quiet=1):
            raise SystemExit(f"bench: {self.tree / 'lazyfs'} cannot be compiled")

    def version(self) -> str:
        """The output of `lazyfs --version`, and the commit."""
        said = self._run("--version").stdout.strip()
        commit = subprocess.run(
            ["git", "-C", self.tree, "describe", "--always", "--dirty"],
            capture_output=True, text=True, timeout=TIMEOUT_S,
        )  # fmt: skip
        return f"{said} {commit.stdout.strip()}".strip()

    @contextlib.contextmanager
    def mount(self, place: Place) -> Iterator[Mounted]:
        """Mount for the duration of the `with` block."""
        source = f"s3://{origins.BUCKET}/{place.prefix}"
        cache = place.state if self.keeps else "none"
        with group(place.mountpoint.name) as counted:
            began = time.monotonic()
            try:
                self._run(
                    "mount", source, place.mountpoint, f"--endpoint-url={place.origin.url}",
                    f"--cache-dir={cache}", f"--log-file={place.state.parent / 'lazyfs.log'}",
                    *self.options, group=counted, more=place.origin.environment,
                )  # fmt: skip
                ready, cpu_s = time.monotonic(), counted.cpu_seconds()
                yield Mounted(began, ready, cpu_s, counted, place.mountpoint)
            finally:
                if is_mounted(place.mountpoint):
                    self._run("umount", place.mountpoint)

    def _run(
        self, *arguments: object, group: Group | None = None, more: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        answer = subprocess.run(
            [sys.executable, "-P", "-m", "lazyfs", *map(str, arguments)],
            env={**self.environment, **(more or {}), "PYTHONPATH": str(self.tree)},
            cwd="/", capture_output=True, text=True, check=False,
            timeout=TIMEOUT_S, preexec_fn=group.enter if group else None,
        )  # fmt: skip
        if answer.returncode != 0:
            raise SystemExit(f"bench: lazyfs {arguments[0]}: {answer.stderr.strip()}")
        return answer


def forget(place: Place) -> None:
    """Remove the disk cache of a contender, so that its next mount starts cold."""
    shutil.rmtree(place.state, ignore_errors=True)
    place.state.mkdir(parents=True)
    os.sync()


def from_disk(place: Place) -> None:
    """Drop a contender's disk cache from the page cache, so that its next mount starts warm."""
    drop_page_cache(place.state)
