"""The Controller service, over gRPC and with a real S3: claims become volumes, S3 is only read."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from api_server import FakeApiServer
from plugins import Plugin
from s3 import CREDENTIALS, S3

from csi import csi_pb2
from csi.controller import Controller
from csi.controller_records import ConfigMapRecords
from csi.csi_pb2_grpc import (
    ControllerStub,
    IdentityStub,
    add_ControllerServicer_to_server,
)
from csi.kubernetes import ApiServer
from csi.server import Server
from csi.volume_attributes import Rules

MIB = 1 << 20
SECRET = {
    "accessKeyId": CREDENTIALS["AWS_ACCESS_KEY_ID"],
    "secretAccessKey": CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
}
MODEL = {
    "public/llama/model.safetensors": b"w" * (3 * MIB),
    "public/llama/config.json": b"{}",
    "public/llama/original/model.pth": b"p" * MIB,
    "private/secret.bin": b"s",
}
SIZE = 4 * MIB + 2
_Mode = csi_pb2.VolumeCapability.AccessMode
_Create = Callable[..., csi_pb2.Volume]


def capability(mode: int = _Mode.MULTI_NODE_MULTI_WRITER, *flags: str) -> csi_pb2.VolumeCapability:
    return csi_pb2.VolumeCapability(
        mount=csi_pb2.VolumeCapability.MountVolume(mount_flags=flags),
        access_mode=_Mode(mode=mode),  # type: ignore[arg-type]
    )


def request(s3: S3, name: str = "pvc-1", **more: Any) -> csi_pb2.CreateVolumeRequest:
    """A request as external-provisioner makes it."""
    fields: dict[str, Any] = {
        "parameters": {
            "source": "s3://models/public/llama",
            "endpointUrl": s3.url,
            "csi.storage.k8s.io/pvc/name": "llama",
            "csi.storage.k8s.io/pvc/namespace": "research",
            "csi.storage.k8s.io/pv/name": name,
        },
        "secrets": SECRET,
        "volume_capabilities": [capability()],
        "capacity_range": csi_pb2.CapacityRange(required_bytes=1),
    }
    parameters = more.pop("parameters", {})
    fields["parameters"] = {
        key: value for key, value in {**fields["parameters"], **parameters}.items() if value
    }
    return csi_pb2.CreateVolumeRequest(name=name, **{**fields, **more})


def refused(stub: Any, message: Any) -> tuple[str, str]:
    """Code and message of an RPC that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        stub(message, timeout=60)
    return caught.value.code().name, caught.value.details()


@pytest.fixture(scope="module")
def model(server: S3) -> S3:
    server.put("models", MODEL)
    return server


@pytest.fixture
def controller(plugin: Callable[..., Plugin], tmp_path: Path) -> ControllerStub:
    return plugin("controller", f"--state-dir={tmp_path}/state").controller


@pytest.fixture(scope="module")
def unchanged() -> Iterator[ControllerStub]:
    """One for all calls that must change nothing."""
    directory = Path(tempfile.mkdtemp(prefix="csi-"))
    started = Plugin("controller", directory, f"--state-dir={directory}/state")
    yield started.controller
    started.end()
    shutil.rmtree(directory)


class Replicas:
    """Controllers of one cluster, each as in a pod of its own."""

    def __init__(self, cluster: FakeApiServer, directory: Path, count: int) -> None:
        self.servers, self.channels = [], []
        for number in range(count):
            api = ApiServer(cluster.url, cluster.account)
            records = ConfigMapRecords(api, "csi.lazyfs.io")
            servicer = Controller("csi.lazyfs.io", Rules(), records, api)
            server = Server(
                f"{directory}/{number}.sock",
                [lambda it, its=servicer: add_ControllerServicer_to_server(its, it)],
            )
            server.start()
            self.servers.append(server)
            self.channels.append(grpc.insecure_channel(f"unix:{directory}/{number}.sock"))
        self.stubs = [ControllerStub(channel) for channel in self.channels]

    def stop(self) -> None:
        for channel, server in zip(self.channels, self.servers, strict=True):
            channel.close()
            server.stop()


@pytest.fixture
def replicas(cluster: FakeApiServer, short_path: Path) -> Iterator[list[ControllerStub]]:
    made = Replicas(cluster, short_path, 2)
    yield made.stubs
    made.stop()


