"""Installation without helm, and the recipes of deploy/examples."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from cluster import ROOT, Cluster, Object, eventually
from driver import NAMESPACE, Driver
from objectstore import ACCOUNT, ENDPOINT, REGION, Key
from tenant import IMAGE, Tenant, inline, pod, secret

PLAIN = ROOT / "deploy" / "kubernetes" / "lazyfs-csi.yaml"
EXAMPLES = sorted((ROOT / "deploy" / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", [*EXAMPLES, PLAIN], ids=lambda it: it.stem)
def test_api_server_accepts_each_object(driver: Driver, path: Path) -> None:
    """Without a warning. What others of the file need to be tried is made before."""
    objects = [each for each in yaml.safe_load_all(path.read_text()) if each]
    first = [
        each
        for each in objects
        if each["kind"] in ("Namespace", "ServiceAccount")
        and NAMESPACE not in (each["metadata"]["name"], each["metadata"].get("namespace"))
    ]
    try:
        if first:
            driver.cluster.apply(*first)
        ran = driver.cluster.try_kubectl(
            "apply", "--server-side", "--force-conflicts", "--dry-run=server",
            "--validate=strict", "-f", str(path),
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        assert "Warning" not in ran.stderr, ran.stderr
        assert len(ran.stdout.splitlines()) == len(objects)
    finally:
        names = [each["metadata"]["name"] for each in first if each["kind"] == "Namespace"]
        if names:
            driver.cluster.kubectl("delete", "namespace", *names, timeout_s=90)


def test_plain_manifests(tenant: Tenant, driver: Driver) -> None:
    """Instead of the chart, with what this S3 needs added by hand: its endpoint and authority."""
    driver.uninstall()
    objects = [each for each in yaml.safe_load_all(PLAIN.read_text()) if each]
    try:
        for each in objects:
            if each["kind"] in ("DaemonSet", "Deployment"):
                add_site(driver, each)
        tenant.cluster.apply(*objects)
        driver.ready()
        tenant.apply(pod("reader", inline()))
        tenant.succeeds("reader")
        tenant.delete("pod", "reader")
        eventually(lambda: not driver.left(), 30, driver.left)
    finally:
        kept = [each for each in objects if each["kind"] != "Namespace"]
        tenant.cluster.kubectl(
            "delete", "-f", "-", "--wait", given=yaml.safe_dump_all(kept), timeout_s=120
        )
        driver.upgrade()


def add_site(driver: Driver, workload: Object) -> None:
    """What values of the chart say about this S3, in a workload's containers of lazyfs."""
    spec = workload["spec"]["template"]["spec"]
    node = driver.values()["node"]
    for container in spec["containers"]:
        if "/lazyfs:" in container["image"]:
            endpoint = {"name": "LAZYFS_ENDPOINT_URL", "value": ENDPOINT}
            container.setdefault("env", []).extend([*node["env"], endpoint])
            container["volumeMounts"].extend(node["extraVolumeMounts"])
    spec["volumes"].extend(node["extraVolumes"])


# Where the recipes' models are.
MODELS = {
    "my-models": [
        "qwen/2.5-7b-instruct/",
        "llama/3.1-70b-instruct/",
        "mistral/7b-instruct-v0.3/",
        "mixtral/8x22b-instruct/",
        "versions/assistant-2026-10/",
        "versions/assistant-2026-11/",
        "qwen3-8b/",
        "mistral-7b/",
        "triton-repository/",
        "llama-3.1-8b/",
    ],
    "models": ["gemma-2-9b/"],
    "tenants": ["team-a/phi-4/"],
    "research-models": ["checkpoints/run-17/"],
}

# Servers whose images are exchanged.
SERVERS = (
    "lmsysorg/sglang",
    "ghcr.io/huggingface/text-generation-inference",
    "nvcr.io/nvidia/tritonserver",
)


@pytest.fixture(scope="module")
def site(driver: Driver) -> Iterator[Key]:
    """What the recipes take for granted: models, GPUs, a pool, a role, keys of the driver's own.

    Gives the key that stands in place of REPLACE-WITH-...
    """
    s3, cluster = driver.cluster.s3, driver.cluster
    for bucket, prefixes in MODELS.items():
        for prefix in prefixes:
            s3.put_model(bucket, prefix)
    key = s3.make_user("recipes", list(MODELS))
    s3.make_role(
        "research-models-read", "system:serviceaccount:research:trainer", ["research-models"]
    )
    cluster.kubectl("label", "node", "node1", "node.example.com/pool=h100", "--overwrite")
    gpus = {"status": {"capacity": {"nvidia.com/gpu": "16"}}}
    cluster.kubectl(
        "patch", "node", "node1", "--subresource=status", "--type=merge", "-p", json.dumps(gpus)
    )
    # As minio-secret.yaml says, and so its namespace has to be there.
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "models"}})
    values = driver.values()
    values["controller"]["secrets"] += [{"namespace": "models", "name": "minio-read"}]
    own = secret("own-key", key)
    own["metadata"]["namespace"] = NAMESPACE
    cluster.apply(own)
    for program in ("node", "controller"):
        values[program]["env"] += [
            {"name": name, "valueFrom": {"secretKeyRef": {"name": "own-key", "key": field}}}
            for name, field in (
                ("AWS_ACCESS_KEY_ID", "accessKeyId"),
                ("AWS_SECRET_ACCESS_KEY", "secretAccessKey"),
            )
        ]
    driver.upgrade(values=values)
    yield key
    driver.upgrade()
    cluster.kubectl("delete", "namespace", "models", "team-a", "research", "--ignore-not-found")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda it: it.stem)
