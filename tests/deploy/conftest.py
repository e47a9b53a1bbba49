"""Fixtures of the deployment: helm."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
from manifests import CHART, ROOT, Object, load

HELM = "helm.sh/helm/v3/cmd/helm@v3.22.0"
# What an administrator has to say.
NECESSARY = ("images.lazyfs.registry=registry.example",)


@pytest.fixture(scope="session")
def helm() -> str:
    """Path of helm, built from its Go module if it is not there yet."""
    answer = subprocess.run(
        [ROOT / ".ci" / "go-tool", HELM], capture_output=True, text=True, timeout=900, check=False
    )
    if answer.returncode == 77:
        pytest.skip(answer.stderr.strip())
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


@pytest.fixture(scope="session")
def render(helm: str) -> Callable[..., list[Object]]:
    """`render("key=value", ..., version="1.37.0")`: the objects that the chart makes.

    Values without a default are given.
    """

    def objects(*values: str, version: str = "1.30.0") -> list[Object]:
        command = [helm, "template", "lazyfs-csi", str(CHART), "--namespace=lazyfs"]
        command.append(f"--kube-version={version}")
        for each in (*NECESSARY, *values):
            command += ["--set-json" if "=[" in each or "={" in each else "--set", each]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if answer.returncode != 0:
            raise ValueError(answer.stderr)
        return load(answer.stdout)

    return objects
