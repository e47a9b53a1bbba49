"""Ending a request from another thread."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator

# tcpi_bytes_received in struct tcp_info (linux/tcp.h).
_TCP_INFO = struct.Struct("=128xQ")


class CancelledError(Exception):
    """Another thread cancelled the request."""


class Cancel:
    """Lets another thread end a request: the thread that waits for the server wakes up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        # The last connection, and what had come over it before this request.
        self._counted: socket.socket | None = None
        self._came_before = 0
        self.called = False

    def __call__(self) -> None:
        """End the request, whether it has begun or not; no effect after its end."""
        with self._lock:
            self.called = True
            if self._socket is not None:
                with contextlib.suppress(OSError):  # the server closed it first
                    # With TLS, too, only the socket: the TLS state belongs to the other thread.
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def use(self, connection: socket.socket | None) -> None:
        """Set the connection that another process waits for; None: it waits no longer."""
        with self._lock:
            self._take(connection)
            if self.called and connection is not None:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def received_bytes(self) -> int | None:
        """The bytes that the request has received over its connection, with those of its head.

        None: there is no connection now, or the kernel does not tell (before Linux 4.1).
        """
        with self._lock:
            came = None if self._socket is None else _received_over(self._socket)
            return None if came is None else came - self._came_before

    @contextlib.contextmanager
    def watching(self, connection: socket.socket) -> Iterator[None]:
        """While this is entered, the request uses this connection.

        Raises:
            CancelledError: instead of any result or error, after the request was ended.
        """
        try:
            with self._lock:
                self._take(connection)
                if self.called:
                    raise CancelledError
            yield
        except Exception as error:
            if self.called:
                raise CancelledError from error
            raise
        finally:
            with self._lock:
                self._socket = None
        if self.called:  # the received data may be truncated
            raise CancelledError

    def _take(self, connection: socket.socket | None) -> None:
        self._socket = connection
        if connection is not None and connection is not self._counted:
            self._counted = connection
            self._came_before = _received_over(connection) or 0


def _received_over(connection: socket.socket) -> int | None:
    """The bytes that have come over a connection since it was made; None: it is not known."""
    with contextlib.suppress(OSError, struct.error):
        told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        return int(_TCP_INFO.unpack(told)[0])
    return None
