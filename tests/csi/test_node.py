"""The Node service over gRPC, with real mounts: volumes of pods are mounted and unmounted."""

from __future__ import annotations

import random
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from mounting import shell
from nodes import (
    SECRETS,
    Capability,
    TestNode,
    capability,
    hashes,
    refused,
    sha256,
    wait_for,
)
from s3 import S3

from csi import csi_pb2

pytestmark = pytest.mark.fuse

MIB = 1 << 20
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model-00001-of-00002.safetensors": random.Random(1).randbytes(9 * MIB),
    "model-00002-of-00002.safetensors": random.Random(2).randbytes(5 * MIB),
    "sub/notes.txt": b"notes",
}
SIZE = sum(map(len, FILES.values()))


@pytest.fixture(scope="module", autouse=True)
def bucket(server: S3) -> None:
    server.put("models", {f"llama/{name}": content for name, content in FILES.items()})
    for number in range(10):
        server.put("models", {f"many/{number}/file": f"content {number}".encode()})


def test_life_cycle_with_two_pods(node: TestNode) -> None:
    context = node.context("s3://models/llama")
    node.stage("vol", context)
    first, second = (node.publish("vol", context, pod) for pod in ("a", "b"))
    for target in (first, second):
        assert hashes(target) == sha256(FILES)
    wait_for(lambda: len(node.workers()) == 1)
    options = next(
        line.split()[5].split(",")
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if line.split()[4] == str(first)
    )
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(options)
    assert "Read-only file system" in shell("touch new; rm config.json", first).stderr

    node.unpublish("vol", "a")
    assert not first.exists()
    assert hashes(second) == sha256(FILES), "the other pod's path stays"
    node.unpublish("vol", "b")
    node.unstage("vol")
    assert node.leftovers() == []
    assert node.staging("vol").is_dir(), "the staging directory is kubelet's"


def test_the_last_pod_leaves_all_in_the_cache(node: TestNode, s3: S3) -> None:
    """Even if the volume goes as soon as its last byte was read."""
    content = random.Random(3).randbytes(96 * MIB)
    files = {"model.bin": content, "config.json": b"{}"}
    s3.put("large", {f"m/{name}": body for name, body in files.items()})
    context = node.context("s3://large/m", blockSize="1MiB", memoryLimit="64MiB")
    for _ in range(2):
        s3.forget()
        node.stage("vol", context)
        assert hashes(node.publish("vol", context)) == sha256(files)
        again = s3.data_requests()
        node.unpublish("vol")
        node.unstage("vol")
        assert node.leftovers() == []
    assert again == []


def test_everything_can_be_repeated(node: TestNode) -> None:
    context = node.context("s3://models/llama")
    node.unpublish("vol")
    node.unstage("vol")
    for _ in range(2):
        for _ in range(2):
            node.stage("vol", context)
        for _ in range(2):
            target = node.publish("vol", context)
        assert hashes(target) == sha256(FILES)
        assert sorted(node.mounts()) == sorted(set(node.mounts())), "nothing twice in one place"
        for _ in range(2):
            node.unpublish("vol")
        for _ in range(2):
            node.unstage("vol")
        assert node.leftovers() == []


def test_volumes_of_one_source_share_a_daemon(node: TestNode, s3: S3) -> None:
    """In whichever order they go; other options or credentials share nothing."""
    context = node.context("s3://models/llama")
    node.stage("one", context)
    node.stage("two", context)
    wait_for(lambda: len(node.workers()) == 1)
    node.stage("three", context, secrets={**SECRETS, "accessKeyId": "another"})
    node.stage("four", {**context, "blockSize": "1MiB"})
    wait_for(lambda: len(node.workers()) == 3)
    node.unstage("one")
    assert hashes(node.publish("two", context)) == sha256(FILES)
    node.unpublish("two")
    for volume in ("two", "three", "four"):
        node.unstage(volume)
    assert node.leftovers() == []


def test_every_volume_is_unstaged_while_others_share_its_daemon(node: TestNode) -> None:
    """kubelet unstages nothing that is mounted elsewhere: `TestNode.unstage` plays that."""
    context = node.context("s3://models/llama")
    inline = {**context, "csi.storage.k8s.io/ephemeral": "true"}
    for volume in ("one", "two"):
        node.stage(volume, context)
        node.publish(volume, context)
    # Equal keys of a pod are not those of the administrator's Secret.
    target = node.publish("csi-1", inline, staging_target_path="", secrets=SECRETS)
    wait_for(lambda: len(node.workers()) == 2)
    for volume in ("one", "two"):
        node.unpublish(volume)
        node.unstage(volume)
        assert not (node.kubelet / "plugins" / volume / "globalmount").exists()
        assert hashes(target) == sha256(FILES)
    node.unpublish("csi-1")
    assert node.leftovers() == []


