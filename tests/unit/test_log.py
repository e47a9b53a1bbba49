"""Whoever logs never waits for where the log goes."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyfs import log
from lazyfs.log import MOST_LINES, JsonFormatter, LineWriter

LOSS = "lines of the log that are lost here"


class Stuck:
    """A log that hangs, until it is read: a pipe that is full.

    Attributes:
        descriptor: for the writer.
    """

    def __init__(self) -> None:
        self._reader, self.descriptor = os.pipe()
        self._filled = fcntl.fcntl(self.descriptor, fcntl.F_SETPIPE_SZ, 4096)
        os.write(self.descriptor, b"." * self._filled)

    def answer(self) -> None:
        """Take what is written from now on."""
        self._content = b""
        self._reading = threading.Thread(target=self._read)
        self._reading.start()

    def _read(self) -> None:
        while part := os.read(self._reader, 1 << 16):
            self._content += part

    def lines(self) -> list[str]:
        """What was written; ends it."""
        os.close(self.descriptor)
        self._reading.join()
        os.close(self._reader)
        return self._content[self._filled :].decode().splitlines()


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    """Of an empty file."""
    with open(tmp_path / "log", "w") as file:
        yield file.fileno()


def content(descriptor: int) -> list[str]:
    return Path(f"/proc/self/fd/{descriptor}").read_text().splitlines()


def line(text: str) -> logging.LogRecord:
    return logging.LogRecord("lazyfs.x", logging.INFO, __file__, 1, text, None, None)


def test_nobody_waits_for_a_log_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "LAST_LINES_S", 0.05)
    stuck = Stuck()
    writer = LineWriter(stuck.descriptor)
    for number in range(MOST_LINES + 5):
        writer.handle(line(f"line {number}"))
    writer.flush()
    stuck.answer()
    monkeypatch.setattr(log, "LAST_LINES_S", 60.0)
    writer.flush()
    writer.handle(line("the last"))
    writer.flush()
    assert stuck.lines() == [
        *(f"line {number}" for number in range(MOST_LINES)), f"{LOSS}: 5", "the last",
    ]  # fmt: skip


def test_a_process_ends_with_its_last_lines_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was forked while a line was written, which has no thread of its parent."""
    monkeypatch.setattr(log, "LAST_LINES_S", 60.0)
    stuck = Stuck()
    writer = LineWriter(stuck.descriptor)
    writer.handle(line("in the parent"))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            writer.handle(line("in the child"))
            writer.flush()
            code = 0
        finally:
            os._exit(code)
    stuck.answer()
    assert os.waitpid(child, 0)[1] == 0
    writer.flush()
    assert sorted(stuck.lines()) == ["in the child", "in the parent"]


def test_a_log_that_fails_loses_lines_and_says_how_many(tmp_path: Path) -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    writer = LineWriter(descriptor)
    writer.setFormatter(JsonFormatter())
    for text in ("one", "two"):
        writer.handle(line(text))
        writer.flush()
    with open(tmp_path / "log", "w") as file:
        os.dup2(file.fileno(), descriptor)
    writer.handle(line("three"))
    writer.flush()
    said = [json.loads(text)["message"] for text in content(descriptor)]
    assert said == [f"{LOSS}: 2", "three"]
    os.close(descriptor)


def test_a_line_that_was_written_in_part_is_ended(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, steps = os.write, [3, 0]

    def write_some(file: int, data: bytes) -> int:
        size = steps.pop(0) if steps and file == descriptor else len(data)
        if not size:
            raise OSError(28, "No space left on device")
        return write(file, data[:size])

    monkeypatch.setattr(os, "write", write_some)
    writer = LineWriter(descriptor)
    for text in ("one line", "another"):
        writer.handle(line(text))
        writer.flush()
    assert content(descriptor) == ["one", f"{LOSS}: 1", "another"]


def test_a_log_goes_on_where_no_thread_can_be_started(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    writer = LineWriter(descriptor)
    with monkeypatch.context() as without:
        without.setattr(threading.Thread, "start", refuse)
        writer.handle(line("one"))
        assert content(descriptor) == ["one"]
    writer.handle(line("two"))
    writer.flush()
    assert content(descriptor) == ["one", "two"]
