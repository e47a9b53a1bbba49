"""A fleet on this machine: an S3 that checks keys, and nodes with addresses of their own.

Every address of 127.0.0.0/8 is this machine's, so a node is an address. S3 is versitygw; before it
stands an nginx that counts what leaves it, which versitygw's own log does not for ranges.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import botocore.config
import pytest
from mounting import environment
from ports import free_port
from servers import PROGRAMS

ROOT = ("root-key", "root-secret-key")
BUCKET = "models"
VERSITYGW = PROGRAMS / "versitygw"
START_S = 60
NGINX = shutil.which("nginx") or "/usr/sbin/nginx"
_METER = """
daemon off; worker_processes 1; pid {here}/meter.pid; error_log stderr warn;
events {{ worker_connections 4096; }}
http {{
    log_format counted '$request_method $status $body_bytes_sent "$http_range" $remote_addr $uri';
    access_log {here}/access.log counted;
    client_max_body_size 0;
    client_body_temp_path {here}/tmp; proxy_temp_path {here}/tmp; fastcgi_temp_path {here}/tmp;
    uwsgi_temp_path {here}/tmp; scgi_temp_path {here}/tmp;
    upstream s3 {{ server {behind}; keepalive 64; }}
    server {{
        listen {address}:{port} backlog=4096;
        proxy_http_version 1.1; proxy_max_temp_file_size 0; proxy_request_buffering off;
        proxy_set_header Host $http_host; proxy_set_header Connection "";
        proxy_buffers 16 64k; proxy_busy_buffers_size 256k;
        location / {{ proxy_pass http://s3; }}
    }}
}}
"""


def needs_programs() -> None:
    """Skip the test where nginx or versitygw cannot be had."""
    if not Path(NGINX).exists():
        pytest.skip("nginx is not installed; .ci/setup installs it where it can")
    if not VERSITYGW.exists():
        pytest.skip("versitygw is not installed; .ci/s3-servers brings it")


class Read(NamedTuple):
    """A GET of a range."""

    path: str
    status: int
    size: int
    client: str


@dataclass
class Store:
    """A running versitygw with one bucket.

    Attributes:
        url: of the S3.
        client: the owner's.
    """

    url: str
    client: Any
    log: Path

    def put(self, **files: bytes) -> None:
        for key, body in files.items():
            self.client.put_object(Bucket=BUCKET, Key=key, Body=body)

    def reads(self) -> list[Read]:
        """Each GET of a range so far, the single bytes that ask for access left out."""
        found = []
        for line in self.log.read_text().splitlines():
            words = line.split()
            asked = words[3].strip('"')
            if words[0] == "GET" and asked not in ("-", "bytes=0-0"):
                found.append(Read(words[5], int(words[1]), int(words[2]), words[4]))
        return found

    def sent(self, since: int = 0) -> int:
        """Bytes of ranges that left it."""
        return sum(each.size for each in self.reads()[since:] if each.status == 206)

    def looks(self) -> int:
        """How often a single byte was asked for."""
        return self.log.read_text().count('"bytes=0-0"')

    def user(self, name: str, *actions: str) -> dict[str, str]:
        """A user who may do so with the bucket; the environment of its mounts."""
        secret = f"{name}-secret-key"
        self.admin("create-user", "-a", name, "-s", secret, "-r", "user")
        policy: dict[str, Any] = {"Version": "2012-10-17", "Statement": []}
        with contextlib.suppress(self.client.exceptions.ClientError):
            policy = json.loads(self.client.get_bucket_policy(Bucket=BUCKET)["Policy"])
        policy["Statement"] += [
            {"Effect": "Allow", "Principal": {"AWS": [name]}, "Action": [action],
             "Resource": f"arn:aws:s3:::{BUCKET}" + ("/*" if "Object" in action else "")}
            for action in actions
        ]  # fmt: skip
        if actions:
            self.client.put_bucket_policy(Bucket=BUCKET, Policy=json.dumps(policy))
        return environment(AWS_ACCESS_KEY_ID=name, AWS_SECRET_ACCESS_KEY=secret)

    def admin(self, *arguments: str) -> None:
        subprocess.run(
            [VERSITYGW, "admin", "-a", ROOT[0], "-s", ROOT[1], "-r", "us-east-1",
             "--er", self.url, *arguments],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip


@contextlib.contextmanager
def store(
    directory: Path, address: str = "127.0.0.1", prefix: tuple[str, ...] = ()
) -> Iterator[Store]:
    """Start versitygw.

    Args:
        prefix: of its command: what runs it elsewhere.
    """
    for each in ("data", "iam", "tmp"):
        (directory / each).mkdir()
    behind, port = free_port(), free_port()
    log = directory / "access.log"
    log.touch()
    gateway = [
        *prefix, str(VERSITYGW), "--quiet", f"--port=127.0.0.1:{behind}", "--keep-alive",
        f"--access={ROOT[0]}", f"--secret={ROOT[1]}", f"--iam-dir={directory}/iam",
        "--iam-cache-disable", "posix", str(directory / "data"),
    ]  # fmt: skip
    configuration = directory / "meter.conf"
    configuration.write_text(
        _METER.format(here=directory, behind=f"127.0.0.1:{behind}", address=address, port=port)
    )
    meter = [*prefix, NGINX, "-e", "stderr", "-c", str(configuration)]
    url = f"http://{address}:{port}"
    client = boto3.client(
        "s3", endpoint_url=url, aws_access_key_id=ROOT[0], aws_secret_access_key=ROOT[1],
        region_name="us-east-1",
        config=botocore.config.Config(
            s3={"addressing_style": "path"}, request_checksum_calculation="when_required"
        ),
    )  # fmt: skip
    with running(gateway, directory / "s3.log"), running(meter, directory / "s3.log"):
        until(lambda: succeeds(client.list_buckets), "S3 does not answer")
        client.create_bucket(Bucket=BUCKET)
        yield Store(url, client, log)


@dataclass
class Node:
    """One node's door and shelf."""

    address: str
    door: str
    directory: Path
    settings: dict[str, Any]
    prefix: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None

    @property
    def option(self) -> str:
        return f"--fleet-cache={self.door}"

    @property
    def configuration(self) -> Path:
        return self.directory / "run" / "nginx.conf"

    def start(self) -> None:
        path = self.directory / "fleet.toml"
        path.write_text("".join(f"{key} = {json.dumps(it)}\n" for key, it in self.settings.items()))
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "lazyfs", "fleet-cache", "--config", path],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment(),
            )  # fmt: skip
        until(self.answers, f"no door at {self.door}", self.process)

    def answers(self) -> bool:
        """Whether door and shelf take connections."""
        shelf = (self.address, self.settings["shelf-port"])
        host, _, port = self.settings["door"].rpartition(":")
        if host == "unix":
            return Path(port).is_socket() and connects(self.prefix, *shelf)
        return connects(self.prefix, *shelf) and connects(self.prefix, host, int(port))

    def kept(self) -> int:
        """How many ranges its shelf has."""
        return sum(each.is_file() for each in Path(self.settings["cache-dir"]).rglob("*"))

    def nginx(self) -> list[int]:
        """Processes of nginx: the master first."""
        assert self.process
        found = []
        queue = [self.process.pid]
        while queue:
            pid = queue.pop(0)
            with contextlib.suppress(OSError):
                below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                queue += map(int, below)
                if Path(f"/proc/{pid}/comm").read_text().strip() == "nginx":
                    found.append(pid)
        return found

    def kill(self, *, service: bool = False) -> None:
        """Kill its nginx, all of it. Its service starts another one, unless it is killed too."""
        found = self.nginx()
        if service and self.process:
            self.process.kill()
            self.process.wait()
            self.process = None
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """End it as systemd or kubelet does."""
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(60)
            finally:
                if self.process.poll() is None:
                    self.kill()
                    self.process.kill()
            self.process = None

    def log(self) -> str:
        return (self.directory / "log").read_text()