def keys_of(s3: S3) -> set[str]:
    return {each["Key"] for each in s3.client.list_objects_v2(Bucket="models")["Contents"]}


def test_a_volume_is_made_for_a_source_in_s3(controller: ControllerStub, model: S3) -> None:
    before = keys_of(model)
    assert before >= set(MODEL)
    volume = controller.CreateVolume(request(model), timeout=60).volume
    assert volume.volume_id.startswith("pvc-1-")
    assert volume.capacity_bytes == SIZE
    assert dict(volume.volume_context) == {
        "source": "s3://models/public/llama",
        "endpointUrl": model.url,
        "csi.storage.k8s.io/pvc/namespace": "research",
    }
    listed = controller.ListVolumes(csi_pb2.ListVolumesRequest(), timeout=60)
    assert [entry.volume for entry in listed.entries] == [volume]
    delete = csi_pb2.DeleteVolumeRequest(volume_id=volume.volume_id)
    for _ in range(2):
        controller.DeleteVolume(delete, timeout=60)
    assert not controller.ListVolumes(csi_pb2.ListVolumesRequest(), timeout=60).entries
    assert keys_of(model) == before, "other tests may have put more there than this model"


def test_hidden_objects_do_not_count(controller: ControllerStub, model: S3) -> None:
    asked = request(model, parameters={"exclude": "*.pth"})
    assert controller.CreateVolume(asked, timeout=60).volume.capacity_bytes == SIZE - MIB


@pytest.mark.parametrize(
    ("required", "limit", "answered"),
    [
        (0, 0, SIZE),
        (1, 0, SIZE),
        (1 << 40, 0, 1 << 40),
        (1, SIZE, SIZE),
        (SIZE + 5, SIZE + 5, SIZE + 5),
    ],
)
def test_capacity(
    controller: ControllerStub, model: S3, required: int, limit: int, answered: int
) -> None:
    asked = csi_pb2.CapacityRange(required_bytes=required, limit_bytes=limit)
    volume = controller.CreateVolume(request(model, capacity_range=asked), timeout=60).volume
    assert volume.capacity_bytes == answered


def test_a_limit_below_the_model(controller: ControllerStub, model: S3) -> None:
    small = csi_pb2.CapacityRange(limit_bytes=MIB)
    code, message = refused(controller.CreateVolume, request(model, capacity_range=small))
    assert code == "OUT_OF_RANGE"
    assert "s3://models/public/llama has 4MiB, more than the limit of 1MiB" in message
    odd = csi_pb2.CapacityRange(required_bytes=5, limit_bytes=4)
    assert refused(controller.CreateVolume, request(model, capacity_range=odd))[0] == "OUT_OF_RANGE"


