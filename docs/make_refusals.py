"""Writes the table of errors into `docs/S3.md`, from `lazyfs/store/refusals.py`.

Run by `make docs`; a test compares the page with what this prints (`--print`).
"""

from __future__ import annotations

import errno
import sys
from pathlib import Path

from lazyfs.errors import SourceError
from lazyfs.store.refusals import RULES, WITH_ANOTHER_CODE, WITHOUT_A_CODE

PAGE = Path(__file__).with_name("S3.md")
BEGIN = "<!-- errors: made by `make docs`, do not edit -->\n"
END = "<!-- end of errors -->\n"


def page() -> str:
    """The whole page with a fresh table."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


def table() -> str:
    """A row for each rule, and for what no rule names."""
    rows = [
        "| cause | error codes | HTTP status without a known code | a reader |\n|---|---|---|---|\n"
    ]
    for rule in RULES:
        codes = ", ".join(f"`{code}`" for code in rule.codes)
        statuses = ", ".join(map(str, rule.statuses))
        if statuses and not rule.uncoded:
            statuses += " (only with a code)"
        rows.append(f"| {rule.cause} | {codes} | {statuses} | {_reader(rule.error)} |\n")
    rows.append(
        f"| anything else that S3 says | any | below 500 | {_reader(WITH_ANOTHER_CODE)} |\n"
    )
    rows.append(
        "| no error code at all: a proxy or gateway answered | none | any other | "
        f"{_reader(WITHOUT_A_CODE)} |\n"
    )
    return "".join(rows)


def _reader(kind: type[SourceError]) -> str:
    name = errno.errorcode[kind.errno]
    return f"waits; `{name}` after `--io-timeout`" if kind.transient else f"`{name}` at once"


if __name__ == "__main__":
    if "--print" in sys.argv:
        print(page(), end="")
    else:
        PAGE.write_text(page())
