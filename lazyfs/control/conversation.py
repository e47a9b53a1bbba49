"""One connection of a worker's HTTP server: a request and its answer."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping
from typing import Any

import h11
import trio

from lazyfs.control import Route
from lazyfs.errors import LazyfsError
from lazyfs.faults import report_fault

log = logging.getLogger(__name__)

LONGEST_BODY = 1 << 16
# The media type of Prometheus' text format.
TEXT = "text/plain; version=0.0.4; charset=utf-8"


async def converse(stream: trio.SocketStream, routes: Mapping[tuple[str, str], Route]) -> None:
    """Answer the request of a client, if it sends one."""
    try:
        await _converse(stream, routes)
    except (trio.BrokenResourceError, h11.RemoteProtocolError) as error:
        log.debug("control: %s", error)


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
    assert request is not None
    text = isinstance(answer, str)
    content = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode() + b"\n"
    headers = [
        ("Content-Type", TEXT if text else "application/json"),
        ("Content-Length", str(len(content))),
        ("Connection", "close"),
    ]
    # The answer to HEAD has the length of a body, and no body.
    data = [] if request.method == b"HEAD" else [h11.Data(data=content)]
    head = h11.Response(status_code=status, headers=headers)
    for event in (head, *data, h11.EndOfMessage()):
        await stream.send_all(connection.send(event) or b"")


async def _answer(
    request: h11.Request, body: bytes, routes: Mapping[tuple[str, str], Route]
) -> tuple[int, Any]:
    method, path = request.method.decode(), request.target.decode().partition("?")[0]
    route = routes.get(("GET" if method == "HEAD" else method, path))
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
        # Not the body itself: it may contain credentials.
        return 400, {"error": f"the body is not what {path} takes: {type(error).__name__}"}
    except Exception as error:
        report_fault(f"control: {method} {path}", error)
        return 500, {"error": "the daemon failed; its log says how"}
