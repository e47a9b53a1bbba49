"""How the conversation with the kernel begins."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pyfuse3
import pytest

from lazyfs.fuse.filesystem import Filesystem
from lazyfs.fuse.session import ASYNC_DIRECT, MAX_BACKGROUND, Session, with_idmap, with_limits
from lazyfs.movers.pool import Movers

FLAGS = 1 << 7 | 1 << 8 | 1 << 9 | ASYNC_DIRECT | 1


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
def test_only_flags_that_the_kernel_offers_are_set(asked: bytes) -> None:
    assert with_idmap(asked, answer(OTHER, 0)) == answer(OTHER, 0)


def limits(read_ahead_bytes: int) -> tuple[int, int, int, int]:
    """Read-ahead, flags, background limit and threshold of the answer."""
    before = answer(FLAGS, 0)
    message = with_limits(before, read_ahead_bytes)
    assert (message[:24], message[36:]) == (before[:24], before[36:])
    return struct.unpack_from("<IIHH", message, 24)


def test_the_kernel_gets_our_limits() -> None:
    answered = limits(1 << 20)
    assert answered == (
        1 << 20, FLAGS & ~ASYNC_DIRECT, MAX_BACKGROUND, MAX_BACKGROUND * 3 // 4
    )  # fmt: skip


def test_read_ahead_is_not_made_smaller_than_libfuse_allows() -> None:
    assert limits(64 << 10)[0] == 128 << 10


def test_a_session_that_began_or_ended_is_not_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter((os.strerror(2), os.strerror(19)))

    def write(_: int, __: bytes) -> int:
        text = next(answers)
        raise OSError(2 if text == os.strerror(2) else 19, text)

    monkeypatch.setattr(os, "write", write)
    for _ in range(2):
        Session(Path("/mnt"), 0, question(0, 0)).answer(answer(FLAGS, 0), 1 << 20)


def test_libfuse_moves_no_messages_by_splice(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bytes] = []

    def init(_: object, path: str, __: object) -> None:
        with socket.socket(fileno=int(Path(path).name)) as libfuse:
            given.append(os.dup(libfuse.fileno()).to_bytes(4, "little"))

    monkeypatch.setattr(pyfuse3, "init", init)
    message = struct.pack("<40xIIII", 7, 45, 128 << 10, FLAGS)
    filesystem = cast(Filesystem, SimpleNamespace(read=None, read_arrives=None, answers_empty=None))
    Session(Path("/mnt"), 0, message).attach(filesystem, Movers(0))
    with socket.socket(fileno=int.from_bytes(given[0], "little")) as libfuse:
        got = libfuse.recv(1 << 16)
    assert struct.unpack_from("<I", got, 52) == (1 << 15 | 1,)
