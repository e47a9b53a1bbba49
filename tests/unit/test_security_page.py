"""docs/SECURITY.md: each rule names code and tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "docs/SECURITY.md").read_text().partition("## What is enforced")[2]
RULES = [line.strip("| ").split(" | ") for line in TABLE.splitlines() if line.startswith("| ")][1:]
# Where names of files in the table may begin.
BASES = ("", "lazyfs", "tests", "tests/csi", "tests/unit", "tests/mount", "deploy/helm/lazyfs-csi")
TESTS = {
    name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE)
}


def is_file(name: str) -> bool:
    return any((ROOT / base / name).exists() for base in BASES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule[0][:60])
def test_a_rule_names_code_and_tests_that_exist(rule: list[str]) -> None:
    _, where, tests = rule
    places = re.findall(r"`([^`]+)`", where)
    files = [place for place in places if "/" in place or "." in place]
    assert files and [name for name in files if not is_file(name)] == []
    named = re.findall(r"`([^`]+)`", tests)
    assert named
    missing = [
        name for name in named if not (is_file(name) if name.endswith(".py") else name in TESTS)
    ]
    assert missing == []


def test_the_table_was_found() -> None:
    assert len(RULES) > 30
