"""Writes the table of metrics into `docs/OBSERVABILITY.md`, from `lazyfs/observe/metrics.py`.

Run by `make docs`; a test compares the page with what this prints (`--print`).
"""

from __future__ import annotations

import sys
from pathlib import Path

from lazyfs.observe.metrics import METRICS

PAGE = Path(__file__).with_name("OBSERVABILITY.md")
BEGIN = "<!-- metrics: made by `make docs`, do not edit -->\n"
END = "<!-- end of metrics -->\n"


def page() -> str:
    """The whole page with a fresh table."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


def table() -> str:
    """A row for each metric."""
    rows = ["| metric | kind | labels | what it is |\n", "|---|---|---|---|\n"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        rows.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |\n")
    return "".join(rows)


if __name__ == "__main__":
    if "--print" in sys.argv:
        print(page(), end="")
    else:
        PAGE.write_text(page())