def test_every_access_mode_but_no_device(controller: ControllerStub, model: S3) -> None:
    every = [capability(mode) for mode in _Mode.Mode.values()[1:]]
    controller.CreateVolume(request(model, volume_capabilities=every), timeout=60)
    block = csi_pb2.VolumeCapability(
        block=csi_pb2.VolumeCapability.BlockVolume(),
        access_mode=_Mode(mode=_Mode.SINGLE_NODE_WRITER),
    )
    code, message = refused(
        controller.CreateVolume, request(model, "pvc-2", volume_capabilities=[block])
    )
    assert (code, message.split(":")[0]) == ("INVALID_ARGUMENT", "block access is not possible")


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"name": ""}, "INVALID_ARGUMENT", "name is missing"),
        ({"name": "x" * 129}, "INVALID_ARGUMENT", "name is longer than 128 bytes"),
        ({"name": "a\0b"}, "INVALID_ARGUMENT", "name has control characters"),
        ({"volume_capabilities": []}, "INVALID_ARGUMENT", "volume_capabilities is missing"),
        ({"parameters": {"source": ""}}, "INVALID_ARGUMENT", "a volume needs the attribute source"),
        ({"parameters": {"blockSze": "8MiB"}}, "INVALID_ARGUMENT", "did you mean blockSize?"),
        ({"parameters": {"cacheDir": "/etc"}}, "INVALID_ARGUMENT", "may not set cacheDir"),
        (
            {"volume_capabilities": [capability(5, "blockSize=1")]},
            "INVALID_ARGUMENT", "blockSize: '1' is not allowed: a size from 256KiB to 64MiB",
        ),
        ({"parameters": {"source": "s3://models/none"}}, "NOT_FOUND", "no objects below this"),
        ({"parameters": {"source": "s3://no-such-bucket"}}, "NOT_FOUND", "no such bucket"),
        ({"parameters": {"endpointUrl": "http://127.0.0.1:1"}}, "UNAVAILABLE", "no usable answer"),
        ({"secrets": {}}, "PERMISSION_DENIED", "csi.storage.k8s.io/provisioner-secret-name"),
        ({"secrets": {"accessKeyId": "a"}}, "FAILED_PRECONDITION", "secret has no secretAccessKey"),
        (
            {"volume_content_source": csi_pb2.VolumeContentSource(
                volume=csi_pb2.VolumeContentSource.VolumeSource(volume_id="v"))},
            "INVALID_ARGUMENT", "cannot be a copy",
        ),
        ({"mutable_parameters": {"a": "b"}}, "INVALID_ARGUMENT", "no mutable parameters"),
        ({"parameters": {"prefix": "x"}}, "INVALID_ARGUMENT", "found source, prefix"),
        ({"parameters": {"allowedPrefixes": "s3://models"}}, "FAILED_PRECONDITION", "in a cluster"),
    ],
)  # fmt: skip
def test_invalid_input_is_refused(
    unchanged: ControllerStub, model: S3, changes: dict[str, Any], code: str, said: str
) -> None:
    got, message = refused(unchanged.CreateVolume, request(model, **changes))
    assert (got, said in message) == (code, True), message
    assert SECRET["secretAccessKey"] not in message
    assert not unchanged.ListVolumes(csi_pb2.ListVolumesRequest(), timeout=60).entries


def test_a_source_that_may_be_listed_but_not_read(
    controller: ControllerStub, model: S3, s3: S3
) -> None:
    s3.fault("GET /models/public", "status", status=403, code="AccessDenied")
    code, message = refused(controller.CreateVolume, request(model))
    assert (code, "AccessDenied" in message) == ("PERMISSION_DENIED", True)


def test_a_source_that_only_pods_can_read_is_not_checked(
    controller: ControllerStub, model: S3, s3: S3
) -> None:
    role = {"roleArn": "arn:aws:iam::123456789012:role/models"}
    volume = controller.CreateVolume(request(s3, parameters=role, secrets={}), timeout=60).volume
    assert volume.capacity_bytes == 1
    unchecked = request(s3, "pvc-2", parameters={"checkSource": "false"}, secrets={})
    volume = controller.CreateVolume(unchecked, timeout=60).volume
    assert "checkSource" not in volume.volume_context
    assert s3.requests() == []


def test_the_same_name_after_a_restart(
    plugin: Callable[..., Plugin], model: S3, tmp_path: Path
) -> None:
    arguments = ["controller", f"--state-dir={tmp_path}/state"]
    first = plugin(*arguments)
    made = first.controller.CreateVolume(request(model), timeout=60)
    first.kill()
    second = plugin(*arguments).controller
    assert second.CreateVolume(request(model), timeout=60) == made
    larger = csi_pb2.CapacityRange(required_bytes=1 << 40)
    for other in (
        request(model, capacity_range=larger),
        request(model, capacity_range=csi_pb2.CapacityRange(limit_bytes=1)),
        request(model, parameters={"source": "s3://models/private"}),
        request(model, parameters={"blockSize": "4MiB"}),
    ):
        code, message = refused(second.CreateVolume, other)
        assert (code, message.startswith("pvc-1: ")) == ("ALREADY_EXISTS", True)
    second.DeleteVolume(csi_pb2.DeleteVolumeRequest(volume_id=made.volume.volume_id), timeout=60)
    assert (
        second.CreateVolume(request(model, capacity_range=larger), timeout=60).volume.capacity_bytes
        == 1 << 40
    )


