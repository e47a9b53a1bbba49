"""The notices of third parties, as the image's build makes them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from manifests import DEPLOY

import lazyfs


def install(directory: Path, name: str, licence: str, **files: str) -> None:
    """Put what an installer leaves of a distribution into a directory."""
    metadata = directory / f"{name}-1.5.dist-info"
    (metadata / "licenses").mkdir(parents=True)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.5\nLicense-Expression: {licence}\n"
    )
    record = [f"{metadata.name}/METADATA,,"]
    for file, text in files.items():
        (metadata / "licenses" / file).write_text(text)
        record.append(f"{metadata.name}/licenses/{file},,")
    (metadata / "RECORD").write_text("\n".join(record))


def notices(directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, DEPLOY / "notices.py", directory]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_every_licence_file_is_passed_on(tmp_path: Path) -> None:
    install(tmp_path, "zebra", "MIT", LICENSE="Free as a zebra.", NOTICE="By Zoe.")
    install(tmp_path, "ant", "BSD-3-Clause", COPYING="Free as an ant.")
    install(tmp_path, "lazyfs", "Apache-2.0", LICENSE="Ours.")
    answer = notices(tmp_path)
    assert (answer.returncode, answer.stderr) == (0, "")
    wanted = ["ant 1.5", "Licence: BSD-3-Clause", "Free as an ant.",
              "zebra 1.5", "Licence: MIT", "Free as a zebra.", "By Zoe."]  # fmt: skip
    places = [answer.stdout.index(each) for each in wanted]
    assert places == sorted(places)
    assert "Ours." not in answer.stdout


def test_a_package_without_its_licence_ends_the_build(tmp_path: Path) -> None:
    install(tmp_path, "ant", "MIT", LICENSE="Free.")
    install(tmp_path, "bare", "MIT")
    answer = notices(tmp_path)
    assert answer.returncode == 1
    assert answer.stderr == "notices: bare ships no licence file: add its text\n"


def test_the_licence_is_the_one_that_the_package_names() -> None:
    root = Path(lazyfs.__file__).parents[1]
    assert (root / "LICENSE").read_text().lstrip().startswith("Apache License")
    assert 'license = "Apache-2.0"' in (root / "pyproject.toml").read_text()
    labels = (root / "Dockerfile").read_text() + (DEPLOY / "helm/lazyfs-csi/Chart.yaml").read_text()
    assert labels.count("Apache-2.0") == 2
