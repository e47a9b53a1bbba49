"""HTTP of a worker: its control socket, which only its user and root can use, and its metrics.

One request a connection. Answers are JSON, or text where a route gives text; an error is
`{"error": "one line"}` with status 400 (the request), 404, 413 or 500; with `exit_code` beside it
if it is one that the command line would show.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import trio

from lazyfs.control import Route
from lazyfs.handover.keeper import is_trusted

# A client that neither asks nor hangs up is let go.
PATIENCE_S = 10.0


async def serve_control(
    path: Path,
    routes: Mapping[tuple[str, str], Route],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer at a unix socket until cancelled.

    Args:
        path: of the socket; what is there is replaced: the mount's lock is this process's.
        routes: by method and path, such as `("GET", "/status")`.
    """
    path.unlink(missing_ok=True)
    listener = trio.socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)
    try:
        await listener.bind(str(path))
    finally:
        os.umask(mask)
    listener.listen()
    task_status.started()
    await serve_http([trio.SocketListener(listener)], routes, trusts=_is_ours)


async def serve_http(
    listeners: list[trio.SocketListener],
    routes: Mapping[tuple[str, str], Route],
    *,
    trusts: Callable[[trio.SocketStream], bool] = lambda stream: True,
) -> None:
    """Answer requests until cancelled.

    Args:
        trusts: whether a client is answered at all.
    """
    await trio.serve_listeners(partial(_answer_one, routes, trusts), listeners)


def _is_ours(stream: trio.SocketStream) -> bool:
    # SO_PEERCRED is asked of a plain socket; this is the same one.
    with socket.socket(fileno=os.dup(stream.socket.fileno())) as peer:
        return is_trusted(peer)


async def _answer_one(
    routes: Mapping[tuple[str, str], Route],
    trusts: Callable[[trio.SocketStream], bool],
    stream: trio.SocketStream,
) -> None:
    from lazyfs.control.conversation import converse  # loaded when the first client comes

    with trio.move_on_after(PATIENCE_S):
        if trusts(stream):
            await converse(stream, routes)
    await trio.aclose_forcefully(stream)
