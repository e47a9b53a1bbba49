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

import trio

from lazyfs.control import Route
from lazyfs.faults import contained
from lazyfs.handover.keeper import is_trusted

# A client that neither sends a request nor hangs up is disconnected.
PATIENCE_S = 10.0


async def serve_control(listening: socket.socket, routes: Mapping[tuple[str, str], Route]) -> None:
    """Serve on a unix socket until cancelled.

    Args:
        listening: the supervisor made it. It stays open, for a server after one that failed.
        routes: by method and path, such as `("GET", "/status")`.
    """
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening.dup()))
    await serve_http([listener], routes, trusts=_is_ours)


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
