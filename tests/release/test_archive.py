"""The archive on fresh machines, unpacked and run by an ordinary user."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from machine import Machine
from release_files import MODEL, built
from s3 import CREDENTIALS

from lazyfs import __version__

pytestmark = pytest.mark.timeout(900)


def test_an_ordinary_user_unpacks_and_mounts(
    machine: Machine, archive: Path, endpoint: str
) -> None:
    """Root has no part in it but the set-user-id bit of fusermount3."""
    machine.copy(archive, "/tmp/lazyfs.tar.gz")
    machine.run("mkdir ~/apps && tar -xzf /tmp/lazyfs.tar.gz -C ~/apps", user="ann")
    # It can be moved, linked to, and called beside another Python's settings.
    machine.run("mv ~/apps ~/tools && ln -s ~/tools/lazyfs-*/bin/lazyfs ~/lazyfs", user="ann")
    environment = " ".join(f"{name}={value}" for name, value in CREDENTIALS.items())
    environment += " XDG_RUNTIME_DIR=/run/user/1000 PYTHONPATH=/tmp PYTHONHOME=/nowhere"
    said = machine.run(f"env {environment} ~/lazyfs --version", user="ann").stdout
    assert said.split()[-1] == __version__
    mount = f"~/lazyfs mount s3://release/m ~/model --endpoint-url {endpoint}"
    machine.run(f"mkdir ~/model && env {environment} {mount}", user="ann")
    size = machine.run("cat ~/model/weights.bin | wc -c", user="ann").stdout
    assert int(size) == len(MODEL["m/weights.bin"])
    machine.run(
        f"env {environment} ~/lazyfs doctor s3://release/m --endpoint-url {endpoint}", user="ann"
    )
    machine.run(f"env {environment} ~/lazyfs umount ~/model", user="ann")


def test_the_sbom_and_the_licences_name_what_is_bundled(archive: Path) -> None:
    sbom = json.loads(built("lazyfs-*-linux-x86_64.cdx.json").read_text())
    found = {part["purl"].split("@")[0] for part in sbom["components"] if "purl" in part}
    debian = {url.rpartition("/")[2] for url in found if url.startswith("pkg:deb/")}
    assert {"libfuse3-3", "libssl3", "libsqlite3-0", "python3.11-minimal"} <= debian
    assert {"pkg:pypi/botocore", "pkg:pypi/pyfuse3", "pkg:pypi/trio"} <= found
    with tarfile.open(archive) as files:
        licences = {Path(name).name for name in files.getnames() if "/licences/" in name}
    assert licences == debian
