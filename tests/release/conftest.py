"""Fixtures of the release: its files, and fresh machines."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import Machine, NoTreeError
from release_files import MODEL, built
from s3 import S3

from lazyfs import __version__


@pytest.fixture(scope="session")
def package() -> Path:
    return built("lazyfs_*.deb")


@pytest.fixture(scope="session")
def archive() -> Path:
    return built("lazyfs-*-linux-x86_64.tar.gz")


@pytest.fixture(scope="session")
def before(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of the version before: `$LAZYFS_BEFORE`, or this one under a smaller number."""
    if given := os.environ.get("LAZYFS_BEFORE"):
        return Path(given)
    directory = tmp_path_factory.mktemp("before")
    content = directory / "content"
    subprocess.run(["dpkg-deb", "--raw-extract", package, content], check=True)
    (module,) = content.glob("usr/lib/lazyfs/python/lib/python3/dist-packages/lazyfs/__init__.py")
    for file in (module, content / "DEBIAN" / "control"):
        file.write_text(file.read_text().replace(__version__, "0.0.9"))
    for compiled in (module.parent / "__pycache__").glob("__init__.*.pyc"):
        compiled.unlink()
    made = directory / "before.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Zgzip", "-z1", "--build", content, made],
                   check=True, stdout=subprocess.DEVNULL)  # fmt: skip
    return made


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def suite(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def machine(suite: str, tmp_path: Path) -> Iterator[Machine]:
    """A fresh machine with an ordinary user `ann`."""
    try:
        made = Machine(suite, tmp_path)
    except NoTreeError as error:
        pytest.skip(str(error))
    try:
        made.run("useradd --create-home --uid 1000 ann && install -d -o ann /run/user/1000")
        yield made
    finally:
        made.stop()


@pytest.fixture
def endpoint(s3: S3) -> str:
    """An S3 with a model in s3://release/m."""
    s3.put("release", MODEL)
    return s3.url
