"""A real Kubernetes of one node on this machine: brought up, used, taken down.

Everything runs in namespaces of its own and writes below one directory, so that ending the first
process and removing the directory leaves nothing. A network namespace has the control plane and
the node; the node is process-id, mount and UTS namespaces inside of it, whose end is a power cut.
Another network namespace, on the same bridge, has S3.

    10.10.0.1:443    API server          10.10.0.2   S3 and IAM, by the next two:
    10.96.0.1:443    the same for pods   10.96.0.20:443   S3 (versitygw)
    10.96.0.10:53    DNS (dnsmasq)       10.96.0.21:443   IAM and STS (versitygw)
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pki
import yaml
from namespaces import REAPER, Namespaces, children
from objectstore import ISSUER, ObjectStore

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
CGROUPS = Path("/sys/fs/cgroup")
CGROUP = "lazyfs-cluster"  # as in configuration/kubelet.yaml

Object = dict[str, Any]
T = TypeVar("T")

# STS, which is nobody to the API server, may ask for the keys of tokens.
DISCOVERY = {
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "kind": "ClusterRoleBinding",
    "metadata": {"name": "issuer-discovery"},
    "roleRef": {
        "apiGroup": "rbac.authorization.k8s.io",
        "kind": "ClusterRole",
        "name": "system:service-account-issuer-discovery",
    },
    "subjects": [
        {
            "apiGroup": "rbac.authorization.k8s.io",
            "kind": "Group",
            "name": "system:unauthenticated",
        }
    ],
}


class ClusterError(Exception):
    """The cluster does not do what it must; the text is a sentence."""


class Cluster:
    """The cluster of this machine; there is one.

    Args:
        cache: what is built is in it, and the running cluster in `run` below it.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.run = cache / "run"
        self.programs = cache / "bin"
        self.s3 = ObjectStore(partial(self._start, where="storage"), self.programs, self.run)

    # Up and down.

    def up(self) -> None:
        """Start everything; a cluster that was left is taken down first."""
        self.down()
        (self.run / "logs").mkdir(parents=True)
        pki.make(self.run / "pki")
        self._write_configuration()
        plane = Namespaces.make(["mount", "net", "uts"], ["bash", "-c", REAPER])
        self._remember("plane", plane)
        self._remember("storage", Namespaces.make(["net"], ["bash", "-c", REAPER], outer=plane))
        self._network()
        self._control_plane()
        self.boot()
        self.apply(DISCOVERY)

    def down(self) -> None:
        """End everything and remove what it wrote. Nothing to do is fine."""
        if self.running:
            with contextlib.suppress(OSError):
                self.s3.signal(signal.SIGCONT)  # a test that was killed may have stopped it
            self.namespaces("plane").kill()
        _remove_cgroups()
        if self.run.exists():
            shutil.rmtree(self.run)

    @property
    def running(self) -> bool:
        try:
            return self.namespaces("plane").alive
        except FileNotFoundError:
            return False

    def boot(self) -> None:
        """Start the node, and wait until it is Ready."""
        log = self.run / "logs" / "node.log"
        self._make_cgroups()
        node = Namespaces.make(
            ["mount", "uts"],
            [str(HERE / "node.sh"), str(self.cache), str(self.run)],
            outer=self.namespaces("plane"),
            log=log,
        )
        self._remember("node", node)
        since = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        eventually(lambda: self._node_is_ready(since), 180, "the node is not Ready")

    def power_cut(self) -> None:
        """End all processes and mounts of the node at once. Its files stay."""
        self.namespaces("node").kill()
        _remove_cgroups()

    def _node_is_ready(self, since: str) -> bool:
        """By what kubelet said after a time."""
        node = self.get("node", "node1", namespace="")
        if node is None:
            return False
        conditions = {each["type"]: each for each in node["status"].get("conditions", [])}
        ready = conditions.get("Ready", {"status": "Unknown"})
        return ready["status"] == "True" and ready["lastHeartbeatTime"] >= since

    def _write_configuration(self) -> None:
        (self.run / "resolv.conf").write_text("nameserver 10.96.0.10\n")
        (self.run / "cni").mkdir()
        (self.run / "hosts").mkdir()
        for name, target in {
            "containerd.toml": self.run,
            "kubelet.yaml": self.run,
            "10-bridge.conflist": self.run / "cni",
        }.items():
            text = (HERE / "configuration" / name).read_text()
            text = text.replace("@pki@", str(self.run / "pki"))
            text = text.replace("@run@", str(self.run)).replace("@cache@", str(self.cache))
            (target / name).write_text(text)

    def _network(self) -> None:
        """A bridge between the two namespaces, and the addresses of services on loopbacks."""
        storage = self.namespaces("storage")
        for name, lines in {
            "plane": f"""
                link set lo up
                link add node0 type bridge
                addr add 10.10.0.1/24 dev node0
                link set node0 up
                link add member0 type veth peer name eth0 netns {storage.pid}
                link set member0 master node0 up
                route add default dev node0
                route add 10.96.0.20/31 via 10.10.0.2
                addr add 10.96.0.1/32 dev lo
                addr add 10.96.0.10/32 dev lo
                addr add 203.0.113.1/32 dev lo
            """,
            "storage": """
                link set lo up
                addr add 10.10.0.2/24 dev eth0
                link set eth0 up
                route add default via 10.10.0.1
                addr add 10.96.0.20/32 dev lo
                addr add 10.96.0.21/32 dev lo
            """,
        }.items():
            for line in lines.strip().splitlines():
                self._in(name, "ip", *line.split())
        self._in("plane", "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")

    def _in(self, name: str, *command: str) -> None:
        """A command in a network namespace, with this machine's process ids."""
        subprocess.run(self.namespaces(name).command(command, "n"), check=True, timeout=30)

    def _control_plane(self) -> None:
        p = self.run / "pki"
        bin_ = self.programs
        self._start(
            "etcd",
            [f"{bin_}/etcd", f"--data-dir={self.run}/etcd", "--unsafe-no-fsync"],
        )
        self._start(
            "apiserver",
            [
                f"{bin_}/kube-apiserver",
                "--etcd-servers=http://127.0.0.1:2379",
                "--secure-port=443",
                "--advertise-address=10.10.0.1",
                "--service-cluster-ip-range=10.96.0.0/16",
                f"--client-ca-file={p}/ca.crt",
                f"--tls-cert-file={p}/apiserver.crt",
                f"--tls-private-key-file={p}/apiserver.key",
                f"--kubelet-client-certificate={p}/apiserver-kubelet.crt",
                f"--kubelet-client-key={p}/apiserver-kubelet.key",
                f"--kubelet-certificate-authority={p}/ca.crt",
                "--kubelet-preferred-address-types=InternalIP",
                f"--service-account-issuer={ISSUER}",
                f"--service-account-jwks-uri={ISSUER}/openid/v1/jwks",
                f"--service-account-key-file={p}/tokens.pub",
                f"--service-account-signing-key-file={p}/tokens.key",
                "--authorization-mode=Node,RBAC",
                "--enable-admission-plugins=NodeRestriction",
                "--allow-privileged=true",
            ],
        )
        eventually(self._answers, 120, "the API server is not ready")
        self._start(
            "controller-manager",
            [
                f"{bin_}/kube-controller-manager",
                f"--kubeconfig={p}/controller-manager.conf",
                f"--service-account-private-key-file={p}/tokens.key",
                f"--root-ca-file={p}/ca.crt",
                "--use-service-account-credentials=true",
                "--leader-elect=false",
                "--allocate-node-cidrs=true",
                "--cluster-cidr=10.244.0.0/16",
            ],
        )
        self._start(
            "scheduler",
            [
                f"{bin_}/kube-scheduler",
                f"--kubeconfig={p}/scheduler.conf",
                "--leader-elect=false",
            ],
        )
        self._start(
            "dns",
            [
                *("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--user=root"),
                *("--no-resolv", "--no-hosts", "--pid-file=", "--bind-interfaces"),
                *("--listen-address=10.96.0.10", "--local=/#/"),
                "--address=/kubernetes.default.svc.cluster.local/10.96.0.1",
                "--address=/minio.storage.svc.cluster.local/10.96.0.20",
                "--address=/sts.storage.svc.cluster.local/10.96.0.21",
                f"--hostsdir={self.run / 'hosts'}",
            ],
        )
        self.s3.start()

    def resolve(self, name: str, addresses: Iterable[str]) -> None:
        """Have DNS know a name, as of a headless Service; dnsmasq sees the file at once."""
        new = self.run / f"{name}.new"
        new.write_text("".join(f"{each} {name}\n" for each in addresses))
        new.rename(self.run / "hosts" / name)

    def _answers(self) -> bool:
        return self.try_kubectl("get", "--raw", "/readyz").returncode == 0

    # Processes.

    def _remember(self, name: str, namespaces: Namespaces) -> None:
        text = json.dumps({"pid": namespaces.pid, "started": namespaces.started})
        (self.run / f"{name}.json").write_text(text)

    def namespaces(self, name: str) -> Namespaces:
        return Namespaces(**json.loads((self.run / f"{name}.json").read_text()))

    def _start(self, name: str, command: Sequence[str], where: str = "plane") -> int:
        """Start a program; its process id."""
        with (self.run / "logs" / f"{name}.log").open("ab") as log:
            outer = subprocess.Popen(
                self.namespaces(where).command(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return eventually(lambda: children(outer.pid), 10, f"{name} was not started")[0]

    def on_node(
        self, *command: str, timeout_s: float = 60, succeeds_with: Sequence[int] = (0,)
    ) -> str:
        """What a command on the node prints.

        Raises:
            ClusterError: it ended with another status than those of success.
        """
        path = f"{self.programs}:{os.environ['PATH']}"
        ran = subprocess.run(
            self.namespaces("node").command(["env", f"PATH={path}", *command]),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if ran.returncode not in succeeds_with:
            raise ClusterError(f"on the node, {' '.join(command)}: {ran.stderr.strip()}")
        return ran.stdout

    # The API.

    def try_kubectl(
        self, *arguments: str, given: str | None = None, timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl as an administrator, whatever comes of it."""
        command = [str(self.programs / "kubectl"), f"--kubeconfig={self.kubeconfig}", *arguments]
        return subprocess.run(
            self.namespaces("plane").command(command, "n"),
            input=given,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def kubectl(self, *arguments: str, given: str | None = None, timeout_s: float = 60) -> str:
        """What kubectl prints.

        Raises:
            ClusterError: kubectl failed.
        """
        ran = self.try_kubectl(*arguments, given=given, timeout_s=timeout_s)
        if ran.returncode != 0:
            raise ClusterError(f"kubectl {' '.join(arguments)}: {ran.stderr.strip()}")
        return ran.stdout

    @property
    def kubeconfig(self) -> Path:
        return self.run / "pki" / "admin.conf"

    def get(self, kind: str, name: str, namespace: str) -> Object | None:
        """An object, or None; `namespace` is "" for those of the cluster."""
        where = ["-n", namespace] if namespace else []
        found = self.kubectl("get", kind, name, *where, "--ignore-not-found", "-o", "json")
        return json.loads(found) if found else None

    def list(self, kind: str, namespace: str, selector: str = "") -> list[Object]:
        """Objects of a namespace."""
        text = self.kubectl("get", kind, "-n", namespace, "-l", selector, "-o", "json")
        found: list[Object] = json.loads(text)["items"]
        return found

    def apply(self, *objects: Object) -> None:
        """Make or change objects."""
        self.kubectl("apply", "--server-side", "-f", "-", given=yaml.safe_dump_all(objects))

    def helm(self, *arguments: str, timeout_s: float = 300) -> str:
        """What helm prints.

        Raises:
            ClusterError: helm failed.
        """
        command = [str(self.programs / "helm"), f"--kubeconfig={self.kubeconfig}", *arguments]
        ran = subprocess.run(
            self.namespaces("plane").command(command, "n"),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if ran.returncode != 0:
            raise ClusterError(f"helm {' '.join(arguments)}: {ran.stderr.strip()}")
        return ran.stdout

    # Control groups.

    def _make_cgroups(self) -> None:
        """kubelet's own root, in each hierarchy of version 1 or in the one of version 2."""
        for each in _hierarchies():
            (each / CGROUP).mkdir(exist_ok=True)


def _hierarchies() -> Iterable[Path]:
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS]
    return [each for each in CGROUPS.iterdir() if each.is_dir() and not each.is_symlink()]


def _remove_cgroups() -> None:
    for each in _hierarchies():
        for directory, _, _ in os.walk(each / CGROUP, topdown=False):
            Path(directory).rmdir()


def eventually(
    condition: Callable[[], T], within_s: float, what: str | Callable[[], str], every_s: float = 0.3
) -> T:
    """Wait until `condition` gives something true, and return that.

    Raises:
        AssertionError: not within `within_s`; with `what`, which can be a function.
    """
    deadline = time.monotonic() + within_s
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            said = what if isinstance(what, str) else what()
            raise AssertionError(f"not within {within_s:g} s: {said}")
        time.sleep(every_s)