def test_recipe(site: Key, tenant: Tenant, driver: Driver, path: Path) -> None:
    """Runs as it is, but for keys, account, region, and the requests that no small machine has."""
    text = path.read_text()
    for placeholder, value in {
        "REPLACE-WITH-ACCESS-KEY": site["accessKeyId"],
        "REPLACE-WITH-SECRET-KEY": site["secretAccessKey"],
        "123456789012": ACCOUNT,
        "eu-west-1": REGION,
    }.items():
        text = text.replace(placeholder, value)
    objects = [each for each in yaml.safe_load_all(text) if each]
    for each in objects:
        for spec in pod_specs(each):
            for container in spec["containers"]:
                fit(container)
            if path.stem == "warm-job":
                add_endpoint(driver, spec)
    try:
        driver.cluster.apply(*objects)
        for each in objects:
            eventually(
                lambda each=each: works(driver.cluster, each),
                150,
                lambda each=each: (
                    f"{each['kind']} {each['metadata']['name']}: "
                    + driver.cluster.kubectl("get", "events,pods", "-A")[-3000:]
                ),
            )
    finally:
        remove(driver.cluster, objects)


def pod_specs(each: Object) -> list[Object]:
    if each["kind"] == "Pod":
        return [each["spec"]]
    template = each.get("spec", {}).get("template") if "spec" in each else None
    return [template["spec"]] if template else []


def fit(container: Object) -> None:
    """GPUs stay."""
    resources = container.get("resources", {})
    resources.pop("requests", None)
    limits = resources.get("limits", {})
    for each in ("cpu", "memory"):
        limits.pop(each, None)
    if container["image"].partition(":")[0] in SERVERS:
        stand_in(container)


def stand_in(container: Object) -> None:
    """What stands for vLLM stands for another server, too."""
    model = container["volumeMounts"][0]["mountPath"]
    container.update(image=IMAGE, command=["vllm", "serve", model], args=[])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if probe in container:
            container[probe]["httpGet"] = {"path": "/health", "port": 8000}


def add_endpoint(driver: Driver, spec: Object) -> None:
    """For `lazyfs warm`, which is not told where S3 is by the driver."""
    (container,) = spec["containers"]
    values = driver.values()["node"]
    container["env"] = [{"name": "LAZYFS_ENDPOINT_URL", "value": ENDPOINT}, *values["env"]]
    container["volumeMounts"] += values["extraVolumeMounts"]
    spec["volumes"] += values["extraVolumes"]


def works(cluster: Cluster, each: Object) -> bool:
    """Whether an object has come to what it is for."""
    namespace = each["metadata"].get("namespace", "default")
    kind = each["kind"]
    if kind not in ("PersistentVolumeClaim", "Pod", "Deployment", "DaemonSet", "Job"):
        return True
    found = cluster.get(kind, each["metadata"]["name"], namespace)
    assert found is not None
    status = found["status"]
    if kind == "PersistentVolumeClaim":
        return bool(status.get("phase") == "Bound")
    if kind == "Job":
        return bool(status.get("succeeded") == each["spec"]["completions"])
    if kind == "Deployment":
        return bool(status.get("readyReplicas") == each["spec"]["replicas"])
    if kind == "DaemonSet":
        return bool(status.get("numberReady") == 1)
    ready = {it["type"]: it["status"] for it in status.get("conditions", [])}.get("Ready")
    assert status["phase"] != "Failed", cluster.kubectl(
        "logs", "-n", namespace, found["metadata"]["name"]
    )
    return status["phase"] == "Succeeded" or ready == "True"


def remove(cluster: Cluster, objects: list[Object]) -> None:
    """Pods first, then claims, then the rest."""
    order = ["Deployment", "DaemonSet", "Job", "Pod", "PersistentVolumeClaim"]
    rank = {kind: number for number, kind in enumerate(order)}
    for each in sorted(objects, key=lambda it: rank.get(it["kind"], len(order))):
        metadata = each["metadata"]
        if each["kind"] == "Namespace":
            continue
        where = ["-n", metadata.get("namespace", "default")]
        cluster.kubectl(
            "delete", each["kind"], metadata["name"], *where, "--ignore-not-found",
            "--cascade=foreground", "--timeout=60s", timeout_s=90,
        )  # fmt: skip
