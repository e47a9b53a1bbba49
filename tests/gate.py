"""A door in front of a server: closed, its port refuses; stuck, its connections are silent."""

from __future__ import annotations

import contextlib
import socket
import threading
from urllib.parse import urlsplit

from ports import free_port


class Gate:
    """Passes TCP connections on to a server, as long as it is open.

    Args:
        url: of the server.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._behind = (parts.hostname or "", parts.port or 0)
        self._listener: socket.socket | None = None
        self._connections: list[socket.socket] = []
        self._passing = threading.Event()
        self._port = free_port()
        self.open()
        self.url = f"{parts.scheme}://127.0.0.1:{self._port}"

    def open(self) -> None:
        """Let connections through."""
        self._passing.set()
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self._port))
            threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()

    def stick(self) -> None:
        """Let nothing through, without a word, on connections old and new."""
        self._passing.clear()

    def close(self) -> None:
        """Break all connections, and refuse new ones."""
        if self._listener is not None:
            # Wakes the thread that accepts, which close() alone does not.
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        self._passing.set()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._connections.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(self._behind)
                self._connections += [client, server]
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._pass, args=[source, sink], daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 18):
                self._passing.wait()
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