@dataclass
class Fleet:
    """Nodes that know each other by a file."""

    directory: Path
    origin: str
    nodes: list[Node] = field(default_factory=list)

    def add(self, address: str, prefix: tuple[str, ...] = (), **settings: Any) -> Node:
        """Start a node, of which the others hear."""
        directory = self.directory / address
        directory.mkdir()
        ports = self.nodes[0].settings if self.nodes else {}
        door = f"{address}:{free_port()}"
        settings = {
            "origins": [self.origin], "door": door, "address": address,
            "shelf-port": ports.get("shelf-port") or free_port(),
            "members-file": str(self.directory / "members"),
            "cache-dir": str(directory / "cache"), "run-dir": str(directory / "run"),
            "cache-size": "2GiB", "cache-reserve": "64MiB", "workers": 2, "user": "root",
            **settings,
        }  # fmt: skip
        door = str(settings["door"])
        url = door if door.startswith("unix:") else f"http://{door}"
        node = Node(address, url, directory, settings, prefix)
        self.nodes.append(node)
        self.tell()
        node.start()
        return node

    def tell(self, *addresses: str) -> None:
        """Say which nodes there are, and do not wait until they know."""
        named = addresses or tuple(each.address for each in self.nodes)
        new = self.directory / "members.new"
        new.write_text("# the fleet\n" + "".join(f"{each}\n" for each in named))
        new.rename(self.directory / "members")

    def know(self, *addresses: str) -> None:
        """Wait until all nodes that run have heard of these, and of no others."""
        expected = sorted(addresses or [each.address for each in self.nodes])

        def all_do() -> bool:
            return all(
                sorted(set(re.findall(r"allow (\S+);", each.configuration.read_text())))
                == sorted({each.address, *expected})
                for each in self.nodes
                if each.process
            )

        until(all_do, "the nodes do not hear of each other")
        until(self._all_reach_all, "a shelf does not know a door")

    def _all_reach_all(self) -> bool:
        """Whether each shelf answers each door: nginx takes a configuration a moment later."""
        alive = [each for each in self.nodes if each.process and not each.settings.get("tls-dir")]
        asked = {"Range": "bytes=0-1", "If-Match": '"none"', "Host": self.origin.partition("//")[2]}
        for door, shelf in itertools.product(alive, alive):
            if door.prefix:
                continue  # it has an address that is not this machine's
            connection = http.client.HTTPConnection(
                shelf.address, shelf.settings["shelf-port"], timeout=20,
                source_address=(door.address, 0),
            )  # fmt: skip
            connection.request("GET", f"/{BUCKET}/none", headers=asked)
            if connection.getresponse().status == 502:
                return False
        return True

    def stop(self) -> None:
        for each in self.nodes:
            each.stop()


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program, until the end of the block."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


