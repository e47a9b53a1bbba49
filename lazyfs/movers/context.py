"""What a function knows that runs in a mover: descriptors, and the line that it was called over."""

from __future__ import annotations

import socket
import threading

# What is sent with a connection.
WIRE = b"wire"
# By name, as the worker lent them.
descriptors: dict[str, int] = {}
_of_thread = threading.local()


def lent(name: str) -> int:
    """A descriptor that the worker lent. Raises KeyError."""
    return descriptors[name]


def serve(line: socket.socket) -> None:
    """Calls of this thread come over this line."""
    _of_thread.line = line


def tell_wire(connection: socket.socket) -> None:
    """Let the worker watch, and end, the connection that this call waits for."""
    if getattr(_of_thread, "wire", None) is not connection:
        socket.send_fds(_of_thread.line, [WIRE], [connection.fileno()])
        _of_thread.wire = connection
