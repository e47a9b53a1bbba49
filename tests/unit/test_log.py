"""Whoever logs never waits for where the log goes."""

from __future__ import annotations

import io
import logging
import os
import threading
from collections.abc import Iterator

import pytest

from lazyfs import log
from lazyfs.log import MOST_LINES, LineWriter


class Stuck(io.StringIO):
    """A file on a disk that hangs, until it is told to answer."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = threading.Event()

    def write(self, text: str) -> int:
        assert self.answers.wait(60)
        return super().write(text)


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuck]:
    monkeypatch.setattr(log, "LAST_LINES_S", 0.05)
    made = Stuck()
    yield made
    made.answers.set()


def line(text: str) -> logging.LogRecord:
    return logging.LogRecord("lazyfs.x", logging.INFO, __file__, 1, text, None, None)


def test_nobody_waits_for_a_log_that_hangs(stuck: Stuck, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LineWriter(stuck)
    for number in range(MOST_LINES + 5):
        writer.handle(line(f"line {number}"))
    writer.flush()
    assert stuck.getvalue() == ""
    stuck.answers.set()
    monkeypatch.setattr(log, "LAST_LINES_S", 60.0)
    writer.flush()
    writer.handle(line("the last"))
    writer.flush()
    written = stuck.getvalue().splitlines()
    assert written[:2] == ["line 0", "... 5 lines of the log are lost"]
    assert written[2:] == [f"line {number}" for number in range(1, MOST_LINES)] + ["the last"]


def test_a_process_ends_with_its_last_lines_written(capfd: pytest.CaptureFixture[str]) -> None:
    """Also one that was forked, which has no thread of its parent."""
    writer = LineWriter(open(2, "w", closefd=False))  # noqa: SIM115
    writer.handle(line("before"))
    writer.flush()
    child = os.fork()
    if child == 0:
        try:
            writer.handle(line("in the child"))
            writer.flush()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert capfd.readouterr().err == "before\nin the child\n"


def test_a_log_that_fails_loses_lines_and_says_how_many() -> None:
    class Full(io.StringIO):
        is_full = True

        def write(self, text: str) -> int:
            if self.is_full:
                raise OSError(28, "No space left on device")
            return super().write(text)

    stream = Full()
    writer = LineWriter(stream)
    for text in ("one", "two"):
        writer.handle(line(text))
    writer.flush()
    stream.is_full = False
    writer.handle(line("three"))
    writer.flush()
    assert stream.getvalue().splitlines() == ["... 2 lines of the log are lost", "three"]
