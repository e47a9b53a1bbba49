"""An OpenTelemetry collector for tests: OTLP over HTTP on this machine."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Callable
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

TIMEOUT_S = 30


class Collector:
    """Keeps the spans that it is sent, as the messages of the protocol; `resources` by span id."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: dict[bytes, str] = {}
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/v1/traces":
                    collector._take(body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """What has a process send its spans here, soon."""
        port = self._server.server_address[1]
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }

    def named(self, name: str) -> list[Any]:
        """The spans of a name."""
        return [span for span in self.spans if span.name == name]

    def wait_for(self, name: str, found: Callable[[list[Any]], bool] = bool) -> list[Any]:
        """Wait until the spans of a name are as wanted; these."""
        deadline = time.monotonic() + TIMEOUT_S
        while not found(self.named(name)):
            assert time.monotonic() < deadline, sorted({span.name for span in self.spans})
            time.sleep(0.05)
        return self.named(name)

    def stop(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()

    def _take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = attributes(resource.resource)["service.name"]
            for scope in resource.scope_spans:
                self.spans += scope.spans
                self.services |= {span.span_id: service for span in scope.spans}


def attributes(of: Any) -> dict[str, Any]:
    """The attributes of a span or resource."""
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in of.attributes}
