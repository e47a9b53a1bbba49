"""What is installed is pinned by its hash, and comes from where the machine takes its packages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from manifests import ROOT
from packaging.requirements import Requirement

from lazyfs import __version__

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKED = {
    "all": ROOT / "constraints.txt",
    **{path.stem: path for path in sorted((ROOT / "constraints").glob("*.txt"))},
}


def pins(path: Path) -> set[tuple[str, str]]:
    """The packages that a file pins, and their versions."""
    entries = path.read_text().replace("\\\n", " ").splitlines()
    found = set()
    for entry in entries:
        requirement, *hashes = re.split(r"\s+--hash=", entry)
        assert hashes, f"{path.name}: {requirement} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes)
        parsed = Requirement(requirement)
        found.add((parsed.name, str(parsed.specifier)))
    return found


def names(path: Path) -> set[str]:
    return {name for name, _ in pins(path)}


def wanted(requirements: list[str]) -> set[str]:
    return {Requirement(each).name for each in requirements}


@pytest.mark.parametrize("file", LOCKED.values(), ids=LOCKED.keys())
def test_every_package_is_pinned_with_hashes(file: Path) -> None:
    assert all(version.startswith("==") for _, version in pins(file))


def test_every_dependency_of_the_project_is_pinned() -> None:
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    every = [*project["dependencies"], *(each for extra in extras.values() for each in extra)]
    assert wanted(every) <= names(LOCKED["all"])
    of_image = [*project["dependencies"], *extras["csi"], *extras["otel"], *extras["verify"]]
    assert wanted(of_image) <= names(LOCKED["image"])
    for group in ("build", "release"):
        assert wanted(PROJECT["dependency-groups"][group]) <= names(LOCKED[group])
    assert wanted(PROJECT["build-system"]["requires"]) <= names(LOCKED["build"])


def test_the_image_has_the_tested_versions() -> None:
    assert pins(LOCKED["image"]) <= pins(LOCKED["all"])


def test_a_file_with_another_hash_is_not_installed(tmp_path: Path) -> None:
    """pip's own check, with the options that .ci/setup and the Dockerfile give it."""
    (tmp_path / "thing-1.0-py3-none-any.whl").write_bytes(b"not what was pinned")
    (tmp_path / "pins.txt").write_text(f"thing==1.0 --hash=sha256:{'0' * 64}\n")
    for script in (".ci/setup", "Dockerfile"):
        text = (ROOT / script).read_text()
        from_index = re.findall(r"pip (?:install|wheel)(?:[^&\n]|\\\n)*-r constraints", text)
        assert from_index
        assert all("--require-hashes" in each for each in from_index), script
    answer = subprocess.run(
        [ROOT / ".venv/bin/python", "-m", "pip", "install", "--require-hashes", "--no-index",
         "--find-links", tmp_path, "--target", tmp_path / "there", "-r", tmp_path / "pins.txt"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert answer.returncode != 0
    assert "DO NOT MATCH THE HASHES" in answer.stderr
    assert not (tmp_path / "there" / "thing").exists()


def image(**env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "deploy" / "image.sh"],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as deploy/image.sh does")
def test_a_base_image_is_named_by_its_digest() -> None:
    answer = image(BASE_IMAGE="registry.example/debian:bookworm")
    if answer.returncode == 77:
        pytest.skip(answer.stderr)
    assert answer.returncode == 2
    assert answer.stderr.endswith("add its digest (NAME@sha256:...)\n")


def test_pip_names_the_packages_that_are_missing(tmp_path: Path) -> None:
    """Where there are neither compiler nor headers. Other builds, and complete machines, go on."""
    backend = str(ROOT / "build" / "backend")
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True, timeout=60)
    (tmp_path / "bin").mkdir()

    def build(**env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [bare / "bin" / "python", ROOT / "setup.py", "--version"],
            env={"PATH": str(tmp_path / "bin"), "PYTHONPATH": backend, **env},
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    refused = build(PIP_BUILD_TRACKER="/nowhere")
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert "apt-get install gcc libc6-dev pkg-config libfuse3-dev" in line
    (packages,) = (bare / "lib").glob("python*/site-packages")
    (packages / "pyfuse3.py").touch()  # then only lazyfs is compiled
    assert "apt-get install gcc libc6-dev (" in build(PIP_BUILD_TRACKER="/nowhere").stderr
    assert build().stdout.split() == [__version__]
    assert build(PIP_BUILD_TRACKER="/nowhere", PATH=os.environ["PATH"]).stdout.split() == [
        __version__
    ]
