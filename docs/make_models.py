"""Writes the table of repositories into `docs/MODELS.md`, from `tests/data/repositories.toml`.

Run by `make docs`; a test compares the page with what this prints (`--print`).
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

PAGE = Path(__file__).with_name("MODELS.md")
TABLE = Path(__file__).parents[1] / "tests" / "data" / "repositories.toml"
BEGIN = "<!-- repositories: made by `make docs`, do not edit -->\n"
END = "<!-- end of repositories -->\n"


def page() -> str:
    """The whole page with a fresh table."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


def table() -> str:
    """A row for each repository."""
    rows = ["| repository | planned at mount, in this order | why |\n|---|---|---|\n"]
    for entry in tomllib.loads(TABLE.read_text())["repository"]:
        plan = ", ".join(f"`{path}`" for path in entry["plan"]) or "nothing"
        reads = entry.get("reads", [])
        if not set(reads) <= set(entry["plan"]):
            plan += "; when it is read: " + ", ".join(f"`{path}`" for path in reads)
        rows.append(f"| {entry['name']} | {plan} | {entry['why']} |\n")
    return "".join(rows)


if __name__ == "__main__":
    if "--print" in sys.argv:
        print(page(), end="")
    else:
        PAGE.write_text(page())
