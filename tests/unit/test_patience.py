"""Calls that may wait for a disk that hangs."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent import futures
from pathlib import Path

import pytest

from lazyfs import patience
from lazyfs.patience import in_thread


def refuse() -> None:
    raise OSError(30, "Read-only file system")


IN_TIME = """
import os, sys
from lazyfs.patience import in_child

def refuse():
    raise OSError(30, "Read-only file system")

assert in_child(lambda: os.mkdir(sys.argv[1]))
assert in_child(refuse), "the caller makes the call again, and gets the reason"
"""
HANGS = """
import os, time
from lazyfs import patience

patience.PATIENCE_S = 0.2
read, write = os.pipe()

def hang():
    try:
        os.fstat(write)
    except OSError:
        time.sleep(600)

assert not patience.in_child(hang)
os.close(write)
assert os.read(read, 1) == b"", "nobody waits for the end of its outputs"
assert os.WTERMSIG(os.waitpid(-1, 0)[1]) == 9, "it ends as soon as it can"
"""


def alone(code: str, *arguments: object) -> None:
    """Run code in a process without other threads: those of gRPC do not survive a fork."""
    subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)], check=True, timeout=60
    )


def test_a_call_that_comes_back_is_in_time(tmp_path: Path) -> None:
    alone(IN_TIME, tmp_path / "made")
    assert (tmp_path / "made").is_dir()
    assert in_thread("a", refuse)


def test_nobody_waits_for_a_child_that_hangs() -> None:
    alone(HANGS)


def test_one_call_at_a_time_waits_for_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PATIENCE_S", 0.2)
    answers, made = threading.Event(), []

    def ask() -> None:
        made.append(1)
        assert answers.wait(60)

    assert not in_thread("disk", ask)
    assert not in_thread("disk", ask)
    assert len(made) == 1
    assert in_thread("another disk", refuse)
    answers.set()
    patience._begun["disk"][0].result(60)
    assert in_thread("disk", ask)
    assert len(made) == 2


def test_all_wait_for_a_call_that_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, made = threading.Event(), []

    def ask() -> None:
        made.append(1)
        assert answers.wait(60)

    monkeypatch.setattr(patience, "PATIENCE_S", 0.01)
    assert not in_thread("busy disk", ask)
    monkeypatch.setattr(patience, "PATIENCE_S", 60.0)
    wait = futures.wait

    def answer_and_wait(calls: list[futures.Future[object]], timeout_s: float) -> object:
        answers.set()
        return wait(calls, timeout_s)

    monkeypatch.setattr(futures, "wait", answer_and_wait)
    assert in_thread("busy disk", ask)
    assert len(made) == 1
