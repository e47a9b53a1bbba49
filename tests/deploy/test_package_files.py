"""What the package brings beside the programs: the unit, the example, man pages, versions."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import yaml
from manifests import CHART, DEPLOY, ROOT

from lazyfs import __version__
from lazyfs.cli import COMMANDS, fstab, main
from lazyfs.cli.mounting import mount
from lazyfs.options.layers import config_layer, config_places
from lazyfs.options.mount_options import OPTIONS, MountOptions

PACKAGE = DEPLOY / "package"
EXAMPLE = PACKAGE / "example.toml"


def parse(command: str, arguments: list[str]) -> None:
    with click.Context(main) as parent:
        found = main.get_command(parent, command)
        assert found is not None
        found.make_context(command, arguments, parent=parent)


def test_the_unit_runs_existing_commands() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(PACKAGE / "lazyfs@.service")
    for key in ("ExecStart", "ExecReload"):
        program, command, *arguments = shlex.split(unit["Service"][key])
        assert program == "/usr/bin/lazyfs"
        assert "/etc/lazyfs/%i.toml" in arguments
        parse(command, arguments)


def test_the_package_has_the_files_of_a_fleet_where_its_unit_and_SCALE_expect_them() -> None:
    contents = yaml.safe_load((PACKAGE / "nfpm.yaml").read_text())["contents"]
    place = {each["src"]: each["dst"] for each in contents}
    doc = "/usr/share/doc/lazyfs/fleet"
    for name in ("fleet.toml", "fleet.members"):
        assert place[f"deploy/fleet/{name}"] == f"{doc}/{name}"
    unit = "deploy/fleet/lazyfs-fleet.service"
    assert place[unit] == "/usr/lib/systemd/system/lazyfs-fleet.service"
    parsed = configparser.RawConfigParser(strict=False)
    parsed.optionxform = str  # type: ignore[assignment, method-assign]
    parsed.read(ROOT / unit)
    program, command, *arguments = shlex.split(parsed["Service"]["ExecStart"])
    assert program == "/usr/bin/lazyfs"
    parse(command, arguments)
    assert doc in (ROOT / "docs" / "SCALE.md").read_text()
    assert "lazyfs-fleet.service" in (PACKAGE / "scripts" / "prerm").read_text()


def test_the_example_is_a_configuration(tmp_path: Path) -> None:
    """As it is, and with each line that it offers."""
    MountOptions.parse(("{name}", config_layer(EXAMPLE)))
    assert set(config_places(EXAMPLE)) == {"source", "mountpoint"}
    offered = re.findall(r"^# ([a-z-]+ = .+)$", EXAMPLE.read_text(), re.MULTILINE)
    assert len(offered) >= 3
    for line in offered:
        (tmp_path / "more.toml").write_text(line)
        MountOptions.parse(("{name}", config_layer(tmp_path / "more.toml")))


def test_the_fstab_line_is_valid() -> None:
    lines = (PACKAGE / "fstab.example").read_text().splitlines()
    (line,) = (line for line in lines if line and not line.startswith("#"))
    source, mountpoint, kind, options, *_ = line.split()
    assert kind == "lazyfs"
    arguments = fstab.translate([source, mountpoint, "-o", options])
    assert arguments is not None
    mount.make_context("mount", arguments[1:])


def test_man_pages_have_every_command_and_option(tmp_path: Path) -> None:
    subprocess.run([sys.executable, PACKAGE / "manual.py", tmp_path], check=True, timeout=60)
    pages = {path.stem: path.read_text() for path in (tmp_path / "man1").iterdir()}
    assert {"lazyfs", *(f"lazyfs-{name}" for name in COMMANDS)} <= set(pages)
    helper = (tmp_path / "man8" / "mount.lazyfs.8").read_text()
    for option in OPTIONS:
        name = option.name.replace("-", "\\-")
        assert f"\\-\\-{name}" in pages["lazyfs-mount"], name
        assert f" {name}" in helper, name
    assert not any("\b" in page for page in pages.values())
    if groff := shutil.which("groff"):
        for page in (tmp_path / "man1").iterdir():
            answer = subprocess.run(
                [groff, "-man", "-Tutf8", "-ww", page], capture_output=True, check=True, timeout=60
            )
            assert answer.stdout


@pytest.mark.parametrize(
    "file", sorted((PACKAGE / "scripts").iterdir()), ids=lambda each: each.name
)
def test_scripts_of_the_package_are_valid(file: Path) -> None:
    subprocess.run(["sh", "-n", file], check=True, timeout=10)
    assert file.stat().st_mode & 0o111


def test_all_files_have_the_same_version() -> None:
    """It is written in lazyfs/__init__.py; the chart and the changelog must name it too."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__
    changes = (ROOT / "CHANGELOG.md").read_text().splitlines()
    newest = next(line for line in changes if line.startswith("## "))
    assert newest.split()[1] == __version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "lazyfs.__version__"
