"""The health and metrics of a plugin over HTTP, for kubelet and Prometheus.

/healthz    200 as long as the process answers. For the liveness probe: a restart helps in no
            other case, and pauses every mount of the node.
/readyz     200, or 503 and the reason, as Probe. For the readiness probe.
/metrics    in the Prometheus text format
"""

from __future__ import annotations

import http.server
import logging
import socket
import socketserver
from collections.abc import Callable, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from csi.identity import Check
from lazyfs.errors import LazyfsError, OptionError
from lazyfs.faults import start_watching
from lazyfs.handover.keeper import KeeperError
from lazyfs.options.option_types import Address

log = logging.getLogger(__name__)

PATIENCE_S = 10.0


class HealthServer:
    """An HTTP server with the three pages, in threads that end with the process.

    Args:
        address: `HOST:PORT` or `:PORT`.
        checks: conditions for the plugin to be ready.
        mount_metrics: the metrics of all mounts of the plugin, as text.

    Raises:
        OptionError: the address is invalid, or the server cannot listen on it.
    """

    def __init__(
        self,
        address: str,
        checks: Sequence[Check],
        mount_metrics: Callable[[], str] = lambda: "",
    ) -> None:
        try:
            where = Address().parse(address)
        except ValueError:
            raise OptionError(
                f"--http-address: {address!r} is not allowed: {Address().allowed}"
            ) from None
        members = {"checks": checks, "mount_metrics": staticmethod(mount_metrics)}
        try:
            self._server = _HttpServer(where, type("Handler", (_Handler,), members))
        except OSError as error:
            raise OptionError(f"--http-address: {address}: {error.strerror}") from error
        self.port: int = self._server.server_address[1]

    def start(self) -> None:
        """Start answering."""
        start_watching("answering at --http-address", self._server.serve_forever)

    def stop(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()


class _HttpServer(http.server.ThreadingHTTPServer):
    """Without a host it listens on all IPv6 and IPv4 addresses, because clusters have either."""

    def __init__(self, where: tuple[str, int], handler: type[_Handler]) -> None:
        host, _ = where
        both = not host and socket.has_dualstack_ipv6()
        self.address_family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
        super().__init__(where, handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # HTTPServer's version asks DNS for our name, which may take long and which we do not need.
        socketserver.TCPServer.server_bind(self)


class _Handler(http.server.BaseHTTPRequestHandler):
    checks: Sequence[Check]
    mount_metrics: Callable[[], str]
    timeout = PATIENCE_S

    def do_GET(self) -> None:
        try:
            answer = self._answer()
        except Exception:
            log.exception("health: GET %s", self.path)
            answer = 500, b"a fault of the plugin; its log has more\n"
        self._send(*answer)

    def _answer(self) -> tuple[int, bytes] | tuple[int, bytes, str]:
        if self.path == "/healthz":
            return 200, b"ok\n"
        if self.path == "/readyz":
            try:
                for check in self.checks:
                    check()
            except (LazyfsError, KeeperError) as error:
                return 503, f"{error}\n".encode()
            return 200, b"ok\n"
        if self.path == "/metrics":
            text = generate_latest() + self.mount_metrics().encode()
            return 200, text, CONTENT_TYPE_LATEST
        return 404, b"/healthz, /readyz or /metrics\n"

    def _send(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        log.debug("health: " + format, *arguments)
