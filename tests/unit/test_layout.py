"""The plan of the house: a package imports from packages below it only.

`LAYERS` is the order, from the bottom up. What is here is also the table of contents of
`docs/ARCHITECTURE.md`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "lazyfs"
# The bottom: errors, logging, objects, memory files and helper processes. Any package may use them.
FOUNDATION = "."
LAYERS = (
    FOUNDATION, "options", "model", "blocks", "movers", "observe", "store", "namespace",
    "pagecache", "cache", "prefetch", "fetch", "fleet", "handover", "fuse", "control", "process",
    "cli",
)  # fmt: skip
# Pure packages and modules: plain values in, plain values out.
PURE = (
    "model", "blocks/__init__.py", "blocks/block_map.py", "blocks/file_blocks.py",
    "blocks/memory.py", "namespace/tree.py", "prefetch/prefetcher.py",
)  # fmt: skip
DOES_IO = ("os", "socket", "subprocess", "threading", "trio", "time", "http", "ssl", "botocore")


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> Iterator[str]:
    """The modules that a file names in import statements, wherever they stand in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports are not used here"
            module = node.module or ""
            for alias in node.names:
                below = ROOT / f"{module}.{alias.name}".replace(".", "/")
                is_module = below.with_suffix(".py").exists() or below.is_dir()
                yield f"{module}.{alias.name}" if is_module else module


def _layer(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (ROOT / PACKAGE / parts[1]).is_dir() else FOUNDATION


def _files() -> list[Path]:
    return [path for path in (ROOT / PACKAGE).rglob("*.py") if path.name != "__main__.py"]


def test_every_package_has_a_layer() -> None:
    found = {path.name for path in (ROOT / PACKAGE).iterdir() if (path / "__init__.py").exists()}
    assert found == set(LAYERS) - {FOUNDATION}


def test_the_table_of_packages_has_their_order() -> None:
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    table = text[text.index("\n| package |") : text.index("\n| beside them |")]
    assert re.findall(r"^\| `(\w+)/`", table, re.MULTILINE) == list(LAYERS[:0:-1])


def test_imports_run_downwards() -> None:
    upward = {
        (_module_name(path), imported)
        for path in _files()
        for imported in _imports(path)
        if imported.startswith(f"{PACKAGE}.")
        and LAYERS.index(_layer(imported)) > LAYERS.index(_layer(_module_name(path)))
    }
    assert upward == set(), "move what is shared down, or pass it in"


def test_lazyfs_does_not_know_the_driver() -> None:
    assert not [path for path in _files() for name in _imports(path) if name.startswith("csi")]


def test_there_are_no_import_cycles() -> None:
    """Modules that import each other, however far around, cannot be understood alone."""
    modules = {_module_name(path): path for path in _files()}
    needs = {name: set(_imports(path)) for name, path in modules.items()}

    def reaches(start: str) -> set[str]:
        found: set[str] = set()
        ahead = [start]
        while ahead:
            new = (needs[ahead.pop()] & modules.keys()) - found
            found |= new
            ahead += new
        return found

    assert {name for name in modules if name in reaches(name)} == set()


@pytest.mark.parametrize("place", PURE)
def test_pure_packages_do_no_io(place: str) -> None:
    here = ROOT / PACKAGE / place
    found = [
        f"{path.relative_to(ROOT)}: {imported}"
        for path in (here.rglob("*.py") if here.is_dir() else [here])
        for imported in _imports(path)
        if imported.split(".")[0] in DOES_IO
    ]
    assert found == []