def test_inline_volumes(node: TestNode) -> None:
    context = {
        **node.context("s3://models/llama"),
        "csi.storage.k8s.io/ephemeral": "true",
    }
    target = node.publish("csi-1", context, staging_target_path="", secrets=SECRETS)
    assert hashes(target) == sha256(FILES)
    node.unpublish("csi-1")
    assert node.leftovers() == []

    code, message = refused(lambda: node.publish("csi-2", context, staging_target_path=""))
    assert (code, "--inline-node-role" in message) == ("PERMISSION_DENIED", True)
    assert node.leftovers() == []
    unsigned = {**context, "noSignRequest": "true"}
    node.publish("csi-3", unsigned, staging_target_path="")
    node.unpublish("csi-3")
    assert node.leftovers() == []


def test_node_info_and_capabilities(node: TestNode) -> None:
    assert node.stub.NodeGetInfo(csi_pb2.NodeGetInfoRequest()).node_id == "node-1"
    answer = node.stub.NodeGetCapabilities(csi_pb2.NodeGetCapabilitiesRequest())
    kind = csi_pb2.NodeServiceCapability.RPC
    assert [each.rpc.type for each in answer.capabilities] == [
        kind.STAGE_UNSTAGE_VOLUME,
        kind.GET_VOLUME_STATS,
        kind.VOLUME_CONDITION,
        kind.VOLUME_MOUNT_GROUP,
    ]
    assert node.plugin.identity.Probe(csi_pb2.ProbeRequest()).ready.value
    node.keeper.end()
    code, message = refused(lambda: node.plugin.identity.Probe(csi_pb2.ProbeRequest()))
    assert (code, "no keeper at" in message) == ("FAILED_PRECONDITION", True)
    code, message = refused(lambda: node.stage("vol", node.context("s3://models/llama")))
    assert (code, "no keeper at" in message) == ("UNAVAILABLE", True)
    assert node.leftovers() == []


def test_stats(node: TestNode) -> None:
    context = node.context("s3://models/llama", waitFor="model")
    node.stage("vol", context)
    target = node.publish("vol", context)
    for path in (target, node.staging("vol")):
        usage = {each.unit: each for each in node.stats("vol", path).usage}
        size, inodes = usage[csi_pb2.VolumeUsage.BYTES], usage[csi_pb2.VolumeUsage.INODES]
        assert (size.total, size.available) == (SIZE, SIZE)
        assert size.used >= 14 * MIB, "the model is here, as waitFor asked"
        assert (inodes.total, inodes.available) == (len(FILES), len(FILES)), "nothing fills up"
        assert node.condition("vol", path) is None
    code, _ = refused(lambda: node.stats("vol", node.target("vol", "elsewhere")))
    assert code == "NOT_FOUND"
    code, _ = refused(lambda: node.stats("other", target))
    assert code == "NOT_FOUND"


def test_a_changed_object_is_abnormal(node: TestNode, s3: S3) -> None:
    s3.put("changing", {"m/file": b"1" * MIB})
    context = node.context("s3://changing/m", prefetch="off")
    node.stage("vol", context)
    target = node.publish("vol", context)
    assert node.condition("vol", target) is None
    s3.put("changing", {"m/file": b"2" * MIB})
    assert "Stale file handle" in shell("cat file", target).stderr
    condition = node.condition("vol", target)
    assert condition is not None and "changing/m/file" in condition


def test_waiting_for_the_model_respects_the_deadline(node: TestNode, s3: S3) -> None:
    s3.fault(r"GET /models/llama/model.*", "status", 10**6, status=503, code="SlowDown")
    context = node.context("s3://models/llama", waitFor="model", ioTimeout="1h")
    request = csi_pb2.NodeStageVolumeRequest(
        volume_id="vol",
        staging_target_path=str(node.staging("vol")),
        volume_capability=capability(),
        secrets=SECRETS,
        volume_context=context,
    )
    call = node.stub.NodeStageVolume.future(request, timeout=8)
    with pytest.raises(grpc.RpcError) as info:
        call.result()
    assert info.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "waitFor model: not all is here yet" in info.value.details(), "not gRPC's own deadline"
    node.plugin.wait_for_log("bytes are here")
    s3.forget()
    node.stage("vol", context)  # goes on from there
    node.unstage("vol")
    node.stage("vol", {**context, "waitFor": "headers"})
    node.unstage("vol")
    assert node.leftovers() == []


