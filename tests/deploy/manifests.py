"""Kubernetes objects in YAML files, and what can be asked of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "lazyfs-csi"
PLAIN = DEPLOY / "kubernetes" / "lazyfs-csi.yaml"
EXAMPLES = sorted((DEPLOY / "examples").glob("*.yaml"))

Object = dict[str, Any]


def load(text: str) -> list[Object]:
    """All objects of a YAML text."""
    return [each for each in yaml.safe_load_all(text) if each]


def named(objects: list[Object], kind: str, ending: str = "") -> Object:
    """The one object of a kind whose name ends so."""
    (found,) = (
        each
        for each in objects
        if each["kind"] == kind and each["metadata"]["name"].endswith(ending)
    )
    return found


@dataclass(frozen=True)
class PodSpec:
    """The pods that an object makes."""

    owner: str
    namespace: str
    spec: Object

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    def container(self, name: str) -> Object:
        return next(each for each in self.containers if each["name"] == name)

    def empty_dirs(self, container: str) -> list[str]:
        """Where a container has an emptyDir, or a directory of one."""
        names = {each["name"] for each in self.spec["volumes"] if "emptyDir" in each}
        mounts = self.container(container)["volumeMounts"]
        return [each["mountPath"] for each in mounts if each["name"] in names]

    def host_path(self, container: str, path: str) -> str:
        """Where a path of a container is on the node.

        Raises:
            LookupError: it is not on a volume of the node's.
        """
        mounts = self.container(container)["volumeMounts"]
        for mount in sorted(mounts, key=lambda each: -len(each["mountPath"])):
            if Path(path).is_relative_to(mount["mountPath"]):
                volume = next(v for v in self.spec["volumes"] if v["name"] == mount["name"])
                rest = Path(path).relative_to(mount["mountPath"])
                return str(Path(volume["hostPath"]["path"]) / rest)
        raise LookupError(path)


def pod_specs(objects: list[Object]) -> Iterator[PodSpec]:
    """The pods of all objects that make some."""
    for each in objects:
        namespace = each["metadata"].get("namespace", "default")
        owner = f"{each['kind']}/{each['metadata'].get('name')}"
        if each["kind"] == "Pod":
            yield PodSpec(owner, namespace, each["spec"])
        elif each["kind"] == "CronJob":
            template = each["spec"]["jobTemplate"]["spec"]["template"]
            yield PodSpec(owner, namespace, template["spec"])
        elif "template" in each.get("spec", {}):
            yield PodSpec(owner, namespace, each["spec"]["template"]["spec"])


def option(arguments: list[str], name: str) -> str:
    """The value of `--name=value` among arguments."""
    (found,) = (a.partition("=")[2] for a in arguments if a.startswith(f"--{name}="))
    return found
