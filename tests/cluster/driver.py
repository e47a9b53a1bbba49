"""The driver in the cluster: its pods, and what it leaves on the node."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import yaml
from cluster import HERE, ROOT, Cluster, Object, eventually
from objectstore import ENDPOINT, REGION, STS_ENDPOINT

NAMESPACE = "lazyfs"
RELEASE = "lazyfs-csi"
CHART = ROOT / "deploy" / "helm" / "lazyfs-csi"
# Of the image, which containerd has already (images.sh).
REGISTRY = "registry.example"
# Secrets that classes of the tests name for the provisioner.
SECRETS = [
    {"namespace": "test", "name": "s3"},
    {"namespace": "test", "name": "other"},
]


@dataclass(frozen=True)
class Found:
    """What there is on the node.

    Attributes:
        mounts: mountpoints.
        commands: of the driver's processes, counted.
        held: descriptors of /dev/fuse and of credentials in all of them.
        descriptors: all, of the processes that are there without volumes.
        places: files and directories for volumes.
    """

    mounts: tuple[str, ...]
    commands: Counter[str]
    held: int
    descriptors: int
    places: tuple[str, ...]

    def beyond(self, other: Found) -> str:
        """What this has and another one has not, in words; "" if that is nothing."""
        more = []
        if self.mounts:
            more.append(f"mounts {self.mounts}")
        if extra := self.commands - other.commands:
            more.append(f"processes {dict(extra)}")
        if self.held:
            more.append(f"{self.held} descriptors of mounts or credentials")
        # Connections of kubelet and of probes come and go.
        if self.descriptors > other.descriptors + 16:
            more.append(f"{self.descriptors - other.descriptors} descriptors")
        if places := set(self.places) - set(other.places):
            more.append(f"places {sorted(places)}")
        return "; ".join(more)


class Driver:
    """The driver, as an administrator has it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.nothing: Found | None = None

    # Installation.

    def values(self) -> Object:
        """As an administrator would write them for this S3."""
        environment = [{"name": "AWS_CA_BUNDLE", "value": "/authority/ca.crt"}]
        authority: Object = {
            "extraVolumes": [{"name": "authority", "configMap": {"name": "authority"}}],
            "extraVolumeMounts": [{"name": "authority", "mountPath": "/authority"}],
        }
        sts = {"name": "AWS_ENDPOINT_URL_STS", "value": STS_ENDPOINT}
        return {
            "images": {"lazyfs": {"registry": REGISTRY}},
            "volumes": {"defaults": {"endpointUrl": ENDPOINT, "region": REGION}},
            "node": {"env": [*environment, sts], **authority},
            "controller": {"env": environment, "secrets": [*SECRETS], **authority},
        }

    def install(self) -> None:
        """The chart, and wait until it is ready."""
        self._namespace()
        self.upgrade()
        self.nothing = self.found()

    def upgrade(self, *arguments: str, values: Object | None = None) -> None:
        """Install the chart, or change what is installed, and wait until it is ready."""
        file = self.cluster.run / "values.yaml"
        file.write_text(yaml.safe_dump(values or self.values()))
        self.cluster.helm(
            "upgrade", "--install", RELEASE, str(CHART), "-n", NAMESPACE, "-f", str(file),
            *arguments,
        )  # fmt: skip
        self.ready()

    def uninstall(self) -> None:
        self.cluster.helm("uninstall", RELEASE, "-n", NAMESPACE, "--wait")

    def _namespace(self) -> None:
        authority = (self.cluster.run / "pki" / "ca.crt").read_text()
        labels = {"pod-security.kubernetes.io/enforce": "privileged"}
        self.cluster.apply(
            {"apiVersion": "v1", "kind": "Namespace",
             "metadata": {"name": NAMESPACE, "labels": labels}},
            {"apiVersion": "v1", "kind": "ConfigMap",
             "metadata": {"name": "authority", "namespace": NAMESPACE},
             "data": {"ca.crt": authority}},
        )  # fmt: skip

    def ready(self, within_s: float = 120) -> None:
        """Wait until all of it is rolled out, and kubelet knows the driver."""
        for kind, name in (("daemonset", "node"), ("deployment", "controller")):
            self.cluster.kubectl(
                "-n", NAMESPACE, "rollout", "status", f"{kind}/{RELEASE}-{name}",
                f"--timeout={within_s:g}s", timeout_s=within_s + 10,
            )  # fmt: skip
        eventually(lambda: self.pod("keeper") is not None, within_s, "no keeper is ready")
        eventually(self.registered, within_s, "kubelet does not know the driver")

    def registered(self) -> bool:
        node = self.cluster.get("csinode", "node1", "")
        drivers = (node or {}).get("spec", {}).get("drivers") or []
        return "csi.lazyfs.io" in [each["name"] for each in drivers]

    # Pods.

    def pods(self, component: str) -> list[Object]:
        return self.cluster.list("pods", NAMESPACE, f"app.kubernetes.io/component={component}")

    def pod(self, component: str) -> Object | None:
        """The pod that is ready."""
        for each in self.pods(component):
            states = {it["type"]: it["status"] for it in each["status"].get("conditions", [])}
            if states.get("Ready") == "True" and "deletionTimestamp" not in each["metadata"]:
                return each
        return None

    def name(self, component: str) -> str:
        ready = eventually(lambda: self.pod(component), 90, f"no {component} is ready")
        return str(ready["metadata"]["name"])

    def delete(self, *components: str) -> None:
        """Delete pods, and wait until others are ready."""
        names = [self.name(each) for each in components]
        self.cluster.kubectl("-n", NAMESPACE, "delete", "pod", *names, timeout_s=120)
        for each in components:
            self.name(each)
        self.ready()

    def exec(self, *command: str) -> str:
        """What a command in the node plugin's container prints."""
        name = self.name("node")
        return self.cluster.kubectl("-n", NAMESPACE, "exec", name, "-c", "lazyfs", "--", *command)

    # The node.

    def probe(self) -> Any:
        return json.loads(self.cluster.on_node(sys.executable, str(HERE / "probe.py")))

    def found(self) -> Found:
        probed = self.probe()
        processes = [each for each in probed["processes"] if not self.serves(each)]
        return Found(
            mounts=tuple(probed["mounts"]),
            commands=Counter(each["command"] for each in probed["processes"]),
            held=sum(len(each["held"]) for each in probed["processes"]),
            descriptors=sum(each["descriptors"] for each in processes),
            places=tuple(probed["places"]),
        )

    @staticmethod
    def serves(process: Object) -> bool:
        """Whether a process serves a volume."""
        return "lazyfs.process" in process["command"]

    def workers(self) -> list[int]:
        """The processes that serve volumes, as the node numbers them."""
        return [each["pid"] for each in self.probe()["processes"] if self.serves(each)]

    def left(self) -> str:
        """What is on the node that was not there before there were volumes; "" for nothing."""
        assert self.nothing is not None
        return self.found().beyond(self.nothing)

    def pids(self, pattern: str) -> list[str]:
        """Processes of the node by their command line."""
        return self.cluster.on_node("pgrep", "-f", pattern, succeeds_with=(0, 1)).split()

    def kill(self, *pids: int | str) -> None:
        self.cluster.on_node("kill", "-9", *map(str, pids))
