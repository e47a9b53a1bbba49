"""Parameters of a StorageClass, made into attributes."""

from __future__ import annotations

import pytest

from csi.errors import InvalidArgumentError, MendableError
from csi.parameters import CLAIM_NAMESPACE, Parameters

METADATA = {
    "csi.storage.k8s.io/pvc/name": "llama-3",
    "csi.storage.k8s.io/pvc/namespace": "research",
    "csi.storage.k8s.io/pv/name": "pvc-1",
}


def attributes(
    parameters: dict[str, str], chosen: str | None = None, metadata: dict[str, str] = METADATA
) -> dict[str, str]:
    made = Parameters.read({**parameters, **metadata}).attributes(chosen)
    # By it, nodes bound what a namespace may have.
    assert made.pop(CLAIM_NAMESPACE, None) == metadata.get(CLAIM_NAMESPACE)
    return made


def test_templates() -> None:
    assert attributes(
        {"bucket": "models-${pvc.namespace}", "prefix": "${pvc.name}/${pv.name}", "region": "eu-x"}
    ) == {"bucket": "models-research", "prefix": "llama-3/pvc-1", "region": "eu-x"}
    assert attributes({"source": "s3://models/${pvc.name}"}) == {"source": "s3://models/llama-3"}


@pytest.mark.parametrize(
    ("parameters", "metadata", "said"),
    [
        ({"prefix": "${pvc.uid}"}, METADATA, r"prefix: '\$\{pvc.uid\}' is not allowed: \$\{pvc.n"),
        ({"prefix": "${pvc.name}"}, {}, "--extra-create-metadata"),
        (
            {"prefix": "${pvc.name}"},
            {"csi.storage.k8s.io/pvc/name": "../../other"},
            "is not a Kubernetes name",
        ),
        ({"allowedPrefixes": "models"}, METADATA, "allowedPrefixes: 'models' is not a source"),
        ({"checkSource": "perhaps"}, METADATA, "checkSource: 'perhaps' is not allowed: true or"),
        ({"include": "x" * 4096}, METADATA, "parameters: 4103 bytes, more than 4096"),
    ],
)
def test_wrong_parameters(parameters: dict[str, str], metadata: dict[str, str], said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        attributes(parameters, metadata=metadata)


ALLOWED = {"allowedPrefixes": "s3://models/public, s3://research", "blockSize": "4MiB"}


@pytest.mark.parametrize(
    "chosen",
    ["s3://models/public/llama/", "s3://models/public", "s3://research", "s3://research/x"],
)
def test_a_claim_may_choose(chosen: str) -> None:
    assert attributes({**ALLOWED, "bucket": "default", "prefix": "${pvc.uid}"}, chosen) == {
        "source": chosen.removesuffix("/"),
        "blockSize": "4MiB",
    }


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ("s3://models/private", "is not allowed: the StorageClass allows sources below s3://mod"),
        ("s3://models/public-not", "is not allowed"),
        ("s3://models", "is not allowed"),
        ("s3://models2/public", "is not allowed"),
        ("s3://models/public/../private", "'..' part"),
        ("https://models/public", "is not a source"),
        ("s3://models/${pvc.namespace}", "is not allowed"),
    ],
)
def test_a_claim_may_choose_only_below_allowed_prefixes(chosen: str, said: str) -> None:
    with pytest.raises(MendableError, match=said) as caught:
        attributes(ALLOWED, chosen)
    assert str(caught.value).startswith("the claim's annotation: ")


def test_without_a_choice_the_class_decides() -> None:
    assert attributes({**ALLOWED, "bucket": "models"}) == {"bucket": "models", "blockSize": "4MiB"}
    assert not Parameters.read(ALLOWED).names_a_source
    assert Parameters.read({**ALLOWED, "bucketName": "models"}).names_a_source
