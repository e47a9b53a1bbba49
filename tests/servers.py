"""S3 servers that others wrote, as peers of the tests: started, and known for what they differ in.

Each is a program that `.ci/s3-servers` brings to `PROGRAMS`. Where it is not there, its tests are
skipped.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = Path(os.environ.get("LAZYFS_S3_SERVERS", Path.home() / ".cache" / "lazyfs-s3"))
ACCESS, SECRET = "matrix", "matrix-secret-key"
HOST = "s3.test"  # `dns/sitecustomize.py`
START_S = 60


@dataclass(frozen=True)
class Kind:
    """A server.

    Attributes:
        program: a file in `PROGRAMS`; empty: it is a module of this Python.
        tls, virtual: whether it can be asked so here.
        signs: whether it looks at signatures.
        quick: it is installed within a minute or so. The others are run by `make s3-matrix` only.
    """

    name: str
    program: str = ""
    tls: bool = True
    virtual: bool = True
    signs: bool = True
    quick: bool = True


KINDS = {
    kind.name: kind
    for kind in (
        Kind("moto", signs=False),
        Kind("versitygw", "versitygw"),
        Kind("s3proxy", "s3proxy.jar", tls=False, virtual=False),
        Kind("gofakes3", "gofakes3", tls=False, virtual=False, signs=False),
        Kind("minio", "minio", quick=False),
        Kind("seaweedfs", "weed", quick=False),
    )
    if kind.quick or os.environ.get("LAZYFS_S3_MATRIX")
}


def is_there(kind: Kind) -> bool:
    """Whether it can be started."""
    if kind.program.endswith(".jar") and not shutil.which("java"):
        return False
    return not kind.program or (PROGRAMS / kind.program).exists()


@contextlib.contextmanager
def running(kind: Kind, directory: Path, tls: tuple[Path, Path] | None) -> Iterator[int]:
    """A server that keeps its objects in a directory; its port."""
    port = _free_port()
    command, environment = _command(kind, directory, port, tls)
    with (
        open(directory / "log", "w") as log,
        subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=directory,
            env={**os.environ, **environment},
        ) as process,
    ):  # fmt: skip
        try:
            _wait(process, port, directory / "log")
            yield port
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _command(
    kind: Kind, directory: Path, port: int, tls: tuple[Path, Path] | None
) -> tuple[list[str], dict[str, str]]:
    """How a server is started, and its environment."""
    program = str(PROGRAMS / kind.program)
    data = directory / "data"
    data.mkdir()
    address = f"127.0.0.1:{port}"
    if kind.name == "moto":
        files = ["-s", "-c", str(tls[0]), "-k", str(tls[1])] if tls else []
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port), *files], {
            "S3_IGNORE_SUBDOMAIN_BUCKETNAME": "false"
        }
    if kind.name == "versitygw":
        files = [f"--cert={tls[0]}", f"--key={tls[1]}"] if tls else []
        return [
            program, f"--port={address}", *files, "--keep-alive", f"--virtual-domain={HOST}",
            "posix", str(data),
        ], {"ROOT_ACCESS_KEY": ACCESS, "ROOT_SECRET_KEY": SECRET}  # fmt: skip
    if kind.name == "s3proxy":
        (directory / "properties").write_text(
            f"s3proxy.endpoint=http://{address}\ns3proxy.authorization=aws-v2-or-v4\n"
            f"s3proxy.identity={ACCESS}\ns3proxy.credential={SECRET}\n"
            "jclouds.provider=filesystem-nio2\n"
            f"jclouds.identity=none\njclouds.credential=none\njclouds.filesystem.basedir={data}\n"
        )
        return ["java", "-Xmx256m", "-jar", program, "--properties", "properties"], {}
    if kind.name == "gofakes3":
        return [program, f"-host={address}", "-backend=memory"], {}
    if kind.name == "minio":
        certificates = directory / "certificates"
        certificates.mkdir()
        if tls:
            shutil.copy(tls[0], certificates / "public.crt")
            shutil.copy(tls[1], certificates / "private.key")
        return [
            program, "server", str(data), f"--address={address}", f"--certs-dir={certificates}",
            f"--console-address=127.0.0.1:{_free_port()}",
        ], {"MINIO_ROOT_USER": ACCESS, "MINIO_ROOT_PASSWORD": SECRET, "MINIO_DOMAIN": HOST,
            "MINIO_BROWSER": "off", "MINIO_UPDATE": "off"}  # fmt: skip
    assert kind.name == "seaweedfs"
    files = [f"-s3.cert.file={tls[0]}", f"-s3.key.file={tls[1]}"] if tls else []
    (directory / "keys.json").write_text(
        '{"identities": [{"name": "tests", "actions": ["Admin", "Read", "Write", "List"], '
        f'"credentials": [{{"accessKey": "{ACCESS}", "secretKey": "{SECRET}"}}]}}]}}'
    )
    return [
        program, "server", "-ip=127.0.0.1", f"-dir={data}", "-s3", f"-s3.port={port}",
        f"-s3.domainName={HOST}", "-s3.config=keys.json", "-volume.max=20",
        f"-master.port={_free_port()}", f"-volume.port={_free_port()}",
        f"-filer.port={_free_port()}", "-master.volumeSizeLimitMB=64", *files,
    ], {"TMPDIR": str(directory)}  # fmt: skip


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Until it answers, whatever it says."""
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert process.poll() is None, f"the server ended:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"the server does not listen:\n{log.read_text()}"
        time.sleep(0.1)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
