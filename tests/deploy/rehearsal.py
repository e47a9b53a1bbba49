"""A cluster of one node, without Kubernetes: plays kubelet and external-provisioner from YAML.

The files are applied as they are, but for the address of an S3 in them. What kubelet does when, and
with which fields:
https://github.com/container-storage-interface/spec/blob/v1.12.0/spec.md and
https://kubernetes-csi.github.io/docs; what external-provisioner adds is in its README.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import kubelet
from manifests import PLAIN, Object, PodSpec, load, named
from models import model_hashes, put_model
from mounting import python
from programs import Driver, Launcher
from s3 import S3

from csi import csi_pb2

CSI = "csi.storage.k8s.io/"
MODES = {
    "ReadOnlyMany": "MULTI_NODE_READER_ONLY",
    "ReadWriteOnce": "SINGLE_NODE_WRITER",
    "ReadWriteMany": "MULTI_NODE_MULTI_WRITER",
}
# As kubelet and the provisioner have it in the manifests.
KUBELET_TIMEOUT_S = 120
SOURCE = re.compile(r"s3://([a-z0-9.-]+)/([^\s\"',]+)")
HASHES = """
import hashlib, json, os, sys
found = {}
for root, _, names in os.walk(sys.argv[1]):
    for name in names:
        path = os.path.join(root, name)
        digest = hashlib.sha256(open(path, "rb").read()).hexdigest()
        found[os.path.relpath(path, sys.argv[1])] = digest
