"""Manifests against the schemas of Kubernetes that kubernetes-validate carries."""

from __future__ import annotations

import re

import kubernetes_validate
from kubernetes_validate.utils import all_versions, major_minor
from manifests import Object

OLDEST, NEWEST = "1.25", major_minor(all_versions()[-1])
# Objects of operators, whose schemas are not Kubernetes' own.
FOREIGN = ("monitoring.coreos.com/",)
# What the API server asks of names and the schemas do not (RFC 1123 labels).
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_NAMED_BY_LABELS = ("Service", "Namespace")
_SINCE = re.compile(r"^# Kubernetes (\d+\.\d+) or newer", re.MULTILINE)


def supported(text: str) -> list[str]:
    """The oldest and the newest version that a file is for; it may name an oldest of its own."""
    since = _SINCE.search(text)
    return [since[1] if since else OLDEST, NEWEST]


def check(manifest: Object, version: str) -> None:
    """Raises ValidationError for an unknown field too, and AssertionError for a wrong name."""
    if manifest["kind"] in _NAMED_BY_LABELS:
        assert _LABEL.fullmatch(manifest["metadata"]["name"]), manifest["metadata"]["name"]
    if not manifest["apiVersion"].startswith(FOREIGN):
        kubernetes_validate.validate(manifest, version, strict=True)
