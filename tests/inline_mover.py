"""Movers that are threads of this process, so that a test sees and changes what they do."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from lazyfs.blocks import buffers
from lazyfs.movers import pool, process
from lazyfs.movers.mover import Mover
from lazyfs.movers.pool import Movers


class _Process:
    """In the place of a process. It ends with its control socket."""

    pid = 0  # there is none
    returncode = None

    def poll(self) -> None: ...

    def kill(self) -> None: ...

    def wait(self) -> int:
        return 0


def _started(arena: int, lent: Mapping[str, int]) -> Any:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    memory = process._Memory(arena)

    def serve_lines() -> None:
        with theirs:
            while True:
                message, descriptors, _, _ = socket.recv_fds(theirs, 16, 1)
                if not message:
                    return
                line = socket.socket(fileno=descriptors[0])
                threading.Thread(target=process._serve, args=[line, memory], daemon=True).start()

    threading.Thread(target=serve_lines, daemon=True).start()
    return Mover(_Process(), ours)  # type: ignore[arg-type]


@contextlib.contextmanager
def inline_mover() -> Iterator[Movers]:
    """One mover, whose functions run in threads of this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "start_mover", _started)
        movers = Movers(1)
        try:
            yield movers
        finally:
            movers.close()
            buffers.share(None)