print(json.dumps(found))
"""


@dataclass
class Mounted:
    """A volume of a pod, as it was published."""

    request: csi_pb2.NodePublishVolumeRequest
    source: str

    @property
    def path(self) -> Path:
        return Path(self.request.target_path)


@dataclass
class Volume:
    """A PersistentVolume on this node."""

    manifest: Object
    staging: Path | None = None
    users: list[Mounted] = field(default_factory=list)

    @property
    def csi(self) -> Object:
        return self.manifest["spec"]["csi"]


class Cluster(Driver):
    """A node with the driver, and the objects of the files that were applied."""

    def __init__(self, s3: S3, launch: Launcher | None = None) -> None:
        super().__init__(s3, launch)
        self.csi_driver = named(load(PLAIN.read_text()), "CSIDriver")
        self.objects: list[Object] = []
        self.volumes: dict[str, Volume] = {}
        self.inline: list[Mounted] = []

    # kubectl

    def apply(self, text: str) -> None:
        """Have the objects of a file, and in S3 the models that it names."""
        text = re.sub(r"endpointUrl: \S+", f"endpointUrl: {self.s3.url}", text)
        for each in load(text):
            each["metadata"].setdefault("namespace", "default")
            each["metadata"]["uid"] = str(uuid.uuid4())
            self.objects.append(each)
        for each in self._of_kind("PersistentVolumeClaim"):
            metadata = each["metadata"]
            self.api_server.claim(
                metadata["namespace"], metadata["name"], metadata.get("annotations")
            )
        for source in self.sources(text):
            put_model(self.s3, source)

    def sources(self, text: str) -> Iterator[str]:
        """Where models must lie for a file to work."""
        for bucket, prefix in SOURCE.findall(text):
            if "${" not in prefix:
                yield f"s3://{bucket}/{prefix}"
        for each in self._of_kind("PersistentVolume"):
            attributes = each["spec"]["csi"]["volumeAttributes"]
            if "bucketName" in attributes:
                yield f"s3://{attributes['bucketName']}/{attributes['prefix']}"
        for claim in self._of_kind("PersistentVolumeClaim"):
            storage_class = self._class_of(claim)
            if storage_class:
                parameters = _filled(storage_class["parameters"], claim)
                if "bucket" in parameters:
                    yield f"s3://{parameters['bucket']}/{parameters['prefix']}"
                elif "source" in parameters:
                    yield parameters["source"]

    # external-provisioner

    def provision(self, claim: Object) -> Volume:
        """The volume of a claim: one that is there, or a new one from its class."""
        metadata, spec = claim["metadata"], claim["spec"]
        name = spec.get("volumeName") or f"pvc-{metadata['uid']}"
        if name in self.volumes:
            return self.volumes[name]
        if "volumeName" in spec:
            (manifest,) = (v for v in self._of_kind("PersistentVolume") if _name(v) == name)
            reference = manifest["spec"]["claimRef"]
            assert (reference["namespace"], reference["name"]) == (
                metadata["namespace"],
                _name(claim),
            )
            self.volumes[name] = Volume(manifest)
            return self.volumes[name]
        storage_class = self._class_of(claim)
        assert storage_class, f"{_name(claim)}: no StorageClass of this name in the file"
        assert storage_class["provisioner"] == _name(self.csi_driver)
        request = self._create_request(name, claim, storage_class)
        made = self.controller.CreateVolume(request, timeout=30).volume
        again = self.controller.CreateVolume(request, timeout=30).volume
        assert made == again
        parameters = storage_class["parameters"]
        csi = {
            "driver": _name(self.csi_driver),
            "volumeHandle": made.volume_id,
            "volumeAttributes": {
                **made.volume_context,
                "storage.kubernetes.io/csiProvisionerIdentity": "1-8081-csi.lazyfs.io",
            },
        }
        for kind, key in (("stage", "nodeStageSecretRef"), ("publish", "nodePublishSecretRef")):
            if secret := _secret_reference(parameters, f"node-{kind}", claim):
                csi[key] = secret
        spec = {
            "csi": csi,
            "accessModes": claim["spec"]["accessModes"],
            "capacity": {"storage": made.capacity_bytes},
            "mountOptions": storage_class.get("mountOptions", []),
            "persistentVolumeReclaimPolicy": storage_class.get("reclaimPolicy", "Delete"),
        }
        self.volumes[name] = Volume({"metadata": {"name": name}, "spec": spec})
        return self.volumes[name]

    def _create_request(
        self, name: str, claim: Object, storage_class: Object
    ) -> csi_pb2.CreateVolumeRequest:
        parameters = storage_class["parameters"]
        own = {k: v for k, v in parameters.items() if not k.startswith(CSI)}
        return csi_pb2.CreateVolumeRequest(
            name=name,
            capacity_range=csi_pb2.CapacityRange(required_bytes=_requested(claim)),
            volume_capabilities=[_capability(claim["spec"], storage_class.get("mountOptions", []))],
            parameters={
                **own,
                f"{CSI}pvc/name": _name(claim),
                f"{CSI}pvc/namespace": claim["metadata"]["namespace"],
                f"{CSI}pv/name": name,
            },
            secrets=self._secret(_secret_reference(parameters, "provisioner", claim)),
        )

    def delete_volumes(self) -> None:
        """All claims are deleted."""
        for volume in self.volumes.values():
            if volume.manifest["spec"]["persistentVolumeReclaimPolicy"] == "Delete":
                request = csi_pb2.DeleteVolumeRequest(volume_id=volume.csi["volumeHandle"])
                self.controller.DeleteVolume(request, timeout=30)
        self.volumes.clear()

    # kubelet

    def run_pod(self, pod: PodSpec) -> dict[str, Path]:
        """Bring the volumes of a pod; where each is, by its name in the pod."""
        uid = str(uuid.uuid4())
        found = {}
        for volume in pod.spec.get("volumes", []):
            if "persistentVolumeClaim" in volume:
                name = volume["persistentVolumeClaim"]["claimName"]
                claim = self._find("PersistentVolumeClaim", name, pod.namespace)
                persistent = self.provision(claim)
                self._stage(persistent)
                found[volume["name"]] = self._publish(persistent, pod, uid)
            elif "csi" in volume:
                found[volume["name"]] = self._publish_inline(volume, pod, uid)
        return found

    def republish(self) -> None:
        """As kubelet does now and then, with a new token."""
        for each in self.published():
            self._give_tokens(each.request)
            self.node.NodePublishVolume(each.request, timeout=KUBELET_TIMEOUT_S)

    def published(self) -> list[Mounted]:
        """All volumes in pods."""
        return [*self.inline, *(each for v in self.volumes.values() for each in v.users)]

    def check(self) -> None:
        """Every volume in a pod reads as what lies in S3, cannot be written to, and is well."""
        for each in self.published():
            read = json.loads(python(HASHES, each.path))
            assert read == model_hashes(self.s3, each.source), each.source
            assert read, each.source
            written = subprocess.run(
                ["touch", each.path / "x"], capture_output=True, text=True, timeout=30, check=False
            )
            assert "Read-only file system" in written.stderr
            stats = self.node.NodeGetVolumeStats(
                csi_pb2.NodeGetVolumeStatsRequest(
                    volume_id=each.request.volume_id, volume_path=each.request.target_path
                ),
                timeout=30,
            )
            assert not stats.volume_condition.abnormal, stats.volume_condition.message

    def end_pods(self) -> None:
        """Take all volumes away from pods and from the node."""
        for each in self.published():
            self.node.NodeUnpublishVolume(
                csi_pb2.NodeUnpublishVolumeRequest(
                    volume_id=each.request.volume_id, target_path=each.request.target_path
                ),
                timeout=KUBELET_TIMEOUT_S,
            )
            assert not each.path.exists()
        self.inline.clear()
        for volume in self.volumes.values():
            volume.users.clear()
            if volume.staging:
                kubelet.check_device_mount_refs(volume.staging)
                self.node.NodeUnstageVolume(
                    csi_pb2.NodeUnstageVolumeRequest(
                        volume_id=volume.csi["volumeHandle"],
                        staging_target_path=str(volume.staging),
                    ),
                    timeout=KUBELET_TIMEOUT_S,
                )
                kubelet.remove_mount_dir(volume.staging)
                assert not volume.staging.exists()
                volume.staging = None

    def _stage(self, volume: Volume) -> None:
        if volume.staging is not None:
            return
        digest = hashlib.sha256(volume.csi["volumeHandle"].encode()).hexdigest()
        plugins = self.directory / "kubelet/plugins/kubernetes.io/csi"
        staging = plugins / _name(self.csi_driver) / digest / "globalmount"
        staging.mkdir(parents=True, mode=0o750)
        request = csi_pb2.NodeStageVolumeRequest(
            volume_id=volume.csi["volumeHandle"],
            staging_target_path=str(staging),
            volume_capability=_capability(
                volume.manifest["spec"], volume.manifest["spec"].get("mountOptions", [])
            ),
            volume_context=volume.csi["volumeAttributes"],
            secrets=self._secret(volume.csi.get("nodeStageSecretRef")),
        )
        self.node.NodeStageVolume(request, timeout=KUBELET_TIMEOUT_S)
        volume.staging = staging

    def _publish(self, volume: Volume, pod: PodSpec, uid: str) -> Path:
        assert volume.staging is not None
        request = csi_pb2.NodePublishVolumeRequest(
            volume_id=volume.csi["volumeHandle"],
            staging_target_path=str(volume.staging),
            target_path=self._target(uid, volume.manifest["metadata"]["name"]),
            volume_capability=_capability(
                volume.manifest["spec"], volume.manifest["spec"].get("mountOptions", [])
            ),
            readonly=True,
            volume_context={**volume.csi["volumeAttributes"], **self._pod_info(pod, uid, False)},
            secrets=self._secret(volume.csi.get("nodePublishSecretRef")),
        )
        self._give_tokens(request)
        self.node.NodePublishVolume(request, timeout=KUBELET_TIMEOUT_S)
        volume.users.append(Mounted(request, _source(volume.csi["volumeAttributes"])))
        return Path(request.target_path)

    def _publish_inline(self, volume: Object, pod: PodSpec, uid: str) -> Path:
        source = volume["csi"]
        assert source["driver"] == _name(self.csi_driver)
        assert "Ephemeral" in self.csi_driver["spec"]["volumeLifecycleModes"]
        secret = source.get("nodePublishSecretRef")
        request = csi_pb2.NodePublishVolumeRequest(
            volume_id="csi-" + hashlib.sha256(f"{uid}{volume['name']}".encode()).hexdigest(),
            target_path=self._target(uid, volume["name"]),
            volume_capability=_capability({"accessModes": ["ReadWriteOnce"]}, []),
            volume_context={**source["volumeAttributes"], **self._pod_info(pod, uid, True)},
            secrets=self._secret({**secret, "namespace": pod.namespace} if secret else None),
        )
        self._give_tokens(request)
        self.node.NodePublishVolume(request, timeout=KUBELET_TIMEOUT_S)
        self.inline.append(Mounted(request, _source(source["volumeAttributes"])))
        return Path(request.target_path)

    def _target(self, uid: str, name: str) -> str:
        parent = self.directory / "kubelet/pods" / uid / "volumes/kubernetes.io~csi" / name
        parent.mkdir(parents=True, mode=0o750)
        return str(parent / "mount")

    def _pod_info(self, pod: PodSpec, uid: str, ephemeral: bool) -> dict[str, str]:
        found = {}
        if self.csi_driver["spec"]["podInfoOnMount"]:
            found = {
                f"{CSI}pod.name": pod.owner.partition("/")[2],
                f"{CSI}pod.namespace": pod.namespace,
                f"{CSI}pod.uid": uid,
                f"{CSI}serviceAccount.name": pod.spec.get("serviceAccountName", "default"),
                f"{CSI}ephemeral": str(ephemeral).lower(),
            }
        return found

    def _give_tokens(self, request: csi_pb2.NodePublishVolumeRequest) -> None:
        """Tokens of the pod's service account, each time new ones, as the CSIDriver wants them."""
        spec = self.csi_driver["spec"]
        tokens = {
            each["audience"]: {"token": f"token-{uuid.uuid4()}", "expirationTimestamp": ""}
            for each in spec.get("tokenRequests", [])
        }
        if tokens:
            hidden = spec.get("serviceAccountTokenInSecrets")
            place = request.secrets if hidden else request.volume_context
            place[f"{CSI}serviceAccount.tokens"] = json.dumps(tokens)

    # Objects

    def secret_environment(self, pod: PodSpec, container: Object) -> dict[str, str]:
        """Environment of a container that comes from Secrets."""
        found: dict[str, str] = {}
        for each in container.get("envFrom", []):
            found |= self._secret({**each["secretRef"], "namespace": pod.namespace})
        return found

    def _secret(self, reference: Mapping[str, str] | None) -> dict[str, str]:
        if reference is None:
            return {}
        found = self._find("Secret", reference["name"], reference["namespace"])
        return dict(found["stringData"])

    def _find(self, kind: str, name: str, namespace: str) -> Object:
        (found,) = (
            each
            for each in self._of_kind(kind)
            if (_name(each), each["metadata"]["namespace"]) == (name, namespace)
        )
        return found

    def _of_kind(self, kind: str) -> list[Object]:
        return [each for each in self.objects if each["kind"] == kind]

    def _class_of(self, claim: Object) -> Object | None:
        name = claim["spec"]["storageClassName"]
        return next((c for c in self._of_kind("StorageClass") if _name(c) == name), None)


