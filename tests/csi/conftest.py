"""Fixtures: plugins of the driver, and a cluster's API server."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from api_server import FakeApiServer
from plugins import Plugin


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose name leaves room for sockets in it."""
    path = Path(tempfile.mkdtemp(prefix="csi-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def plugin(short_path: Path) -> Iterator[Callable[..., Plugin]]:
    """Start plugins with `plugin("controller", *arguments)`; all are ended after the test."""
    started: list[Plugin] = []

    def start(kind: str, *arguments: str, **env: str) -> Plugin:
        started.append(Plugin(kind, short_path, *arguments, **env))
        return started[-1]

    yield start
    for each in reversed(started):
        each.end()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[FakeApiServer]:
    """An API server."""
    server = FakeApiServer(tmp_path / "account")
    yield server
    server.stop()
