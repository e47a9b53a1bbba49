"""Fixtures: plugins of the driver, and a cluster's API server."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from api_server import FakeApiServer
from nodes import TestNode
from plugins import Plugin
from s3 import S3


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


@pytest.fixture
def make_node(s3: S3, short_path: Path) -> Iterator[Callable[..., TestNode]]:
    """Make a node with `make_node(*options)`; it is taken down at the end of the test."""
    made: list[TestNode] = []

    def make(*options: str, **env: str) -> TestNode:
        directory = short_path / f"n{len(made)}"
        directory.mkdir(mode=0o700)
        made.append(TestNode(directory, s3.url, *options, **env))
        return made[-1]

    yield make
    for each in made:
        each.end()


@pytest.fixture
def node(make_node: Callable[..., TestNode]) -> TestNode:
    """A node."""
    return make_node()
