"""The pages for operators name what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from manifests import CHART, DEPLOY, ROOT, Object

PAGES = [
    *(ROOT / "docs" / name for name in ("INSTALL.md", "OPERATIONS.md", "MIGRATION.md")),
    DEPLOY / "examples" / "README.md",
]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda each: each.stem)


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@every_page
def test_metrics_exist(page: Path) -> None:
    known = (ROOT / "docs" / "OBSERVABILITY.md").read_text() + (ROOT / "docs/CSI.md").read_text()
    for name in re.findall(r"`(?:rate\()?(lazyfs_\w+)", page.read_text()):
        assert name in known, name


@every_page
def test_values_exist(page: Path) -> None:
    """`node.hostNetwork`, `controller.enabled=false` and the like are values of the chart."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    roots = "|".join(schema["properties"])
    for path in re.findall(rf"`((?:{roots})\.[A-Za-z.]+)(?:=\w+)?`", page.read_text()):
        assert _has(schema, path), path


def _has(schema: Object, path: str) -> bool:
    for name in path.split("."):
        if "properties" not in schema:
            return True  # free, such as volumes.defaults
        if name not in schema["properties"]:
            return False
        schema = schema["properties"][name]
    return True
