"""A worker's HTTP server: the control socket, for its user and root only, and the metrics.

One request per connection. Answers are JSON, or text where a route gives text; an error is
`{"error": "one line"}` with status 400 (the request), 404, 413 or 500; with `exit_code` if
the command line should exit with it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import trio

from lazyfs.control import Route
from lazyfs.errors import MountError
from lazyfs.faults import contained
from lazyfs.handover.keeper import is_trusted

# A client that neither sends a request nor hangs up is disconnected.
PATIENCE_S = 10.0


async def listen_control(path: Path) -> trio.SocketListener:
    """Listen on a unix socket.

    Args:
        path: of the socket. An existing socket is replaced, because this process holds the mount's
            lock.

    Raises:
        MountError: the socket cannot be made.
    """
    listener = trio.socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)
    try:
        path.unlink(missing_ok=True)
        await listener.bind(str(path))
        listener.listen()
    except OSError as error:
        listener.close()
        raise MountError(f"{path}: the control socket cannot be made: {error}") from error
    finally:
        os.umask(mask)
    return trio.SocketListener(listener)


async def serve_control(
    path: Path,
    listeners: list[trio.SocketListener],
    routes: Mapping[tuple[str, str], Route],
) -> None:
    """Serve on a unix socket until cancelled.

    Args:
        path: of the socket.
        listeners: on it. If there are none, or they are closed, new ones are made.
        routes: by method and path, such as `("GET", "/status")`.
    """
    await serve_http(still_open(listeners) or [await listen_control(path)], routes, trusts=_is_ours)


def still_open(listeners: list[trio.SocketListener]) -> list[trio.SocketListener]:
    """The listeners that no failed server has closed."""
    return [listener for listener in listeners if listener.socket.fileno() >= 0]


async def serve_http(
    listeners: list[trio.SocketListener],
    routes: Mapping[tuple[str, str], Route],
    *,
    trusts: Callable[[trio.SocketStream], bool] = lambda stream: True,
) -> None:
    """Answer requests until cancelled.

    Args:
        trusts: says whether a client may send requests.
    """
    answer = partial(contained, "answering a client", _answer_one, routes, trusts)
    await trio.serve_listeners(answer, listeners)


def _is_ours(stream: trio.SocketStream) -> bool:
    # SO_PEERCRED needs a plain socket; this is the same one.
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
