"""The driver's requests to the Kubernetes API, over real HTTP."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from api_server import NAMESPACE, FakeApiServer
from certificates import make_certificates

from csi.controller_records import (
    ConfigMapRecords,
    DirectoryRecords,
    ProvisionedVolume,
    Records,
    id_of,
)
from csi.errors import RpcError
from csi.kubernetes import ApiServer


def record(name: str, driver: str = "") -> ProvisionedVolume:
    return ProvisionedVolume(
        name, id_of(name), 5, {"bucket": "models", "d": driver}, {"source": "s3://models"}
    )


@pytest.fixture
def api(cluster: FakeApiServer) -> ApiServer:
    return ApiServer(cluster.url, cluster.account)


def test_annotations_of_a_claim(cluster: FakeApiServer, api: ApiServer) -> None:
    cluster.claim("research", "llama", {"csi.lazyfs.io/source": "s3://models/llama"})
    cluster.claim("research", "plain")
    assert api.claim_annotations("research", "llama") == {
        "csi.lazyfs.io/source": "s3://models/llama"
    }
    assert api.claim_annotations("research", "plain") == {}
    with pytest.raises(RpcError, match="there is no PersistentVolumeClaim research/none") as caught:
        api.claim_annotations("research", "none")
    assert caught.value.code is grpc.StatusCode.NOT_FOUND


def test_a_name_cannot_lead_elsewhere(cluster: FakeApiServer, api: ApiServer) -> None:
    with pytest.raises(RpcError):
        api.claim_annotations("a/../../secrets", "x?watch=1")
    (asked,) = cluster.requests
    assert (
        asked == "GET /api/v1/namespaces/a%2F..%2F..%2Fsecrets/persistentvolumeclaims/x%3Fwatch%3D1"
    )


def test_a_renewed_token_is_used(cluster: FakeApiServer, api: ApiServer) -> None:
    cluster.claim("research", "llama")
    api.claim_annotations("research", "llama")
    cluster.renew_token("token-2")
    api.claim_annotations("research", "llama")


def test_refusals_of_the_api_server(cluster: FakeApiServer, api: ApiServer) -> None:
    cluster.forbidden.add("persistentvolumeclaims")
    with pytest.raises(RpcError, match="403: persistentvolumeclaims is forbidden") as caught:
        api.claim_annotations("research", "llama")
    assert caught.value.code is grpc.StatusCode.PERMISSION_DENIED
    cluster.token = "another"
    with pytest.raises(RpcError) as caught:
        api.claim_annotations("research", "llama")
    assert "token-1" not in str(caught.value)


def test_an_unreachable_api_server(cluster: FakeApiServer, api: ApiServer) -> None:
    cluster.claim("research", "llama")
    cluster.failures = 2
    api.claim_annotations("research", "llama")
    cluster.failures = 50
    with pytest.raises(RpcError, match="503: etcd is away") as caught:
        api.claim_annotations("research", "llama")
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    nowhere = ApiServer("http://127.0.0.1:1", cluster.account)
    with pytest.raises(RpcError, match="no usable answer") as caught:
        nowhere.claim_annotations("research", "llama")
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE


def test_only_the_cluster_s_authority_is_trusted(tmp_path: Path) -> None:
    authority, pem, key = make_certificates(tmp_path / "good")
    server = FakeApiServer(tmp_path / "account", (pem, key, authority))
    server.claim("research", "llama")
    address = {
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KUBERNETES_SERVICE_PORT": server.url.rpartition(":")[2],
    }
    pod = ApiServer.of_this_pod(address, server.account)
    assert pod is not None
    assert pod.claim_annotations("research", "llama") == {}
    other, _, _ = make_certificates(tmp_path / "other")
    (server.account / "ca.crt").write_bytes(other.read_bytes())
    server.requests.clear()
    with pytest.raises(RpcError, match="no usable answer"):
        ApiServer(server.url, server.account).claim_annotations("research", "llama")
    assert server.requests == []
    server.stop()


def test_outside_of_a_cluster() -> None:
    assert ApiServer.of_this_pod({}) is None
    assert ApiServer.of_this_pod({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None


@pytest.fixture(params=["config maps", "directory"])
def records(request: pytest.FixtureRequest, api: ApiServer, tmp_path: Path) -> Records:
    if request.param == "directory":
        return DirectoryRecords(tmp_path / "state")
    return ConfigMapRecords(api, "csi.lazyfs.io")


def test_records(records: Records) -> None:
    first, again = record("pvc-1"), record("pvc-1", "other")
    assert records.find(first.volume_id) is None
    assert records.add(first)
    assert not records.add(again)
    assert records.find(first.volume_id) == first
    assert records.add(record("ü/../" + "x" * 120))
    assert len(list(records.all())) == 2
    records.remove(first.volume_id)
    records.remove(first.volume_id)
    assert records.find(first.volume_id) is None
    for foreign in ("s3://not/ours", "../../etc/passwd", "x"):
        assert records.find(foreign) is None
        records.remove(foreign)


def test_many_records_of_two_drivers(
    cluster: FakeApiServer, api: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csi.kubernetes.PAGE", 7)
    ours, theirs = ConfigMapRecords(api, "csi.lazyfs.io"), ConfigMapRecords(api, "other.io")
    for number in range(30):
        assert ours.add(record(f"pvc-{number}"))
    assert theirs.add(record("theirs"))
    assert len({each.name for each in ours.all()}) == 30
    assert [each.name for each in theirs.all()] == ["theirs"]
    made = cluster.config_maps()[0]
    assert made["immutable"] and NAMESPACE in next(
        each for each in cluster.requests if each.startswith("POST")
    )
