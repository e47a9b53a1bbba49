"""The image is run: what `make image` built, if it did."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import image
import pytest
from manifests import DEPLOY, pod_specs
from rehearsal import Cluster
from s3 import CREDENTIALS, S3

from csi import csi_pb2
from csi.csi_pb2_grpc import IdentityStub
from lazyfs import __version__


@pytest.fixture(scope="module")
def built() -> str:
    found = image.built()
    if found is None:
        pytest.skip("no image: `make image` builds one and tries it (buildah, debootstrap, root)")
    return found


@pytest.fixture
def container(built: str) -> Iterator[image.Container]:
    made = image.Container(built)
    yield made
    made.remove()


def test_version_and_labels(built: str, container: image.Container) -> None:
    assert __version__ in container.run("lazyfs", "--version")
    assert __version__ in container.run("lazyfs-csi", "--version")
    config = json.loads(image.inspect(built))["OCIv1"]["config"]
    assert config["Labels"]["org.opencontainers.image.version"] == __version__
    assert len(config["Labels"]["org.opencontainers.image.revision"]) == 40
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_the_image_carries_the_licences_of_its_packages(container: image.Container) -> None:
    documents = "/usr/share/doc/lazyfs"
    assert "Apache License" in container.run("head", "-3", f"{documents}/copyright")
    notices = container.run("cat", f"{documents}/THIRD-PARTY-NOTICES")
    names = ("boto3", "crc32c", "grpcio", "pyfuse3", "trio")
    assert all(f"\n{name} " in notices for name in names)
    assert "LESSER GENERAL PUBLIC LICENSE" in notices


def test_the_image_contains_only_files_used_at_run_time(container: image.Container) -> None:
    found = container.run(
        "sh", "-c", "for each in gcc cc pip pip3 fusermount3; do command -v $each; done; true"
    )
    assert found == ""
    assert container.run("find", "/", "-xdev", "-perm", "/6000", "-type", "f") == ""
    assert container.run("sh", "-c", "ls /usr/include /var/lib/apt/lists").split() == [
        "/usr/include:",
        "/var/lib/apt/lists:",
    ]


@pytest.mark.fuse
def test_a_container_of_the_image_mounts_a_model(container: image.Container, s3: S3) -> None:
    body = bytes(range(256)) * 20000
    s3.put("images", {"model/weights.bin": body, "model/config.json": b"{}"})
    out = container.run(
        "sh",
        "-ec",
        "mkdir /model; lazyfs mount s3://images/model /model --endpoint-url $ENDPOINT;"
        "sha256sum /model/weights.bin; lazyfs umount /model; ls -A /model",
        env={**CREDENTIALS, "ENDPOINT": s3.url},
    )
    assert out.split() == [hashlib.sha256(body).hexdigest(), "/model/weights.bin"]


def test_an_ordinary_user_can_run_it(container: image.Container) -> None:
    """As the controller does in the chart."""
    assert "Usage" in container.run("lazyfs-csi", "controller", "--help", user="65532")


@pytest.mark.fuse
@pytest.mark.timeout(300)
def test_its_driver_serves_pods(container: image.Container, server: S3) -> None:
    """Keeper, node plugin and controller, each as in a container of its own, rehearsed."""
    cluster = Cluster(server, container.start)
    try:
        cluster.start()
        for driver in (cluster.identity, IdentityStub(cluster.controller_channel)):
            assert driver.Probe(csi_pb2.ProbeRequest(), timeout=10).ready.value
        for name in ("storageclass.yaml", "minio-secret.yaml", "inline.yaml"):
            cluster.apply((DEPLOY / "examples" / name).read_text())
        for pod in pod_specs(cluster.objects):
            cluster.run_pod(pod)
        cluster.check()
        cluster.kill_node()
        cluster.start_node()
        cluster.check()
        cluster.end_pods()
        cluster.delete_volumes()
        assert cluster.workers() == 0
    finally:
        cluster.end()