def test_fs_group_matters_only_if_modes_exclude_others(node: TestNode) -> None:
    for volume, mode, group in (("open", "444", "0"), ("closed", "440", "4711")):
        context = node.context("s3://models/llama", fileMode=mode)
        use = capability(group="4711")
        node.stage(volume, context, volume_capability=use)
        target = node.publish(volume, context, volume_capability=use)
        assert shell("stat -c %g config.json", target).stdout.strip() == group


def test_bad_requests(node: TestNode, tmp_path: Path) -> None:
    good = node.context("s3://models/llama")
    (tmp_path / "link").symlink_to(tmp_path)
    block = Capability(block=Capability.BlockVolume(), access_mode=capability().access_mode)
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"volume_id": ""}, "INVALID_ARGUMENT", "volume_id is missing"),
        ({"volume_id": "x" * 129}, "INVALID_ARGUMENT", "longer than 128"),
        ({"volume_id": "a\0b"}, "INVALID_ARGUMENT", "control characters"),
        ({"staging_target_path": ""}, "INVALID_ARGUMENT", "staging_target_path is missing"),
        ({"staging_target_path": "relative/path"}, "INVALID_ARGUMENT", "an absolute path"),
        ({"staging_target_path": "/tmp/../etc"}, "INVALID_ARGUMENT", "without '.' and '..'"),
        ({"staging_target_path": "/"}, "INVALID_ARGUMENT", "an absolute path"),
        ({"staging_target_path": "/tmp/a\nb"}, "INVALID_ARGUMENT", "control characters"),
        ({"staging_target_path": "/" + "a" * 5000}, "INVALID_ARGUMENT", "longer than 4095"),
        ({"staging_target_path": str(tmp_path / "link")}, "INVALID_ARGUMENT", "symbolic link"),
        ({"volume_capability": None}, "INVALID_ARGUMENT", "access type"),
        ({"volume_capability": block}, "INVALID_ARGUMENT", "block access"),
        ({"volume_capability": capability("suid")}, "INVALID_ARGUMENT", "suid"),
        ({"volume_capability": capability("blockSize=3")}, "INVALID_ARGUMENT", "blockSize"),
        ({"volume_capability": capability(group="root")}, "INVALID_ARGUMENT", "'root'"),
        ({"volume_context": {}}, "INVALID_ARGUMENT", "source"),
        ({"volume_context": {**good, "source": "/etc"}}, "INVALID_ARGUMENT", "'/etc'"),
        ({"volume_context": {**good, "cacheDir": "/etc"}}, "INVALID_ARGUMENT", "cacheDir"),
        ({"volume_context": {**good, "blokSize": "1"}}, "INVALID_ARGUMENT", "blockSize"),
        ({"volume_context": {**good, "source": "s3://nobody"}}, "NOT_FOUND", "no such bucket"),
        ({"secrets": {"accessKeyId": "a"}}, "INVALID_ARGUMENT", "secretAccessKey"),
        ({"secrets": {"password": "hunter2"}}, "INVALID_ARGUMENT", "accessKeyId"),
    ]
    for fields, code, message in cases:
        got, said = refused(lambda fields=fields: node.stage("vol", good, **fields))
        assert (got, message in said) == (code, True), (fields, said)
        assert "hunter2" not in said
    assert node.leftovers() == [], "nothing is left of what was refused"

    code, message = refused(lambda: node.publish("vol", good))
    assert (code, "not staged" in message) == ("FAILED_PRECONDITION", True)
    node.stage("vol", good)
    for path in ("", "relative", "/tmp/../etc"):
        code, _ = refused(lambda path=path: node.publish("vol", good, target_path=path))
        assert code == "INVALID_ARGUMENT"
    code, message = refused(lambda: node.stage("vol", {**good, "blockSize": "1MiB"}))
    assert (code, "is there already" in message) == ("ALREADY_EXISTS", True)
    code, message = refused(
        lambda: node.stage("other", good, staging_target_path=str(node.staging("vol")))
    )
    assert (code, "staging path of volume vol" in message) == ("FAILED_PRECONDITION", True)
    for wrong in (
        lambda: node.publish("vol", good, target_path=str(node.staging("vol"))),
        lambda: node.stub.NodeUnpublishVolume(
            csi_pb2.NodeUnpublishVolumeRequest(
                volume_id="vol", target_path=str(node.staging("vol"))
            )
        ),
    ):
        code, message = refused(wrong)
        assert (code, "staging path of volume vol" in message) == ("FAILED_PRECONDITION", True)


