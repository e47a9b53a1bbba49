"""Text that is not ours, wherever it is shown."""

from __future__ import annotations

import json
import logging

import pytest

from lazyfs.cli.tables import print_rows
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
def test_what_cannot_be_printed_is_escaped(text: str, shown: str) -> None:
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


def test_a_table_shows_names_and_does_not_obey_them(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([("waiting now", f"python{EVIL}")])
    shown = capsys.readouterr().out
    assert all(line.isprintable() for line in shown.split("\n"))
    assert "\\x1b]0;owned" in shown
