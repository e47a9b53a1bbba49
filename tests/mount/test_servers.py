"""The same tests of a mount on several S3 servers."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import botocore.config
import pytest
from certificates import make_certificates
from mounting import environment, is_mounted, lazyfs, python
from servers import ACCESS, HOST, KINDS, SECRET, Kind, is_there, running

pytestmark = pytest.mark.fuse

WAYS = [
    pytest.param((kind, tls, style), id=f"{kind.name}-{'tls' if tls else 'plain'}-{style}")
    for kind in KINDS.values()
    for tls, style in ((False, "path"), (True, "path"), (False, "virtual"), (True, "virtual"))
    if (not tls or kind.tls)
    and (style == "path" or kind.virtual)
    # All other tests run on moto: two ways will do.
    and (kind.program or tls == (style == "virtual"))
]
DNS = str(Path(__file__).parents[1] / "dns")
MANY = 1105  # more than a page; where a page ends is the same in all ways to ask a server
WEIGHTS = random.Random(7).randbytes(3 << 20)
FILES = {
    "config.json": b'{"a": 1}',
    "model.safetensors": WEIGHTS,
    "a b+c%20d.txt": b"space, plus and percent",
    "dir/ü€.txt": b"beyond ASCII",
    "dir/deeper/x=1&y='2'.txt": b"signs",
}


@dataclass
class Peer:
    """A server with a bucket, and how lazyfs is told to ask it.

    Attributes:
        bodies: of the objects below `m/`.
    """

    kind: Kind
    client: Any
    bodies: dict[str, bytes]
    options: list[str]
    env: dict[str, str]

    def lazyfs(self, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
        return lazyfs(*arguments, *self.options, env={**self.env, **env})


@pytest.fixture(scope="module", params=WAYS)
def peer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Peer]:
    kind, tls, style = request.param
    if not is_there(kind):
        pytest.skip(f"{kind.name} is not installed; .ci/s3-servers brings it")
    directory = tmp_path_factory.mktemp(kind.name)
    authority, pair = None, None
    if tls:
        authority, *files = make_certificates(directory / "tls", f"DNS:*.{HOST}", f"DNS:{HOST}")
        pair = (files[0], files[1])
    with running(kind, directory, pair) as port:
        scheme = "https" if tls else "http"
        local = f"{scheme}://127.0.0.1:{port}"
        client = boto3.client(
            "s3", endpoint_url=local, aws_access_key_id=ACCESS, aws_secret_access_key=SECRET,
            region_name="us-east-1", verify=str(authority) if authority else None,
            config=botocore.config.Config(
                s3={"addressing_style": "path"}, max_pool_connections=16,
                # Not every server knows bodies that end in a checksum.
                request_checksum_calculation="when_required",
            ),
        )  # fmt: skip
        client.create_bucket(Bucket="models")
        many = MANY if (tls, style) == (False, "path") else 2
        bodies = FILES | {f"many/{number:04}": b"%d" % number for number in range(many)}
        with ThreadPoolExecutor(16) as threads:
            list(threads.map(
                lambda item: client.put_object(Bucket="models", Key=f"m/{item[0]}", Body=item[1]),
                bodies.items(),
            ))  # fmt: skip
        host = HOST if style == "virtual" else "127.0.0.1"
        options = [f"--endpoint-url={scheme}://{host}:{port}", f"--addressing-style={style}"]
        options += [f"--ca-bundle={authority}"] if authority else []
        env = environment(AWS_ACCESS_KEY_ID=ACCESS, AWS_SECRET_ACCESS_KEY=SECRET, PYTHONPATH=DNS)
        yield Peer(kind, client, bodies, options, env)


@pytest.fixture
def mounted(peer: Peer, tmp_path: Path) -> Iterator[Path]:
    """A mount of all that was put there, without a cache."""
    path = tmp_path / "mnt"
    path.mkdir()
    answer = peer.lazyfs(
        "mount", "s3://models/m", path, "--cache-dir=none", f"--log-file={tmp_path}/log",
        "--block-size=256KiB", "--prefetch=off", "--io-timeout=20s",
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    yield path
    end(path, peer)


def end(path: Path, peer: Peer) -> None:
    """Unmount; on a busy machine its daemon may end a little later."""
    lazyfs("umount", path, env=peer.env)
    assert not is_mounted(path)


LIST = """
import os, sys
root = sys.argv[1]
found = [os.path.relpath(f"{at}/{name}", root) for at, _, names in os.walk(root) for name in names]
print("\\n".join(sorted(found)))
"""
READ = """
import errno, os, sys
try:
    fd = os.open(sys.argv[1], os.O_RDONLY)
    os.pread(fd, 1, 0)
    print("read")
except OSError as error:
    print(errno.errorcode[error.errno])
"""


def test_all_objects_are_shown_and_every_byte_is_right(peer: Peer, mounted: Path) -> None:
    assert python(LIST, mounted).splitlines() == sorted(peer.bodies)
    for name in (*FILES, list(peer.bodies)[-1]):
        local = mounted.parent / "local"
        local.write_bytes(peer.bodies[name])
        answer = subprocess.run(["cmp", mounted / name, local], timeout=60, check=False)
        assert answer.returncode == 0, name


@pytest.mark.parametrize(
    "change",
    [
        lambda client: client.put_object(Bucket="models", Key="c/w", Body=b"B" * (1 << 20)),
        lambda client: client.put_object(Bucket="models", Key="c/w", Body=b"B" * 100),
        lambda client: client.delete_object(Bucket="models", Key="c/w"),
    ],
    ids=["same-size", "shorter", "deleted"],
)
def test_an_object_that_changes_is_stale(peer: Peer, tmp_path: Path, change: Any) -> None:
    peer.client.put_object(Bucket="models", Key="c/w", Body=b"A" * (1 << 20))
    path = tmp_path / "mnt"
    path.mkdir()
    answer = peer.lazyfs("mount", "s3://models/c", path, "--cache-dir=none", "--prefetch=off",
                         f"--log-file={tmp_path}/log")  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    try:
        change(peer.client)
        assert python(READ, path / "w").strip() == "ESTALE", (tmp_path / "log").read_text()
    finally:
        end(path, peer)


def test_a_warmed_cache_can_be_verified(peer: Peer, tmp_path: Path) -> None:
    answer = peer.lazyfs("warm", "s3://models/m", f"--cache-dir={tmp_path}", "--verify",
                         "--include=*.safetensors")  # fmt: skip
    assert answer.returncode == 0, answer.stderr


def test_refusals_are_named(peer: Peer, tmp_path: Path) -> None:
    def refused(source: str, **env: str) -> str:
        answer = peer.lazyfs("mount", source, tmp_path, "--cache-dir=none", **env)
        assert answer.returncode == 1, answer.stderr
        assert len(answer.stderr.splitlines()) == 1
        return answer.stderr

    assert "no such bucket" in refused("s3://no-such-bucket-here/m")
    assert "no objects below this prefix" in refused("s3://models/nothing")
    if peer.kind.signs:
        assert "SignatureDoesNotMatch" in refused("s3://models/m", AWS_SECRET_ACCESS_KEY="wrong")
