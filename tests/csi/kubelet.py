"""Imitates what kubelet does around the calls of a driver, after its sources.

The functions are named after those of Kubernetes 1.36 that they follow, in `pkg/volume/csi`,
`pkg/volume/util` and `k8s.io/mount-utils`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import grpc

from csi import csi_pb2
from csi import pluginregistration_pb2 as api
from csi.csi_pb2_grpc import NodeStub
from csi.pluginregistration_pb2_grpc import RegistrationStub

REGISTER_TIMEOUT_S = 60


def get_mount_refs(path: Path) -> list[str]:
    """Other mounts of what is seen at a path (mount_linux.go, SearchMountPoints)."""
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    found = next(each for each in reversed(mounts) if path.is_relative_to(each[4]))
    root = os.path.normpath(f"{found[3]}/{path.relative_to(found[4])}")
    return [
        each[4]
        for each in mounts
        if each[0] != found[0] and each[2] == found[2] and each[3] == root
    ]


def check_device_mount_refs(staging: Path) -> None:
    """Raises AssertionError where kubelet never calls NodeUnstageVolume.

    It refuses while the filesystem of the staging path is mounted anywhere else
    (operation_generator.go, GenerateUnmountDeviceFunc).
    """
    refs = [ref for ref in get_mount_refs(staging) if str(staging) not in ref]
    assert not refs, f"the device mount path {staging} is still mounted by other references {refs}"


def remove_mount_dir(path: Path) -> None:
    """Remove an empty directory that is not a mountpoint (csi_mounter.go, removeMountDir)."""
    if path.exists() and not os.path.ismount(path):
        path.rmdir()


def make_empty_dir(path: Path) -> None:
    """The directory of an emptyDir volume: for everybody, whatever the umask (empty_dir.go)."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o777)


def register(directory: Path, node_id: str) -> str:
    """Wait for a driver's socket in `plugins_registry`, register the driver; its endpoint.

    As kubelet does (pluginmanager/operationexecutor, GenerateRegisterPluginFunc; csi_plugin.go,
    RegisterPlugin).
    """
    deadline = time.monotonic() + REGISTER_TIMEOUT_S
    while not (found := [*directory.glob("*.sock")]):
        assert time.monotonic() < deadline, f"no plugin registers in {directory}"
        time.sleep(0.05)
    (socket,) = found
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        plugin = RegistrationStub(channel)
        # The socket is there a moment before it listens; kubelet tries again.
        info = plugin.GetInfo(api.InfoRequest(), timeout=60, wait_for_ready=True)
        assert info.type == "CSIPlugin"
        assert socket.name == f"{info.name}-reg.sock"
        assert any(version.startswith("1.") for version in info.supported_versions)
        with grpc.insecure_channel(f"unix:{info.endpoint}") as driver:
            answer = NodeStub(driver).NodeGetInfo(csi_pb2.NodeGetInfoRequest(), timeout=60)
            assert answer.node_id == node_id
        plugin.NotifyRegistrationStatus(api.RegistrationStatus(plugin_registered=True), timeout=5)
    return str(info.endpoint)
