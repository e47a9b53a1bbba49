"""lazyfs as something to be mounted by a bench, the same way as its peers (see peers.py)."""

from __future__ import annotations

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
        origin: who serves it.
        prefix: which part of the bucket.
        mountpoint: an empty directory.
        state: where the contender keeps what should survive the mount, its disk cache.
    """

    origin: origins.Origin
    prefix: str
    mountpoint: Path
    state: Path


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mount in use.

    Attributes:
        began: when its making began, on the monotonic clock.
        ready: when it could be used.
        start_cpu_s: processor time of its processes until then.
        group: all its processes.
        directory: where the prefix is.
    """

    began: float
    ready: float
    start_cpu_s: float
    group: Group
    directory: Path


class Contender(Protocol):
    """Something that can be mounted.

    Attributes:
        name: as the tables show it.
        keeps: whether it has a cache on disk, which a new mount finds again.
        folder: of the bucket in which the bytes are; empty if it is the prefix that is mounted.
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
    """lazyfs of some source tree.

    Attributes:
        tree: a directory that holds the package `lazyfs`.
        options: for `lazyfs mount`, beside what every mount here needs.
    """

    tree: Path
    name: str = "lazyfs"
    keeps: bool = True
    folder: str = ""
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=origins.environment)

    def version(self) -> str:
        """What `lazyfs --version` says, and the commit."""
        said = self._run("--version").stdout.strip()
        commit = subprocess.run(
            ["git", "-C", self.tree, "describe", "--always", "--dirty"],
            capture_output=True, text=True, timeout=TIMEOUT_S,
        )  # fmt: skip
        return f"{said} {commit.stdout.strip()}".strip()

    @contextlib.contextmanager
    def mount(self, place: Place) -> Iterator[Mounted]:
        """Mount, until the end of the block."""
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
    """Remove what a contender left on disk: its next mount starts cold."""
    shutil.rmtree(place.state, ignore_errors=True)
    place.state.mkdir(parents=True)
    os.sync()


def from_disk(place: Place) -> None:
    """Keep what is on disk, and have the kernel forget it: the next mount starts warm."""
    drop_page_cache(place.state)
