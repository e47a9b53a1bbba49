"""A private endpoint with its own certificate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import ADDRESS, make_certificate, make_certificates
from mounting import Mounted, lazyfs, shell
from s3 import S3

pytestmark = pytest.mark.fuse


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """An authority, a certificate of it, and its key."""
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def tls_s3(certificate: tuple[Path, Path, Path]) -> Iterator[S3]:
    authority, pem, key = certificate
    running = S3(pem, key, authority=authority)
    yield running
    running.stop()


def test_a_private_authority(
    tls_s3: S3, certificate: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    tls_s3.put("tls", {"m/file": b"secret" * 100_000})
    options = [f"--ca-bundle={certificate[0]}"]
    mounted = Mounted("s3://tls/m", tmp_path / "mnt", tmp_path / "cache", tls_s3.url, *options)
    try:
        assert shell("cat file", mounted.path).stdout == "secret" * 100_000
    finally:
        mounted.end()


def test_an_unknown_authority_is_refused(tls_s3: S3, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    answer = lazyfs("mount", "s3://tls/m", tmp_path / "mnt", f"--endpoint-url={tls_s3.url}")
    assert answer.returncode == 1
    assert answer.stderr.count("\n") == 1
    assert "certificate" in answer.stderr.lower()


def test_a_certificate_that_is_its_own_authority(tmp_path: Path) -> None:
    """What the listing takes, the reading takes."""
    pem, key = make_certificate(tmp_path, "both", *ADDRESS)
    server = S3(pem, key, authority=pem)
    try:
        server.put("tls", {"m/file": b"x"})
        options = [f"--ca-bundle={pem}"]
        mounted = Mounted("s3://tls/m", tmp_path / "mnt", tmp_path / "cache", server.url, *options)
        try:
            assert shell("cat file", mounted.path).stdout == "x"
        finally:
            mounted.end()
    finally:
        server.stop()
