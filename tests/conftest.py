"""Fixtures: one S3 server for each process of a run, mounts that are always taken down."""

from __future__ import annotations

import compileall
import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hanging_disk import HangingDisk, hanging_disk
from hypothesis import HealthCheck, settings
from mounting import Mounted
from s3 import S3

# They need the cluster of `make cluster`, and the files of `make release`.
collect_ignore = [
    *([] if "LAZYFS_CLUSTER" in os.environ else ["cluster"]),
    *([] if "LAZYFS_RELEASE" in os.environ else ["release"]),
]

# How long an example takes says how busy the machine is, and nothing about the code.
settings.register_profile("lazyfs", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lazyfs")


def pytest_configure(config: pytest.Config) -> None:
    """Compile the packages, once for all processes of a run.

    Workers of root are other users, which cannot write what Python compiles. Without it each worker
    that a test starts compiles all its modules again.
    """
    if not hasattr(config, "workerinput"):
        for package in ("lazyfs", "csi"):
            compileall.compile_dir(config.rootpath / package, quiet=1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Unit tests come last: they are short, so that all processes of a run end together."""
    items.sort(key=lambda item: "unit" in item.path.parts)


@pytest.fixture(scope="session")
def server() -> Iterator[S3]:
    """The S3 server."""
    running = S3()
    yield running
    running.stop()


@pytest.fixture
def s3(server: S3) -> Iterator[S3]:
    """The S3 server, with nothing counted and no fault planned."""
    server.forget()
    yield server
    server.forget()


@functools.cache
def others_can_run_this() -> bool:
    """Whether users without rights can run this Python with this lazyfs."""
    if os.geteuid() != 0:
        return True
    command = [sys.executable, "-c", "import lazyfs.process.worker"]
    try:
        done = subprocess.run(
            command, user=65534, group=65534, extra_groups=[], cwd="/", timeout=60, check=False,
            capture_output=True,
        )  # fmt: skip
    except PermissionError:
        return False
    return done.returncode == 0


@pytest.fixture
def for_all() -> None:
    """For tests of workers of root that need no rights: not in a directory of root alone."""
    if not others_can_run_this():
        pytest.skip("only root can read this directory or its Python, so workers keep a right")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[HangingDisk]:
    """A disk of 512 MiB that hangs when it is told to; no command may wait for it."""
    directory = tmp_path / "disk"
    directory.mkdir()
    try:
        made = hanging_disk(directory, 512 << 20)
        disk = made.__enter__()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine cannot have a disk that hangs: {error}")
    try:
        yield disk
        assert not disk.hung_long, "somebody waited for the disk"
    finally:
        made.__exit__(None, None, None)


@pytest.fixture
def mount(server: S3, tmp_path: Path) -> Iterator[Callable[..., Mounted]]:
    """Make mounts with `mount(source, *options)`; all are taken down at the end of the test.

    `path` names a mountpoint that was used before.
    """
    made: list[Mounted] = []
    numbers = itertools.count()  # mounts may be made at the same time

    def make(source: str, *options: str, path: Path | None = None) -> Mounted:
        path = path or tmp_path / f"mnt{next(numbers)}"
        mounted = Mounted(source, path, tmp_path / "cache", server.url, *options)
        made.append(mounted)
        return mounted

    yield make
    for mounted in reversed(made):
        mounted.end()