_CONNECT = """
import socket, sys
socket.create_connection((sys.argv[1], int(sys.argv[2])), 2).close()
"""


def connects(prefix: tuple[str, ...], host: str, port: int) -> bool:
    """Whether somebody listens there."""
    command = [*prefix, sys.executable, "-S", "-c", _CONNECT, host, str(port)]
    return not subprocess.run(command, capture_output=True, check=False).returncode


def until(
    holds: Callable[[], bool], otherwise: str, process: subprocess.Popen[bytes] | None = None
) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + START_S
    while not holds():
        assert process is None or process.poll() is None, f"{otherwise}: it ended"
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.1)


def succeeds(action: Callable[[], object]) -> bool:
    try:
        action()
    except Exception:
        return False
    return True


def model(shards: int, shard_bytes: int, seed: int = 1) -> dict[str, bytes]:
    """A model of safetensors with an index, by key."""
    files: dict[str, bytes] = {}
    weight_map = {}
    noise = random.Random(seed)
    for number in range(1, shards + 1):
        name = f"model-{number:05}-of-{shards:05}.safetensors"
        tensor = f"layer.{number}.weight"
        header = json.dumps(
            {tensor: {"dtype": "U8", "shape": [shard_bytes], "data_offsets": [0, shard_bytes]}}
        ).encode()
        header += b" " * (-len(header) % 8)
        files[name] = len(header).to_bytes(8, "little") + header + noise.randbytes(shard_bytes)
        weight_map[tensor] = name
    index = {"metadata": {}, "weight_map": weight_map}
    return {**files, "model.safetensors.index.json": json.dumps(index).encode()}
