"""What a user of the cluster does in a namespace: claims, pods, Secrets; and what is shown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from cluster import Cluster, Object, eventually

NAMESPACE = "test"
IMAGE = "docker.io/vllm/vllm-openai:v0.15.0"


def pod(name: str, volume: Object, *command: str, mount: Object | None = None,
        container: Object | None = None, **spec: Any) -> Object:  # fmt: skip
    """A pod that reads a volume at /model.

    Args:
        volume: its source, from `inline` or `by_claim`.
        command: of `vllm.py`; `load` when there is none.
        mount: more fields of the volumeMount.
        container: more fields of the container.
        spec: more fields of the pod's specification.
    """
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 2,
            "automountServiceAccountToken": False,
            "containers": [
                {
                    "name": "reader",
                    "image": IMAGE,
                    "command": list(command) or ["vllm", "load", "/model"],
                    "volumeMounts": [
                        {"name": "model", "mountPath": "/model", "readOnly": True, **(mount or {})}
                    ],
                    **(container or {}),
                }
            ],
            "volumes": [{"name": "model", **volume}],
            **spec,
        },
    }


WATCH = ("vllm", "watch", "/model")


def inline(
    source: str = "s3://models/small/", secret: str | None = "s3", **attributes: str
) -> Object:
    """An inline volume."""
    volume: Object = {"driver": "csi.lazyfs.io",
                      "volumeAttributes": {"source": source, **attributes}}  # fmt: skip
    if secret:
        volume["nodePublishSecretRef"] = {"name": secret}
    return {"csi": volume}


def by_claim(name: str) -> Object:
    return {"persistentVolumeClaim": {"claimName": name, "readOnly": True}}


def claim(name: str, storage_class: str = "chosen", source: str | None = None,
          **spec: Any) -> Object:  # fmt: skip
    """A claim, of its own model if `source` is given."""
    annotations = {"csi.lazyfs.io/source": source} if source else {}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "namespace": NAMESPACE, "annotations": annotations},
        "spec": {
            "storageClassName": storage_class,
            "accessModes": ["ReadOnlyMany"],
            "resources": {"requests": {"storage": "1Gi"}},
            **spec,
        },
    }


def storage_class(name: str, secret: str = "s3", stage_secret: str | None = None,
                  **parameters: str) -> Object:  # fmt: skip
    """A class; `secret` is for making volumes, and for mounting them if there is no other."""
    prefix = "csi.storage.k8s.io"
    secrets = {
        f"{prefix}/provisioner-secret-name": secret,
        f"{prefix}/provisioner-secret-namespace": NAMESPACE,
        f"{prefix}/node-stage-secret-name": stage_secret or secret,
        f"{prefix}/node-stage-secret-namespace": NAMESPACE,
    }
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": name},
        "provisioner": "csi.lazyfs.io",
        "parameters": {**secrets, **parameters},
    }


def secret(name: str, key: dict[str, str]) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "stringData": key,
    }


class Tenant:
    """A user.

    Args:
        cluster: that runs.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._others: list[tuple[str, str]] = []

    def apply(self, *objects: Object) -> None:
        """Make objects; those that no namespace has are removed with the rest."""
        for each in objects:
            if "namespace" not in each["metadata"]:
                self._others.append((each["kind"].lower(), each["metadata"]["name"]))
        self.cluster.apply(*objects)

    def delete(self, kind: str, *names: str, within_s: float = 60, force: bool = False) -> None:
        """Delete objects of the namespace, and wait until they are gone."""
        more = ["--force", "--grace-period=0"] if force else []
        self.cluster.kubectl(
            "-n", NAMESPACE, "delete", kind, *names, *more, f"--timeout={within_s:g}s",
            timeout_s=within_s + 20,
        )  # fmt: skip

    def clear(self) -> None:
        """Delete all that was made, pods before claims."""
        for kinds in ("deployments,daemonsets,jobs", "pods", "pvc"):
            self.delete(kinds, "--all", within_s=120)
        self.delete("events", "--all")
        for kind, name in self._others:
            self.cluster.kubectl("delete", kind, name, "--ignore-not-found")
        self._others.clear()

    # What is shown.

    def phase(self, name: str) -> str:
        found = self.cluster.get("pod", name, NAMESPACE)
        return str(found["status"]["phase"]) if found else "gone"

    def logs(self, name: str) -> str:
        ran = self.cluster.try_kubectl("-n", NAMESPACE, "logs", name)
        return ran.stdout if ran.returncode == 0 else ""

    def warnings(self, name: str, kind: str = "Pod") -> list[tuple[str, str, int]]:
        """Events of an object that are warnings: reason, message, count.

        Not those of one that had its name before.
        """
        known = self.cluster.get(kind, name, NAMESPACE)
        uid = known["metadata"]["uid"] if known else None
        found = []
        for each in self.cluster.list("events", NAMESPACE):
            if (each["involvedObject"].get("uid"), each["type"]) == (uid, "Warning"):
                count = (each.get("series") or {}).get("count") or each.get("count") or 1
                found.append((each["reason"], each["message"], count))
        return found

    def describe(self, name: str) -> str:
        return f"{name} is {self.phase(name)}; {self.warnings(name)}; {self.logs(name)[-500:]}"

    # What is waited for.

    def succeeds(self, *names: str, within_s: float = 60) -> None:
        """Wait until pods have read their models."""
        for name in names:
            phase = eventually(
                lambda name=name: (now := self.phase(name)) in ("Succeeded", "Failed") and now,
                within_s,
                lambda name=name: self.describe(name),
            )
            assert phase == "Succeeded", self.describe(name)

    def passes(self, name: str) -> int:
        """How often a pod that watches has read its model; it must be running."""
        assert self.phase(name) in ("Pending", "Running"), self.describe(name)
        numbers = re.findall(r"^pass (\d+):", self.logs(name), re.MULTILINE)
        return int(numbers[-1]) if numbers else 0

    def reads_on(self, *names: str, within_s: float = 60) -> None:
        """Wait until pods that watch have read all of their models twice more from now on.

        The pass that is under way now may have read most before.
        """
        before = {name: self.passes(name) for name in names}
        for name in names:
            eventually(
                lambda name=name: self.passes(name) >= before[name] + 2,
                within_s,
                lambda name=name: f"{before[name] + 2} passes: {self.describe(name)}",
            )

    def bound(self, *names: str, within_s: float = 60) -> None:
        for name in names:
            eventually(
                lambda name=name: (
                    (found := self.cluster.get("pvc", name, NAMESPACE))
                    and found["status"]["phase"] == "Bound"
                ),
                within_s,
                lambda name=name: (
                    f"{name} is not bound: {self.warnings(name, 'PersistentVolumeClaim')}"
                ),
            )

    def warned(self, name: str, words: Sequence[str], kind: str = "Pod",
               within_s: float = 60) -> tuple[str, str, int]:  # fmt: skip
        """Wait for a warning that has all of these words."""
        return eventually(
            lambda: next(
                (
                    each
                    for each in self.warnings(name, kind)
                    if all(word in each[1] for word in words)
                ),
                None,
            ),
            within_s,
            lambda: f"a warning with {words}: {self.warnings(name, kind)}",
        )