def test_the_same_name_at_two_replicas_at_once(
    replicas: list[ControllerStub], cluster: FakeApiServer, model: S3
) -> None:
    """Of two different questions at the same time, one makes the volume, the other is refused."""
    for round_ in range(5):
        name = f"pvc-{round_}"
        answers: list[Any] = []

        def ask(
            stub: ControllerStub, block_size: str, name: str = name, answers: list[Any] = answers
        ) -> None:
            try:
                asked = request(model, name, parameters={"blockSize": block_size})
                answers.append(stub.CreateVolume(asked, timeout=60).volume)
            except grpc.RpcError as error:
                answers.append(error.code().name)

        threads = [
            threading.Thread(target=ask, args=[replicas[number % 2], size])
            for number, size in enumerate(["4MiB", "8MiB", "4MiB", "8MiB"])
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sum(answer == "ALREADY_EXISTS" for answer in answers) == 2
        volumes = [answer for answer in answers if isinstance(answer, csi_pb2.Volume)]
        assert len(volumes) == 2 and volumes[0] == volumes[1]
    assert len(cluster.config_maps()) == 5


def test_a_claim_chooses_its_model(
    replicas: list[ControllerStub], cluster: FakeApiServer, model: S3
) -> None:
    allowed = {"allowedPrefixes": "s3://models/public", "source": ""}
    cluster.claim("research", "llama", {"csi.lazyfs.io/source": "s3://models/public/llama"})
    volume = replicas[0].CreateVolume(request(model, parameters=allowed), timeout=60).volume
    assert volume.volume_context["source"] == "s3://models/public/llama"
    assert volume.capacity_bytes == SIZE
    # What was chosen stays, whatever becomes of the claim.
    cluster.claim("research", "llama", {"csi.lazyfs.io/source": "s3://models/private"})
    again = replicas[1].CreateVolume(request(model, parameters=allowed), timeout=60).volume
    assert again == volume
    code, message = refused(replicas[0].CreateVolume, request(model, "pvc-2", parameters=allowed))
    assert (code, "'s3://models/private' is not allowed" in message) == (
        "FAILED_PRECONDITION",
        True,
    )
    cluster.claim("research", "llama")
    code, message = refused(replicas[0].CreateVolume, request(model, "pvc-2", parameters=allowed))
    assert "research/llama has no annotation csi.lazyfs.io/source" in message
    secrets = str([*cluster.config_maps(), *cluster.requests])
    assert SECRET["secretAccessKey"] not in secrets


def test_an_event_of_the_claim_says_that_s3_is_silent(
    controller: ControllerStub, model: S3
) -> None:
    """Before external-provisioner gives the call up, which would say nothing of S3."""
    model.fault(r"GET /models", "hang", 1000, seconds=600)
    code, message = refused(controller.CreateVolume, request(model))
    assert (code, "S3 has not answered" in message) == ("UNAVAILABLE", True), message
    model.forget()
    assert controller.CreateVolume(request(model), timeout=60).volume.capacity_bytes == SIZE


def test_without_allowed_prefixes_an_annotation_means_nothing(
    replicas: list[ControllerStub], cluster: FakeApiServer, model: S3
) -> None:
    cluster.claim("research", "llama", {"csi.lazyfs.io/source": "s3://models/private"})
    volume = replicas[0].CreateVolume(request(model), timeout=60).volume
    assert volume.volume_context["source"] == "s3://models/public/llama"
    assert not any("persistentvolumeclaims" in line for line in cluster.requests)


def test_no_volume_is_made_without_its_record(
    replicas: list[ControllerStub], cluster: FakeApiServer, model: S3
) -> None:
    cluster.forbidden.add("configmaps")
    assert refused(replicas[0].CreateVolume, request(model))[0] == "PERMISSION_DENIED"
    cluster.forbidden.clear()
    cluster.failures = 10**6
    assert refused(replicas[0].CreateVolume, request(model))[0] == "UNAVAILABLE"
    cluster.failures = 0
    replicas[0].CreateVolume(request(model), timeout=60)


def test_validation(controller: ControllerStub, model: S3) -> None:
    volume = controller.CreateVolume(request(model), timeout=60).volume

    def ask(*capabilities: csi_pb2.VolumeCapability, **more: Any) -> Any:
        return csi_pb2.ValidateVolumeCapabilitiesRequest(
            **{"volume_id": volume.volume_id, "volume_capabilities": capabilities, **more}
        )

    validate = controller.ValidateVolumeCapabilities
    answer = validate(ask(capability(), volume_context=volume.volume_context), timeout=60)
    assert answer.confirmed.volume_capabilities == [capability()]
    assert not answer.message
    block = csi_pb2.VolumeCapability(
        block=csi_pb2.VolumeCapability.BlockVolume(), access_mode=_Mode(mode=1)
    )
    for wrong, said in (
        (ask(block), "block access is not possible"),
        (ask(capability(1, "speed=11")), "mount option 'speed'"),
        (ask(capability(), volume_context={"source": "s3://other"}), "volume_context: differs"),
        (ask(capability(), parameters={"source": "s3://other"}), "parameters: differs"),
    ):
        answer = validate(wrong, timeout=60)
        assert not answer.HasField("confirmed")
        assert said in answer.message
    assert refused(validate, ask())[0] == "INVALID_ARGUMENT"
    assert refused(validate, ask(capability(), volume_id="none"))[0] == "NOT_FOUND"


def test_pages_of_volumes(controller: ControllerStub, model: S3) -> None:
    made = {
        controller.CreateVolume(request(model, f"pvc-{number}"), timeout=60).volume.volume_id
        for number in range(5)
    }

    def page(token: str = "") -> Any:
        return controller.ListVolumes(
            csi_pb2.ListVolumesRequest(max_entries=2, starting_token=token), timeout=60
        )

    first = page()
    last = first.entries[-1].volume.volume_id
    # The volume that a token names may be deleted meanwhile.
    controller.DeleteVolume(csi_pb2.DeleteVolumeRequest(volume_id=last), timeout=60)
    second = page(first.next_token)
    third = page(second.next_token)
    assert [len(each.entries) for each in (first, second, third)] == [2, 2, 1]
    assert not third.next_token
    seen = [entry.volume.volume_id for each in (first, second, third) for entry in each.entries]
    assert seen == sorted(made)
    wrong = csi_pb2.ListVolumesRequest(starting_token="next", max_entries=1)
    assert refused(controller.ListVolumes, wrong)[0] == "ABORTED"
    negative = csi_pb2.ListVolumesRequest(max_entries=-1)
    assert refused(controller.ListVolumes, negative)[0] == "INVALID_ARGUMENT"


def test_a_driver_with_rules(plugin: Callable[..., Plugin], model: S3, tmp_path: Path) -> None:
    stub = plugin(
        "controller", f"--state-dir={tmp_path}/state", "--allow-attributes=endpointUrl,memoryLimit",
        "--max-memory-limit=1GiB",
    ).controller  # fmt: skip
    for parameters, said in (
        ({"memoryLimit": "2GiB"}, "memoryLimit: '2GiB' is not allowed: at most 1GiB"),
        ({"prefetch": "off"}, "volumes may not set prefetch here"),
    ):
        code, message = refused(stub.CreateVolume, request(model, parameters=parameters))
        assert (code, said in message) == ("INVALID_ARGUMENT", True), message
    stub.CreateVolume(request(model, parameters={"memoryLimit": "1GiB"}), timeout=60)


def test_identity_and_log(plugin: Callable[..., Plugin], model: S3, tmp_path: Path) -> None:
    started = plugin(
        "controller", f"--state-dir={tmp_path}/state", "--log-format=json", "--driver-name=my.io"
    )
    identity: IdentityStub = started.identity
    info = identity.GetPluginInfo(csi_pb2.GetPluginInfoRequest(), timeout=60)
    assert (info.name, bool(info.vendor_version)) == ("my.io", True)
    answer = identity.GetPluginCapabilities(csi_pb2.GetPluginCapabilitiesRequest(), timeout=60)
    types = [each.service.type for each in answer.capabilities]
    assert types == [csi_pb2.PluginCapability.Service.CONTROLLER_SERVICE]
    assert identity.Probe(csi_pb2.ProbeRequest(), timeout=60).ready.value
    started.controller.CreateVolume(request(model), timeout=60)
    refused(
        started.controller.CreateVolume,
        request(model, "pvc-2", secrets={**SECRET, "sessionToken": "\0"}),
    )
    started.end()
    log = started.log()
    lines = [json.loads(line) for line in log.splitlines()]
    (line,) = [line for line in lines if line["message"].startswith("CreateVolume: OK in ")]
    assert line["volume"] == "pvc-1" and re.fullmatch("[0-9a-f]{4}-[0-9]+", line["rpc"])
    for secret in SECRET.values():
        assert secret not in log
    assert not started.socket.exists()
