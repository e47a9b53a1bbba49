"""What is said of the conversation with the kernel."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pyfuse3
import pytest

from lazyfs.fuse.session import Session


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Session, int]]:
    """A session whose kernel is a pipe, and the descriptor with which it ends."""
    kernel, ours = os.pipe()
    monkeypatch.setattr(pyfuse3, "init", lambda *_: None)
    made = Session(Path("/mnt"), ours, b"init")
    logger = logging.getLogger("pyfuse3")
    before = list(logger.filters)
    made.attach(pyfuse3.Operations())
    yield made, kernel
    logger.filters[:] = before
    made.close()


def test_answers_that_come_too_late_are_no_errors(
    session: tuple[Session, int], caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever unmounts while a read is answered sees nothing of it; all else is told."""
    log, text = logging.getLogger("pyfuse3"), "fuse_read(): fuse_reply_* failed with %s"
    log.error(text, "No such file or directory")
    os.close(session[1])
    log.error(text, "No such file or directory")
    log.error(text, "Invalid argument")
    assert [record.args for record in caplog.records] == [
        ("No such file or directory",),
        ("Invalid argument",),
    ]
