"""The context of a function that runs in a mover: descriptors, and the line of its call."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

# What is sent with a connection.
WIRE = b"wire"
# By name, as the worker lent them.
descriptors: dict[str, int] = {}
_of_thread = threading.local()


def lent(name: str) -> int:
    """A descriptor that the worker lent. Raises KeyError."""
    return descriptors[name]


def serve(line: socket.socket) -> None:
    """Record that this thread gets its calls over this line."""
    _of_thread.line = line


def line() -> socket.socket:
    """The line of this thread's call. The worker may send single words over it (`Nudge`)."""
    found: socket.socket = _of_thread.line
    return found


def tell(part: Any) -> None:
    """Give the worker a part of the call's result, before the function returns. Raises OSError."""
    _of_thread.line.send(json.dumps({"part": part}).encode())


def tell_wire(connection: socket.socket) -> None:
    """Give the worker the connection that this call waits for, so that it can watch and end it."""
    if getattr(_of_thread, "wire", None) is not connection:
        socket.send_fds(_of_thread.line, [WIRE], [connection.fileno()])
        _of_thread.wire = connection
