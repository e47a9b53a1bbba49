"""The examples: valid for every version of Kubernetes, with attributes that exist, and executed.

Executed means: `rehearsal.py` plays kubelet and external-provisioner with the programs of the
driver, and every volume of every pod is read and compared with S3.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemas
from manifests import CHART, DEPLOY, EXAMPLES, Object, PodSpec, load, pod_specs
from models import model_hashes
from mounting import environment
from rehearsal import Cluster
from s3 import S3

from csi.parameters import Parameters
from csi.volume_attributes import Rules
from lazyfs.options.mount_options import OPTIONS

every_example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda each: each.stem)


@pytest.fixture(scope="module")
def driver(server: S3) -> Iterator[Cluster]:
    made = Cluster(server)
    try:
        made.start()
        yield made
    finally:
        made.end()


@pytest.fixture
def cluster(driver: Cluster) -> Cluster:
    """A cluster without objects."""
    driver.objects.clear()
    driver.api_server.objects.clear()
    return driver


def attributes(objects: list[Object]) -> Iterator[dict[str, str]]:
    """Of all volumes in a file that are not made from a StorageClass."""
    for each in objects:
        if each["kind"] == "PersistentVolume":
            yield each["spec"]["csi"]["volumeAttributes"]
    for pod in pod_specs(objects):
        for volume in pod.spec.get("volumes", []):
            if "csi" in volume:
                yield volume["csi"]["volumeAttributes"]


@every_example
def test_is_valid(path: Path) -> None:
    text = path.read_text()
    for version in schemas.supported(text):
        for each in load(text):
            schemas.check(each, version)


@every_example
def test_every_attribute_exists(path: Path) -> None:
    """Names and values, read by the code of the driver."""
    objects = load(path.read_text())
    for each in attributes(objects):
        Rules().volume(each)
    for each in objects:
        if each["kind"] == "PersistentVolume":
            spec = each["spec"]
            Rules().volume(spec["csi"]["volumeAttributes"], spec.get("mountOptions", []))
        if each["kind"] == "StorageClass":
            names = {
                "csi.storage.k8s.io/pvc/name": "claim",
                "csi.storage.k8s.io/pvc/namespace": "default",
                "csi.storage.k8s.io/pv/name": "pvc-1",
            }
            parameters = Parameters.read({**each["parameters"], **names})
            chosen = str(parameters.allowed_prefixes[0]) if parameters.allowed_prefixes else None
            Rules().volume(parameters.attributes(chosen), each.get("mountOptions", []))


@every_example
def test_is_explained(path: Path) -> None:
    """What it is for stands at the top, and the page of examples names it."""
    assert path.read_text().startswith("# ")
    assert path.name in (DEPLOY / "examples" / "README.md").read_text()


@every_example
def test_vllm_is_probed_and_has_a_gpu(path: Path) -> None:
    for pod in pod_specs(load(path.read_text())):
        for container in pod.containers:
            if container.get("command") == ["vllm", "serve"]:
                assert container["readinessProbe"]["httpGet"]["path"] == "/health"
                startup = container["startupProbe"]
                # A large model takes longer than ten minutes to load.
                assert startup["failureThreshold"] * startup["periodSeconds"] >= 900
                assert "nvidia.com/gpu" in container["resources"]["limits"]
                assert container["args"][0] == container["volumeMounts"][0]["mountPath"]


@pytest.mark.fuse
@pytest.mark.timeout(240)
@every_example
def test_is_executed(path: Path, cluster: Cluster) -> None:
    cluster.apply(path.read_text())
    pods = list(pod_specs(cluster.objects))
    for pod in pods:
        for _ in range(replicas(cluster.objects, pod)):
            cluster.run_pod(pod)
    for claim in (each for each in cluster.objects if each["kind"] == "PersistentVolumeClaim"):
        cluster.provision(claim)  # also those that no pod uses yet
    assert bool(cluster.published()) == ("csi.lazyfs.io" in path.read_text())
    cluster.check()
    cluster.republish()
    cluster.check()
    before = {each.source: model_hashes(cluster.s3, each.source) for each in cluster.published()}

    cluster.end_pods()
    cluster.delete_volumes()
    assert cluster.mounts() == []
    assert cluster.workers() == 0
    assert cluster.api_server.config_maps() == []
    for source, files in before.items():
        assert model_hashes(cluster.s3, source) == files
    # No secret is in any log.
    for name in ("keeper", "node", "controller"):
        assert "REPLACE-WITH" not in cluster.log(name)


def replicas(objects: list[Object], pod: PodSpec) -> int:
    kind, _, name = pod.owner.partition("/")
    (owner,) = (e for e in objects if (e["kind"], e["metadata"]["name"]) == (kind, name))
    return int(owner["spec"].get("replicas", 1))


@pytest.mark.fuse
@pytest.mark.timeout(240)
def test_pods_of_one_node_share_a_daemon_and_outlive_the_node_plugin(cluster: Cluster) -> None:
    cluster.apply((DEPLOY / "examples" / "minio-secret.yaml").read_text())
    (pod,) = pod_specs(cluster.objects)
    for _ in range(2):
        cluster.run_pod(pod)
    assert cluster.workers() == 1
    cluster.check()

    cluster.kill_node()  # an upgrade of the chart: the pod is deleted, and made anew
    assert len(cluster.mounts()) >= 3
    cluster.start_node()
    cluster.check()
    assert cluster.workers() == 1
    assert "lazyfs_csi_rpc_seconds" in cluster.page("node", "/metrics")

    cluster.end_pods()
    cluster.delete_volumes()
    assert cluster.mounts() == []


@pytest.mark.fuse
@pytest.mark.timeout(240)
def test_pods_do_not_fetch_what_the_job_warmed(cluster: Cluster) -> None:
    """The Job's own command, with the directory that the driver's cache is in."""
    cluster.apply((DEPLOY / "examples" / "warm-job.yaml").read_text())
    (pod,) = pod_specs(cluster.objects)
    (container,) = pod.containers
    assert pod.host_path("warm", "/cache") == "/var/cache/lazyfs"
    shutil.rmtree(cluster.directory / "cache")
    arguments = [
        each.replace("=/cache", f"={cluster.directory / 'cache'}") for each in container["args"]
    ]
    job = subprocess.run(
        [Path(sys.executable).with_name(arguments[0]), *arguments[1:]],
        env={
            **environment(LAZYFS_ENDPOINT_URL=cluster.s3.url),
            **cluster.secret_environment(pod, container),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert job.returncode == 0, job.stderr

    cluster.apply((DEPLOY / "examples" / "warm-daemonset.yaml").read_text())
    cluster.s3.forget()
    (path,) = cluster.run_pod(list(pod_specs(cluster.objects))[-1]).values()
    for shard in path.glob("*.safetensors"):
        subprocess.run(["cat", shard], stdout=subprocess.DEVNULL, timeout=60, check=True)
    fetched = [key for key, _ in cluster.s3.data_requests() if key.endswith(".safetensors")]
    assert fetched == []
    cluster.check()
    cluster.end_pods()
    cluster.delete_volumes()


@pytest.mark.fuse
def test_tokens_may_come_as_secrets(cluster: Cluster) -> None:
    """As from Kubernetes 1.35 on, where the chart asks for it."""
    spec = cluster.csi_driver["spec"]
    spec["serviceAccountTokenInSecrets"] = True
    try:
        cluster.apply((DEPLOY / "examples" / "web-identity.yaml").read_text())
        (pod,) = pod_specs(cluster.objects)
        cluster.run_pod(pod)
        cluster.check()
        cluster.republish()
        cluster.end_pods()
    finally:
        del spec["serviceAccountTokenInSecrets"]


def test_the_driver_of_the_examples_is_that_of_the_chart() -> None:
    text = "".join(path.read_text() for path in EXAMPLES)
    assert "csi.lazyfs.io" in (CHART / "values.yaml").read_text()
    assert "driver: csi.lazyfs.io" in text


def test_every_attribute_of_the_table_exists() -> None:
    """In the table of symptoms, attributes are in the second column."""
    table = (DEPLOY / "examples" / "README.md").read_text().partition("| symptom |")[2]
    rows = [line.split("|") for line in table.splitlines()[2:] if line.startswith("|")]
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row[2])}
    assert len(rows) > 10
    assert names - {"waitFor"} <= {option.camel_case for option in OPTIONS}
