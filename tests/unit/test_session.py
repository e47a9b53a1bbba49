"""What is said of the conversation with the kernel."""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pyfuse3
import pytest

from lazyfs.fuse.session import Session, with_idmap


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


def question(flags: int, flags2: int) -> bytes:
    """FUSE_INIT as of linux/fuse.h: a header, then fuse_init_in."""
    header = struct.pack("=IIQQIIIHH", 104, 26, 2, 0, 0, 0, 0, 0, 0)
    return header + struct.pack("=IIIII11I", 7, 44, 1 << 17, flags, flags2, *[0] * 11)


def answer(flags: int, flags2: int) -> bytes:
    """The answer to it: a header, then fuse_init_out."""
    out = struct.pack(
        "=IIIIHHIIHHI7I", 7, 38, 1 << 17, flags, 12, 9, 1 << 20, 1, 256, 0, flags2, *[0] * 7
    )
    return struct.pack("=IiQ", 16 + len(out), 0, 2) + out


EXT, IDMAP, OTHER = 1 << 30, 1 << 8, 1 << 3


def test_idmapped_mounts_are_allowed_where_the_kernel_offers_them() -> None:
    assert with_idmap(question(EXT, IDMAP | 1), answer(OTHER, 0)) == answer(OTHER | EXT, IDMAP)
    before = answer(OTHER | EXT, 2)
    assert with_idmap(question(EXT, IDMAP), before) == answer(OTHER | EXT, 2 | IDMAP)


@pytest.mark.parametrize("asked", [question(EXT, 1), question(0, IDMAP), question(EXT, 0)[:56]])
def test_nothing_is_added_that_the_kernel_does_not_offer(asked: bytes) -> None:
    assert with_idmap(asked, answer(OTHER, 0)) == answer(OTHER, 0)
