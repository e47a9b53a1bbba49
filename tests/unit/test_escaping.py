"""Text that is not ours, wherever it is shown."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

import lazyfs
from lazyfs.cli.messages import tell
from lazyfs.cli.tables import console, print_rows
from lazyfs.escaping import escaped
from lazyfs.log import JsonFormatter, TextFormatter, within

EVIL = "a\x1b]0;owned\x07\n2026-01-01 INFO all is well\x9b2J\u202egpj\u2028\r\udc80"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("modèle 模型.safetensors", "modèle 模型.safetensors"),
        ("a\x1b[2J", "a\\x1b[2J"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\x9b", "\\x9b"),
        ("\u202e", "\\u202e"),
        ("\udc80", "\\udc80"),
    ],
)
def test_unprintable_characters_are_escaped(text: str, shown: str) -> None:
    assert escaped(text) == shown


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_a_log_line_is_one_line(formatter: logging.Formatter) -> None:
    record = logging.LogRecord("lazyfs.x", logging.INFO, "", 1, "%s is odd", (EVIL,), None)
    with within({"volume": EVIL}):
        line = formatter.format(record)
    assert line.isprintable()
    if isinstance(formatter, JsonFormatter):
        fields = json.loads(line)
        assert fields["message"] == f"{escaped(EVIL)} is odd"
        assert fields["volume"] == escaped(EVIL)


def test_names_in_tables_are_not_interpreted_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([("waiting now", f"python{EVIL}")])
    shown = capsys.readouterr().out
    assert all(line.isprintable() for line in shown.split("\n"))
    assert "\\x1b]0;owned" in shown


def test_cells_titles_and_lines_are_not_interpreted_as_markup(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rich takes control characters out of strings, and leaves those in its own texts."""
    table = Table(title=Text(EVIL), caption=Text(EVIL))
    table.add_column(Text(EVIL))
    table.add_row(Text(EVIL, style="bold"))
    console().print(table, Text(EVIL), EVIL)
    tell(f"{EVIL} and\nmore")
    tell(EVIL, err=True)
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert all(line.isprintable() for line in text.split("\n"))
    assert "\\u202egpj" in shown.out and "\\x1b]0;owned" in shown.err


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_tracebacks_cannot_imitate_log_lines(formatter: logging.Formatter) -> None:
    try:
        raise ValueError(EVIL)
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 1, "failed", (), sys.exc_info())
    first, *trace = formatter.format(record).split("\n")
    assert all(line.isprintable() for line in (first, *trace))
    assert not any(line.startswith("2026") for line in trace)
    assert "ValueError" in first + "".join(trace)


def test_commands_print_only_through_messages_and_tables() -> None:
    """What they print may name objects, processes and sources, which others chose."""
    own = {"messages.py", "__init__.py", "completion.py", "fleet.py"}
    for path in (Path(lazyfs.__path__[0]) / "cli").glob("*.py"):
        if path.name not in own:
            assert not re.search(r"click\.s?echo\(|sys\.std(out|err)\.write", path.read_text()), (
                path
            )
