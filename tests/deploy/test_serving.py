"""The recipes for serving stacks: objects against the schemas that the stacks publish.

KServe, LeaderWorkerSet and KubeRay publish theirs in Go modules. The charts of vLLM
production-stack and llm-d cannot be had from a registry: of their values, what lazyfs needs is
checked.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import schemas
import yaml
from manifests import DEPLOY, ROOT, Object, load, named

SERVING = DEPLOY / "examples" / "serving"
FILES = sorted(SERVING.glob("*.yaml"))
OBJECTS = [each for each in FILES if not each.stem.endswith("-values")]
STORAGE_CLASS = named(load((DEPLOY / "examples" / "storageclass.yaml").read_text()), "StorageClass")
# Where a stack publishes the schemas of its objects: module and file.
KSERVE = "github.com/kserve/kserve@v0.16.0"
DEFINITIONS = {
    "InferenceService": (KSERVE, "config/crd/full/serving.kserve.io_inferenceservices.yaml"),
    "LLMInferenceService": (
        KSERVE, "config/crd/full/llmisvc/serving.kserve.io_llminferenceservices.yaml",
    ),
    "LeaderWorkerSet": (
        "sigs.k8s.io/lws@v0.7.0",
        "config/crd/bases/leaderworkerset.x-k8s.io_leaderworkersets.yaml",
    ),
    "RayService": (
        "github.com/ray-project/kuberay/ray-operator@v1.5.0",
        "config/crd/bases/ray.io_rayservices.yaml",
    ),
}  # fmt: skip
LOAD_S = 900


def definition(kind: str) -> Object:
    """The CustomResourceDefinition of a kind."""
    module, file = DEFINITIONS[kind]
    done = subprocess.run(
        [ROOT / ".ci" / "go-module", module], capture_output=True, text=True, check=False,
        timeout=240,
    )  # fmt: skip
    if done.returncode == 77:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found: Object = yaml.load(Path(done.stdout.strip(), file).read_text(), loader)
    return found


def strict(schema: Any) -> Any:
    """A schema of Kubernetes that refuses fields which it does not know."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    return made


def check(manifest: Object) -> None:
    """Raises ValidationError if an object is not as its stack has it."""
    found = definition(manifest["kind"])
    group, _, version = manifest["apiVersion"].partition("/")
    assert group == found["spec"]["group"]
    (schema,) = (
        each["schema"]["openAPIV3Schema"]
        for each in found["spec"]["versions"]
        if each["name"] == version and each["served"]
    )
    made = strict(schema)
    made["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(manifest, made)


@pytest.mark.parametrize("path", OBJECTS, ids=lambda each: each.stem)
def test_is_as_its_stack_publishes_it(path: Path) -> None:
    for each in load(path.read_text()):
        if each["kind"] in DEFINITIONS:
            check(each)
        else:
            schemas.check(each, schemas.NEWEST)


def test_a_wrong_field_is_found() -> None:
    manifest = named(load((SERVING / "kserve.yaml").read_text()), "InferenceService")
    manifest["spec"]["predictor"]["model"]["startUpProbe"] = {}
    with pytest.raises(jsonschema.ValidationError):
        check(manifest)


@pytest.mark.parametrize("path", FILES, ids=lambda each: each.stem)
def test_is_explained(path: Path) -> None:
    """In ten lines at the top: what is gained, and what to watch."""
    text = path.read_text()
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert text.startswith("# ") and 6 <= len(head) <= 14
    assert any("Gained:" in line for line in head) and any("Watch:" in line for line in head)
    assert f"serving/{path.name}" in (DEPLOY / "examples" / "README.md").read_text()


@pytest.mark.parametrize("path", OBJECTS, ids=lambda each: each.stem)
def test_its_claim_is_of_the_class(path: Path) -> None:
    claim = named(load(path.read_text()), "PersistentVolumeClaim")
    assert claim["spec"]["storageClassName"] == STORAGE_CLASS["metadata"]["name"]
    source = claim["metadata"]["annotations"]["csi.lazyfs.io/source"]
    assert source.startswith(STORAGE_CLASS["parameters"]["allowedPrefixes"])
    assert claim["metadata"]["name"] in path.read_text().partition("---")[2], "it is used"


def probes(value: Any) -> list[Object]:
    """All startup probes in a file."""
    if isinstance(value, list):
        return [each for item in value for each in probes(item)]
    if not isinstance(value, dict):
        return []
    own = [value["startupProbe"]] if "startupProbe" in value else []
    return own + [each for item in value.values() for each in probes(item)]


@pytest.mark.parametrize("path", FILES, ids=lambda each: each.stem)
def test_a_first_load_has_time(path: Path) -> None:
    found = probes(load(path.read_text()))
    # Ray watches its replicas itself.
    assert found or path.stem == "ray"
    for each in found:
        assert each["periodSeconds"] * each["failureThreshold"] >= LOAD_S


def test_the_values_of_production_stack() -> None:
    """Its `pvcStorage` would set HF_HOME to the read-only volume."""
    (values,) = load((SERVING / "production-stack-values.yaml").read_text())
    (spec,) = values["servingEngineSpec"]["modelSpec"]
    assert "pvcStorage" not in spec
    (volume,), (mount,) = spec["extraVolumes"], spec["extraVolumeMounts"]
    assert volume["name"] == mount["name"]
    assert volume["persistentVolumeClaim"]["readOnly"] and mount["readOnly"]
    assert spec["modelURL"] == mount["mountPath"]


def test_the_values_of_llm_d() -> None:
    """What follows the slash is the path in the claim."""
    (values,) = load((SERVING / "llm-d-values.yaml").read_text())
    assert values["modelArtifacts"]["uri"] == "pvc://llama-3-1-8b/"
    (container,) = values["decode"]["containers"]
    assert container["mountModelVolume"] and container["modelCommand"] == "vllmServe"
