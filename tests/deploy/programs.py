"""The driver's programs as the manifests start them: keeper, node plugin, controller.

With the arguments that the containers have; only the paths of the node are moved below a directory.
The controller finds an API server and a service account as in a pod.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

import grpc
import kubelet
from api_server import FakeApiServer
from certificates import make_certificates
from manifests import PLAIN, load, option, pod_specs
from mounting import environment, workers
from ports import free_port
from s3 import CREDENTIALS, S3

from csi.csi_pb2_grpc import ControllerStub, IdentityStub, NodeStub

READY_TIMEOUT_S = 60
# Makes the command that starts a program of a container; it may change the environment.
Launcher = Callable[[list[str], dict[str, str]], list[str]]

# Paths of containers, and what takes their place.
PLACES = {
    "/var/lib/kubelet": "kubelet",
    "/run/keeper": "keeper",
    "/cache/0": "cache",
    "/csi": "controller",
}


class Driver:
    """The driver on a node.

    Args:
        s3: serves everything: buckets, and STS.
        launch: as programs of this environment when not given.
    """

    def __init__(self, s3: S3, launch: Launcher | None = None) -> None:
        self.s3 = s3
        self.directory = Path(tempfile.mkdtemp(prefix="rh-"))  # short: sockets are in it
        self._launch = launch or _here
        # Mounts that containers make below it are to be seen here.
        subprocess.run(["mount", "--bind", self.directory, self.directory], check=True)
        subprocess.run(["mount", "--make-shared", self.directory], check=True)
        for each in (
            *PLACES.values(),
            "kubelet/pods",
            "kubelet/plugins",
            "kubelet/plugins_registry",
        ):
            (self.directory / each).mkdir(exist_ok=True, mode=0o755)
        manifests = load(PLAIN.read_text())
        self._pods = {each.owner.rpartition("-")[2]: each for each in pod_specs(manifests)}
        for path in self._pods["node"].empty_dirs("lazyfs"):
            kubelet.make_empty_dir(Path(f"{self.directory}{path}"))
        self._ports = {"node": free_port(), "controller": free_port()}
        self._programs: dict[str, subprocess.Popen[bytes]] = {}
        self._arguments: dict[str, list[str]] = {}
        authority, certificate, key = make_certificates(self.directory / "tls")
        account = self.directory / "account"
        self.api_server = FakeApiServer(account, tls=(certificate, key, authority))

    def start(self) -> None:
        """All three, as the manifests have them."""
        self._start("keeper")
        _wait(lambda: (self.directory / "keeper/keeper.sock").exists())
        self.start_node()
        self._start("controller", **self._api_server_environment())
        self.controller_channel = self._channel("controller")
        self.controller = ControllerStub(self.controller_channel)

    def start_node(self) -> None:
        """The node plugin, which kubelet finds by itself."""
        self._start("node", NODE_NAME="node-1")
        endpoint = kubelet.register(self.directory / "kubelet/plugins_registry", "node-1")
        assert endpoint == self._endpoint("node")
        channel = self._channel("node")
        self.node, self.identity = NodeStub(channel), IdentityStub(channel)

    def kill_node(self) -> None:
        """The node plugin ends as when its pod is deleted: nothing of its container is left."""
        self._end("node")

    def log(self, name: str) -> str:
        """What a program logged."""
        return (self.directory / f"{name}.log").read_text()

    def page(self, name: str, path: str) -> str:
        """What a program answers by HTTP."""
        url = f"http://127.0.0.1:{self._ports[name]}{path}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.read().decode()

    def end(self) -> None:
        """End everything, and look that nothing is left."""
        for name in [*self._programs]:
            self._end(name)
        self.api_server.stop()
        left = self.mounts()
        for path in reversed(left):
            subprocess.run(["umount", "-l", path], check=False)
        subprocess.run(["umount", self.directory], check=True)
        shutil.rmtree(self.directory)
        assert not left, f"still mounted: {left}"

    def mounts(self) -> list[str]:
        """What is mounted on this node."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        paths = (line.split()[4] for line in lines)
        return [path for path in paths if path.startswith(f"{self.directory}/")]

    def _start(self, name: str, **env: str) -> None:
        """A program with the arguments of its container, with the node's paths moved."""
        container = self._pods[name].container("keeper" if name == "keeper" else "lazyfs")
        arguments = [self._moved(name, each, env) for each in container["args"]]
        self._arguments[name] = arguments
        given = {e["name"]: e["value"] for e in container.get("env", []) if "value" in e}
        if runtime := given.pop("LAZYFS_RUNTIME_DIR", ""):
            given["LAZYFS_RUNTIME_DIR"] = f"{self.directory}{runtime}"
        full = {
            **{k: v for k, v in environment().items() if not k.startswith("AWS_")},
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL_STS": self.s3.url,
            # What the values volumes.defaults would say of an S3 that is not AWS.
            "LAZYFS_ENDPOINT_URL": self.s3.url,
            "LAZYFS_REGION": "us-east-1",
            "REHEARSAL": str(self.directory),
            # The role of a service account or of the node, for sources without a Secret.
            **CREDENTIALS,
            **given,
            **env,
        }
        with open(self.directory / f"{name}.log", "ab") as log:
            self._programs[name] = subprocess.Popen(
                self._launch(arguments, full),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=full,
                cwd="/",
                start_new_session=True,
            )

    def _moved(self, name: str, argument: str, env: Mapping[str, str]) -> str:
        if argument.startswith("--http-address="):
            return f"--http-address=127.0.0.1:{self._ports[name]}"
        if argument.startswith("--cache-reserve="):
            return "--cache-reserve=0B"  # how full this machine's disk is does not matter here
        moved = argument.replace("$(NODE_NAME)", env.get("NODE_NAME", ""))
        for path, place in PLACES.items():
            # At the beginning of a value, or of one in a list.
            pattern = rf"(?:(?<==)|(?<=:)|(?<=://)){path}(?=/|:|$)"
            moved = re.sub(pattern, str(self.directory / place), moved)
        return moved

    def _end(self, name: str) -> None:
        program = self._programs.pop(name)
        program.send_signal(signal.SIGTERM)
        program.wait(30)

    def _endpoint(self, name: str) -> str:
        return option(self._arguments[name], "endpoint").removeprefix("unix://")

    def _channel(self, name: str) -> grpc.Channel:
        channel = grpc.insecure_channel(f"unix:{self._endpoint(name)}")

        def ready() -> bool:
            assert self._programs[name].poll() is None, self.log(name)
            try:
                return self.page(name, "/readyz") == "ok\n"
            except OSError:
                return False

        _wait(ready, lambda: self.log(name))
        return channel

    def _api_server_environment(self) -> dict[str, str]:
        host, _, port = self.api_server.url.removeprefix("https://").partition(":")
        return {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}

    def workers(self) -> int:
        """How many daemons serve volumes here."""
        mine = f"{self.directory}/"
        return sum(any(mine in word for word in words) for _, words in workers())


def _here(arguments: list[str], env: dict[str, str]) -> list[str]:
    """A program in this environment; the controller finds a service account where pods have it."""
    program = [str(Path(sys.executable).with_name(arguments[0])), *arguments[1:]]
    if "KUBERNETES_SERVICE_HOST" not in env:
        return program
    account = account_of(env)
    place = "/run/secrets/kubernetes.io"
    script = f'mount -t tmpfs none /run && mkdir -p {place} && ln -s "$0" {place}/serviceaccount'
    return ["unshare", "--mount", "sh", "-c", f'{script} && exec "$@"', str(account), *program]


def account_of(env: Mapping[str, str]) -> Path:
    """The directory of the controller's service account; beside it is all of the node."""
    return Path(env["REHEARSAL"]) / "account"


def _wait(ready: Callable[[], bool], explain: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not ready():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.1)
