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
            self._socket = connection
            if self.called and connection is not None:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def received_bytes(self) -> int | None:
        """The bytes received over the connection of the request so far.

        None: there is no connection now, or the kernel does not tell (before Linux 4.1).
        """
        with self._lock, contextlib.suppress(OSError, struct.error):
            if self._socket is not None:
                told = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
                return int(_TCP_INFO.unpack(told)[0])
        return None

    @contextlib.contextmanager
    def watching(self, connection: socket.socket) -> Iterator[None]:
        """While this is entered, the request uses this connection.

        Raises:
            CancelledError: instead of any result or error, after the request was ended.
        """
        try:
            with self._lock:
                self._socket = connection
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
