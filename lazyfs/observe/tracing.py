"""OpenTelemetry traces of mounts, requests to S3, first loads and CSI calls.

OpenTelemetry is imported only if its own environment variables ask for traces: an OTLP endpoint, or
`OTEL_TRACES_EXPORTER=otlp`
(https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/). It needs the
extra `otel`.

Attribute names follow the semantic conventions for AWS calls and RPCs, where there are any
(https://opentelemetry.io/docs/specs/semconv/).
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

log = logging.getLogger(__name__)

# A process that ends waits at most this long for the collector.
LAST_SPANS_S = 2.0
# Limit on spans of requests to S3, because a load makes hundreds per second.
REQUESTS_PER_S = 20.0
MOST_REQUESTS_AT_ONCE = 200
PARENT = "TRACEPARENT"

Attributes = Mapping[str, str | int | float | bool]


def traces_requested(environment: Mapping[str, str]) -> bool:
    """Whether the environment variables ask for traces."""
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if exporters := environment.get("OTEL_TRACES_EXPORTER"):
        return "otlp" in exporters.split(",")
    return any(environment.get(f"OTEL_EXPORTER_OTLP_{name}ENDPOINT") for name in ("", "TRACES_"))


def tracer(service: str, **resource: str) -> Tracer | None:
    """The tracer of this process; None if traces are not asked for or not possible.

    Args:
        service: name of the service, unless the environment sets one.
        resource: further resource attributes.
    """
    if not traces_requested(os.environ):
        return None
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get(
        "OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"
    )
    if protocol != "http/protobuf":
        log.warning("no traces: OTLP over %s is not supported, only http/protobuf", protocol)
        return None
    try:
        return Tracer(service, resource)
    except ImportError as error:
        log.warning("no traces: %s is missing: pip install 'lazyfs[otel]'", error.name)
        return None


def child_environment() -> dict[str, str]:
    """Environment for a child process that continues the current span.

    As in https://opentelemetry.io/docs/specs/otel/context/env-carriers/.
    """
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return {**os.environ, **{name.upper(): text for name, text in carrier.items()}}


class Tracer:
    """Makes the spans of one process and sends them in batches, from a thread of its own.

    Raises:
        ImportError: OpenTelemetry is not installed.
    """

    def __init__(self, service: str, resource: Mapping[str, str]) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        from lazyfs import __version__

        # Of an unreachable collector, log the final error only, not each attempt.
        logging.getLogger("opentelemetry").setLevel(logging.ERROR)
        ours = {"service.name": service, "service.version": __version__, **resource}
        # The environment takes precedence.
        described = Resource.create(ours).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=described, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("lazyfs", __version__)
        self._parent: Any = None
        self._room = float(MOST_REQUESTS_AT_ONCE)
        self._asked_at_s = time.monotonic()
        self._left_out = 0

    @contextlib.contextmanager
    def during(self, name: str, attributes: Attributes) -> Iterator[Any]:
        """A server span for the duration of the `with` block. Yields it for `set_attribute`."""
        from opentelemetry.trace import SpanKind

        with self._tracer.start_as_current_span(
            name, kind=SpanKind.SERVER, attributes=attributes
        ) as span:
            yield span

    def begin(self, name: str, began_s: float, attributes: Attributes) -> Any:
        """Start a span at `began_s`. Later spans become its children. The caller ends it.

        Its own parent comes from `TRACEPARENT` in the environment.
        """
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {PARENT.lower(): text} if (text := os.environ.get(PARENT)) else {}
        above = TraceContextTextMapPropagator().extract(carrier)
        span = self._tracer.start_span(
            name, context=above, start_time=_since_epoch_ns(began_s), attributes=attributes
        )
        self._parent = set_span_in_context(span)
        return span

    def span(self, name: str, began_s: float, ended_s: float, attributes: Attributes) -> None:
        """Record a span that has ended."""
        span = self._tracer.start_span(
            name, context=self._parent, start_time=_since_epoch_ns(began_s), attributes=attributes
        )
        span.end(_since_epoch_ns(ended_s))

    def request(self, operation: str, began_s: float, key: str, size: int, *, failed: bool) -> None:
        """Record a request to S3 that has just ended, unless the limit on spans is reached."""
        from opentelemetry.trace import SpanKind

        now_s = time.monotonic()
        room = self._room + (now_s - self._asked_at_s) * REQUESTS_PER_S
        self._room, self._asked_at_s = min(room, MOST_REQUESTS_AT_ONCE), now_s
        if self._room < 1:
            self._left_out += 1
            return
        self._room -= 1
        method = {"get": "GetObject", "list": "ListObjectsV2"}.get(operation, operation)
        span = self._tracer.start_span(
            f"S3.{method}", context=self._parent, kind=SpanKind.CLIENT,
            start_time=_since_epoch_ns(began_s),
            attributes={
                "rpc.system": "aws-api", "rpc.service": "S3", "rpc.method": method,
                "aws.s3.key": key, "http.response.body.size": size,
            },
        )  # fmt: skip
        if self._left_out:
            span.set_attribute("lazyfs.requests_left_out", self._left_out)
            self._left_out = 0
        if failed:
            self.mark_failed(span)
        span.end(_since_epoch_ns(now_s))

    def mark_failed(self, span: Any) -> None:
        """Set the status of a span to error."""
        from opentelemetry.trace import Status, StatusCode

        span.set_status(Status(StatusCode.ERROR))

    def finish(self) -> None:
        """Send the remaining spans, for at most `LAST_SPANS_S`."""
        # In a thread, because the exporter retries for longer than its timeout.
        sender = threading.Thread(target=self._provider.force_flush, daemon=True)
        sender.start()
        sender.join(LAST_SPANS_S)


def _since_epoch_ns(at_s: float) -> int:
    """Convert a monotonic time to nanoseconds since the epoch."""
    return time.time_ns() - int((time.monotonic() - at_s) * 1e9)
