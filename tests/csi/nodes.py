"""A cluster node for tests: keeper, node plugin, and kubelet's part."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import kubelet
from mounting import python, wait_until_gone, workers
from plugins import KeeperProcess, Plugin

from csi import csi_pb2
from lazyfs.handover.keeper import KeeperClient

Capability = csi_pb2.VolumeCapability
SECRETS = {"accessKeyId": "testing", "secretAccessKey": "testing-secret"}
POD = {
    "csi.storage.k8s.io/pod.name": "vllm-0",
    "csi.storage.k8s.io/pod.namespace": "models",
    "csi.storage.k8s.io/serviceAccount.name": "vllm",
}
TIMEOUT_S = 60
HASH = """
import hashlib, json, os, sys
print(json.dumps({
    os.path.relpath(os.path.join(root, name), sys.argv[1]):
        hashlib.sha256(open(os.path.join(root, name), "rb").read()).hexdigest()
    for root, _, names in os.walk(sys.argv[1]) for name in names
}))
"""


def capability(*flags: str, group: str = "", mode: str = "MULTI_NODE_READER_ONLY") -> Capability:
    """A use of a volume as files."""
    return Capability(
        mount=Capability.MountVolume(mount_flags=flags, volume_mount_group=group),
        access_mode=Capability.AccessMode(mode=mode),
    )


class TestNode:
    """A node. Volumes are named by id; each has a staging path, and target paths by pod."""

    __test__ = False

    def __init__(self, directory: Path, endpoint: str, *options: str, **env: str) -> None:
        self.directory = directory
        self.kubelet = directory / "kubelet"
        self.kubelet.mkdir()
        self.state = directory / "state"
        self.endpoint = endpoint
        self._options = options
        self._env = {"LAZYFS_RUNTIME_DIR": str(directory / "run"), **env}
        self.keeper = KeeperProcess(self._keeper_directory())
        self.plugin = self._start()

    @property
    def stub(self) -> Any:
        """The Node service."""
        return self.plugin.node

    def context(self, source: str, **attributes: str) -> dict[str, str]:
        """Attributes of a volume."""
        return {"source": source, "endpointUrl": self.endpoint, **attributes}

    def staging(self, volume: str) -> Path:
        """The staging path of a volume, made as kubelet does."""
        path = self.kubelet / "plugins" / volume / "globalmount"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def target(self, volume: str, pod: str = "a") -> Path:
        """A pod's path; its parent is made as kubelet does."""
        path = self.kubelet / "pods" / pod / "volumes" / volume / "mount"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def stage(self, volume: str, context: Mapping[str, str], **fields: Any) -> None:
        """NodeStageVolume, again while the daemon is being started, as kubelet does."""
        request = csi_pb2.NodeStageVolumeRequest(
            **{
                "volume_id": volume,
                "staging_target_path": str(self.staging(volume)),
                "volume_capability": capability(),
                "secrets": SECRETS,
                "volume_context": context,
                **fields,
            }
        )
        _patiently(lambda: self.stub.NodeStageVolume(request, timeout=TIMEOUT_S))

    def publish(
        self, volume: str, context: Mapping[str, str], pod: str = "a", **fields: Any
    ) -> Path:
        """NodePublishVolume, as `stage`; the target path."""
        target = self.target(volume, pod)
        request = csi_pb2.NodePublishVolumeRequest(
            **{
                "volume_id": volume,
                "staging_target_path": str(self.staging(volume)),
                "target_path": str(target),
                "volume_capability": capability(),
                "volume_context": {**POD, **context},
                "readonly": True,
                **fields,
            }
        )
        _patiently(lambda: self.stub.NodePublishVolume(request, timeout=TIMEOUT_S))
        return target

    def unpublish(self, volume: str, pod: str = "a") -> None:
        """NodeUnpublishVolume."""
        request = csi_pb2.NodeUnpublishVolumeRequest(
            volume_id=volume, target_path=str(self.target(volume, pod))
        )
        _patiently(lambda: self.stub.NodeUnpublishVolume(request, timeout=TIMEOUT_S))

    def unstage(self, volume: str) -> None:
        """NodeUnstageVolume, where kubelet would call it; then its directory goes."""
        staging = self.staging(volume)
        kubelet.check_device_mount_refs(staging)
        request = csi_pb2.NodeUnstageVolumeRequest(
            volume_id=volume, staging_target_path=str(staging)
        )
        _patiently(lambda: self.stub.NodeUnstageVolume(request, timeout=TIMEOUT_S))
        kubelet.remove_mount_dir(staging)

    def stats(self, volume: str, path: Path) -> csi_pb2.NodeGetVolumeStatsResponse:
        """NodeGetVolumeStats."""
        request = csi_pb2.NodeGetVolumeStatsRequest(volume_id=volume, volume_path=str(path))
        return self.stub.NodeGetVolumeStats(request, timeout=TIMEOUT_S)

    def condition(self, volume: str, path: Path) -> str | None:
        """What is wrong with a volume; None if nothing is."""
        condition = self.stats(volume, path).volume_condition
        assert condition.message
        return condition.message if condition.abnormal else None

    def workers(self) -> list[int]:
        """The processes that serve mounts of this node."""
        mine = str(self.state)
        return [pid for pid, words in workers() if any(word.startswith(mine) for word in words)]

    def mounts(self) -> list[str]:
        """Where anything of this node is mounted."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [
            path for line in lines if (path := line.split()[4]).startswith(f"{self.directory}/")
        ]

    def leftovers(self) -> list[str]:
        """Everything that must not be there when no volume is."""
        records = [*self.state.glob("volumes/*"), *self.state.glob("daemons/*")]
        daemons = [*self.state.glob("mounts/*"), *(self.directory / "run").glob("*")]
        pods = [*self.kubelet.glob("pods/*/volumes/*/mount")]
        workers = [f"worker {pid}" for pid in self.workers()]
        return [*map(str, [*records, *daemons, *pods]), *workers, *self.mounts()]

    def kill_plugin(self) -> None:
        """SIGKILL; its workers are gone afterwards."""
        workers = self.workers()
        self.plugin.kill()
        for pid in workers:
            wait_until_gone(pid)

    def start_plugin(self, *options: str) -> None:
        """Start it again, as kubelet does."""
        self.plugin = self._start(*options)

    def kill_keeper(self) -> None:
        """SIGKILL, and start it again: what it kept is lost."""
        self.keeper.end()
        self.start_keeper()

    def start_keeper(self) -> None:
        """Start it again."""
        self.keeper.socket.unlink()
        self.keeper = KeeperProcess(self._keeper_directory())

    def kept(self) -> list[str]:
        """The names that the keeper keeps."""
        client = KeeperClient.connect(self.keeper.socket)
        try:
            return client.names()
        finally:
            client.close()

    def until_done(self, step: Callable[[], Any]) -> None:
        """Do a step until it is done, as kubelet does, and start the plugin when it is dead."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            try:
                step()
                return
            except grpc.RpcError:
                if self.plugin.process.poll() is not None:
                    self.start_plugin()
                elif time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    def end(self) -> None:
        """Take everything down, however broken it is."""
        self.plugin.end()
        for pid in self.workers():
            os.kill(pid, signal.SIGKILL)
        self.keeper.end()
        for path in reversed(self.mounts()):
            subprocess.run(["umount", "-l", path], check=False, timeout=60)
        shutil.rmtree(self.directory)

    def _keeper_directory(self) -> Path:
        path = self.directory / "keeper"
        path.mkdir(mode=0o700, exist_ok=True)
        return path

    def _start(self, *options: str) -> Plugin:
        return Plugin(
            "node",
            self.directory,
            "--node-id=node-1",
            f"--state-dir={self.state}",
            f"--keeper={self.keeper.socket}",
            f"--cache-dir={self.directory / 'cache'}",
            # What pods name is not their own choice.
            f"--allowed-endpoint={self.endpoint}",
            *self._options,
            *options,
            **self._env,
        )


def _patiently(call: Callable[[], Any]) -> None:
    """Repeat a call as kubelet does: while its daemon starts, or another call has its volume.

    The plugin itself has the volume while it mounts what a daemon has mounted again.
    """
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            call()
            return
        except grpc.RpcError as error:
            passes = error.code() is grpc.StatusCode.ABORTED or (
                "is not mounted yet" in error.details()
            )
            if not passes or time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def hashes(path: Path) -> dict[str, str]:
    """The SHA-256 of every file below a path, read by another process."""
    found: dict[str, str] = json.loads(python(HASH, path))
    return found


def sha256(files: Mapping[str, bytes]) -> dict[str, str]:
    """What `hashes` gives for these."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def refused(call: Callable[[], Any]) -> tuple[str, str]:
    """The code and the message with which a call is refused."""
    try:
        call()
    except grpc.RpcError as error:
        return error.code().name, error.details()
    raise AssertionError("was not refused")


def wait_for(what: Callable[[], Any], timeout_s: float = 60) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)
