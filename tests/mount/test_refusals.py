"""Errors at mount: one line says what is wrong and what to do, and nothing is left."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mounting import Mounted, environment, is_mounted, lazyfs
from s3 import S3

pytestmark = pytest.mark.fuse


@pytest.fixture(scope="module", autouse=True)
def bucket(server: S3) -> None:
    server.put("good", {"m/file": b"x"})


@pytest.fixture
def refused(s3: S3, tmp_path: Path) -> Callable[..., str]:
    """Try to mount; the one line that says why it was refused."""
    (tmp_path / "mnt").mkdir()

    def attempt(
        *options: str,
        source: str = "s3://good/m",
        path: Path = tmp_path / "mnt",
        code: int = 1,
        env: dict[str, str] | None = None,
    ) -> str:
        answer = lazyfs(
            "mount", source, path,
            f"--endpoint-url={s3.url}", f"--cache-dir={tmp_path}/cache",
            f"--log-file={tmp_path}/log", *options, env=env,
        )  # fmt: skip
        assert answer.returncode == code, answer
        assert answer.stdout == ""
        assert answer.stderr.startswith("lazyfs: ")
        assert answer.stderr.count("\n") == 1, answer.stderr
        assert not is_mounted(path)
        processes = subprocess.run(["pgrep", "-af", str(path)], capture_output=True, check=False)
        assert b"lazyfs." not in processes.stdout
        return answer.stderr

    return attempt


def test_bucket_and_prefix(refused: Callable[..., str]) -> None:
    assert "no such bucket" in refused(source="s3://missing-bucket/m")
    assert "no objects below this prefix" in refused(source="s3://good/nothing")
    for source in ("good/m", "s3://", "http://good/m", "s3://good/a//b", "s3://good/../x"):
        assert "is not a source" in refused(source=source, code=2)


def test_credentials(refused: Callable[..., str], s3: S3) -> None:
    nobody = environment()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del nobody[name]
    message = refused(env=nobody)
    assert "no credentials found" in message and "--no-sign-request" in message
    s3.fault("list-type", "status", status=403, code="AccessDenied")
    message = refused()
    assert "AccessDenied" in message and "s3:ListBucket" in message
    assert "there is no profile 'nope'" in refused("--profile=nope", code=2)
    assert "test-secret-key" not in message


def test_endpoints_and_regions(refused: Callable[..., str], s3: S3, tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert "no usable answer" in refused(f"--endpoint-url={nobody}")
    assert "no usable answer" in refused("--endpoint-url=http://no-such-host.invalid")
    s3.fault("list-type", "status", status=400, code="AuthorizationHeaderMalformed", times=5)
    assert "--region" in refused()
    assert "--ca-bundle" in refused("--ca-bundle=/nonexistent.pem", code=2)


def test_mountpoints(
    refused: Callable[..., str], mount: Callable[..., Mounted], tmp_path: Path
) -> None:
    assert "does not exist" in refused(path=tmp_path / "missing")
    (tmp_path / "file").write_text("x")
    assert "is not a directory" in refused(path=tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    assert "is not empty" in refused(path=tmp_path / "full")
    mounted = mount("s3://good/m")
    answer = lazyfs("mount", "s3://good/m", mounted.path)
    assert answer.returncode == 1 and "is mounted there already" in answer.stderr


def test_fuse_is_missing(tmp_path: Path, s3: S3) -> None:
    """In a mount namespace of its own in which /dev is empty."""
    (tmp_path / "mnt").mkdir()
    command = (
        f"mount -t tmpfs none /dev && {sys.executable} -m lazyfs mount s3://good {tmp_path}/mnt"
    )
    answer = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f"{command} --log-file={tmp_path}/log"],
        capture_output=True, text=True, timeout=60, env=environment(), check=False,
    )  # fmt: skip
    if "unshare" in answer.stderr:
        pytest.skip("no permission to make a mount namespace")
    assert answer.returncode == 1
    assert "/dev/null" in answer.stderr or "/dev/fuse is missing" in answer.stderr


def test_cache_directories(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "--cache-dir" in refused(f"--cache-dir={tmp_path}/file/below")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert "chmod go-w" in refused(f"--cache-dir={tmp_path}/open")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--block-size=7MB", ["--block-size", "7MB", "256KiB", "64MiB"]),
        ("--block-size=tiny", ["--block-size", "tiny"]),
        ("--memory-limit=1K", ["--memory-limit", "1K", "64MiB"]),
        (
            "--prefetch=everything",
            ["--prefetch", "everything", "model, tensor, sequential, headers or off"],
        ),
        ("--io-timeout=5", ["--io-timeout", "'5'", "30s"]),
        ("--file-mode=666", ["--file-mode", "666"]),
        ("--endpoint-url=ftp://x", ["--endpoint-url", "http://"]),
        ("--endpoint-url=http://me:secret@x", ["--endpoint-url"]),
        ("--max-concurrency=0", ["--max-concurrency", "1 to 1024"]),
        ("--no-such-option=1", ["--no-such-option"]),
    ],
)
def test_options(refused: Callable[..., str], option: str, words: list[str]) -> None:
    message = refused(option, code=2)
    assert all(word in message for word in words), message


def test_options_from_elsewhere(refused: Callable[..., str], tmp_path: Path) -> None:
    message = refused(code=2, env=environment(LAZYFS_BLOCK_SIZE="7MB"))
    assert "LAZYFS_BLOCK_SIZE" in message and "7MB" in message
    config = tmp_path / "lazyfs.toml"
    config.write_text("block-size = '7MB'\n")
    assert str(config) in refused(f"--config={config}", code=2)
    config.write_text("blocksize = '8MiB'\n")
    assert "blocksize" in refused(f"--config={config}", code=2)
    config.write_text("= nonsense")
    assert "not valid TOML" in refused(f"--config={config}", code=2)
    assert "No such file" in refused("--config=/nonexistent.toml", code=2)
