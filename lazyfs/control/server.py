"""HTTP of a worker: its control socket, which only its user and root can use, and its metrics.

One request a connection. Answers are JSON, or text where a route gives text; an error is
`{"error": "one line"}` with status 400 (the request), 404, 413 or 500; with `exit_code` beside it
if it is one that the command line would show.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import socket
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import h11
import trio

from lazyfs.errors import LazyfsError
from lazyfs.mount.keeper import is_trusted

log = logging.getLogger(__name__)

LONGEST_BODY = 1 << 16
# A client that neither asks nor hangs up is let go.
PATIENCE_S = 10.0

# Answers a request: it gets the body, a JSON object, and returns what is sent as JSON, or text; or
# something to be awaited that gives it.
Route = Callable[[dict[str, Any]], Any]
# What Prometheus calls its text format.
TEXT = "text/plain; version=0.0.4; charset=utf-8"


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
    with trio.move_on_after(PATIENCE_S):
        try:
            if trusts(stream):
                await _converse(stream, routes)
        except (trio.BrokenResourceError, h11.RemoteProtocolError) as error:
            log.debug("control: %s", error)
    await trio.aclose_forcefully(stream)


async def _converse(stream: trio.SocketStream, routes: Mapping[tuple[str, str], Route]) -> None:
    connection = h11.Connection(h11.SERVER)
    request: h11.Request | None = None
    body = b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(LONGEST_BODY))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
            if len(body) > LONGEST_BODY:
                status, answer = 413, {"error": f"more than {LONGEST_BODY} bytes"}
                break
        elif isinstance(event, h11.EndOfMessage):
            assert request is not None
            status, answer = await _answer(request, body, routes)
            break
        else:
            return  # the client hung up
    text = isinstance(answer, str)
    content = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode() + b"\n"
    headers = [
        ("Content-Type", TEXT if text else "application/json"),
        ("Content-Length", str(len(content))),
        ("Connection", "close"),
    ]
    for event in (
        h11.Response(status_code=status, headers=headers),
        h11.Data(data=content),
        h11.EndOfMessage(),
    ):
        await stream.send_all(connection.send(event) or b"")


async def _answer(
    request: h11.Request, body: bytes, routes: Mapping[tuple[str, str], Route]
) -> tuple[int, Any]:
    method, path = request.method.decode(), request.target.decode().partition("?")[0]
    route = routes.get((method, path))
    if route is None:
        known = ", ".join(" ".join(each) for each in sorted(routes))
        return 404, {"error": f"no such request: {method} {path}; there are {known}"}
    try:
        content = json.loads(body) if body else {}
        if not isinstance(content, dict):
            raise ValueError("not an object")
        answer = route(content)
        return 200, await answer if inspect.isawaitable(answer) else answer
    except LazyfsError as error:
        return 400, {"error": str(error), "exit_code": error.exit_code}
    except ValueError as error:
        # Not the body itself: it may hold credentials.
        return 400, {"error": f"the body is not what {path} takes: {type(error).__name__}"}
    except Exception:
        log.exception("control: %s %s", method, path)
        return 500, {"error": "the daemon failed; its log says how"}