def test_nothing_is_ever_deleted(node: TestNode) -> None:
    """Neither through a mount nor beside one."""
    context = node.context("s3://models/llama")
    node.stage("vol", context)
    target = node.target("vol")
    target.mkdir()
    (target / "somebody's").write_text("data")
    node.publish("vol", context)
    assert hashes(target) == sha256(FILES)
    code, message = refused(lambda: node.unpublish("vol"))
    assert (code, "not empty" in message) == ("INTERNAL", True)
    assert (target / "somebody's").read_text() == "data"
    (target / "somebody's").unlink()
    node.unpublish("vol")

    subprocess.run(["mount", "-t", "tmpfs", "foreign", node.target("vol").parent], check=True)
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "foreign", target], check=True)
    (target / "file").write_text("data")
    code, message = refused(lambda: node.publish("vol", context))
    assert (code, "foreign (tmpfs) is mounted there" in message) == ("INTERNAL", True)
    assert refused(lambda: node.unpublish("vol"))[0] == "INTERNAL"
    assert (target / "file").read_text() == "data"
    subprocess.run(["umount", target, target.parent], check=True)
    node.unpublish("vol")
    node.unstage("vol")
    assert node.leftovers() == []


def test_many_calls_at_once(node: TestNode) -> None:
    """Fifty life cycles of ten volumes, five of one source, all at the same time."""

    def cycle(number: int) -> None:
        volume, pod = f"vol{number % 10}", f"pod{number}"
        source = f"s3://models/many/{number % 2}" if number % 10 < 5 else "s3://models/many/7"
        context = node.context(source, prefetch="off")
        for _ in range(8):
            node.stage(volume, context)
            try:
                target = node.publish(volume, context, pod)
                break
            except grpc.RpcError as error:
                # Another cycle has just unstaged it.
                assert error.code() is grpc.StatusCode.FAILED_PRECONDITION, error.details()
        else:
            raise AssertionError("never published")
        content = shell("cat file", target).stdout
        node.unpublish(volume, pod)
        node.unstage(volume)
        assert content == f"content {source.rpartition('/')[2]}"

    with ThreadPoolExecutor(10) as threads:
        list(threads.map(cycle, range(50)))
    assert node.leftovers() == []


def test_secrets_are_nowhere_to_be_seen(node: TestNode) -> None:
    secrets = {"accessKeyId": "AKIAVISIBLE", "secretAccessKey": "wJalrINVISIBLE"}
    context = node.context("s3://models/llama")
    node.stage("vol", context, secrets=secrets)
    node.publish("vol", context)
    (worker,) = node.workers()
    for pid in (worker, node.plugin.process.pid, node.keeper.process.pid):
        for what in ("cmdline", "environ"):
            assert b"INVISIBLE" not in Path(f"/proc/{pid}/{what}").read_bytes()
    written = [*node.directory.glob("*.log"), *node.state.glob("*/*.json")]
    assert len(written) == 3
    for path in written:
        assert "VISIBLE" not in path.read_text()
        if path.suffix == ".json":
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert node.state.stat().st_mode & 0o077 == 0


def test_unmounting_does_not_wait_for_s3(node: TestNode, s3: S3) -> None:
    """A reader waits for an S3 that never answers; its pod can go, and it gets an error."""
    s3.put("silent", {"m/file": b"x" * MIB})
    context = node.context("s3://silent/m", prefetch="off", ioTimeout="1h")
    node.stage("vol", context)
    target = node.publish("vol", context)
    s3.fault(r"GET /silent/m/file", "hang", 1000, seconds=60)
    reader = subprocess.Popen(
        ["cat", target / "file"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_for(lambda: any("silent/m/file" in line for line in s3.requests()))
    node.unpublish("vol")
    node.unstage("vol")
    _, message = reader.communicate(timeout=60)
    assert reader.returncode != 0 and message
    assert node.leftovers() == []