def _name(each: Object) -> str:
    return str(each["metadata"]["name"])


def _source(attributes: Mapping[str, str]) -> str:
    if "source" in attributes:
        return attributes["source"]
    bucket = attributes.get("bucket") or attributes["bucketName"]
    return f"s3://{bucket}/{attributes.get('prefix', '')}"


def _filled(parameters: Mapping[str, str], claim: Object) -> dict[str, str]:
    metadata = claim["metadata"]
    texts = {"${pvc.name}": metadata["name"], "${pvc.namespace}": metadata["namespace"]}
    found = {}
    for key, value in parameters.items():
        for template, text in texts.items():
            value = value.replace(template, text)
        found[key] = value
    return found


def _secret_reference(
    parameters: Mapping[str, str], kind: str, claim: Object
) -> dict[str, str] | None:
    """The Secret of a StorageClass for one kind of call, as external-provisioner finds it."""
    filled = _filled(parameters, claim)
    if f"{CSI}{kind}-secret-name" not in filled:
        return None
    return {
        "name": filled[f"{CSI}{kind}-secret-name"],
        "namespace": filled[f"{CSI}{kind}-secret-namespace"],
    }


def _capability(spec: Object, flags: list[str]) -> csi_pb2.VolumeCapability:
    (mode,) = spec["accessModes"]
    return csi_pb2.VolumeCapability(
        mount=csi_pb2.VolumeCapability.MountVolume(mount_flags=flags),
        access_mode=csi_pb2.VolumeCapability.AccessMode(mode=MODES[mode]),
    )


def _requested(claim: Object) -> int:
    text = claim["spec"]["resources"]["requests"]["storage"]
    number, unit = re.fullmatch(r"(\d+)([KMGT]i)", text).groups()  # type: ignore[union-attr]
    return int(number) << 10 * (" KMGT".index(unit[0]))
