"""Traces by OpenTelemetry: of a mount, its requests to S3 and its first load, and of CSI calls.

Nothing of it is imported unless the environment asks for it, by the variables that OpenTelemetry
itself defines (https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/):
an OTLP endpoint, or `OTEL_TRACES_EXPORTER=otlp`. It needs the extra `otel`.

Names of attributes are those of the semantic conventions for AWS calls and RPCs, where there are
such (https://opentelemetry.io/docs/specs/semconv/).
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

# The end of a process waits no longer than this for the collector.
LAST_SPANS_S = 2.0
# Requests to S3 that become spans: a load makes hundreds a second.
REQUESTS_PER_S = 20.0
MOST_REQUESTS_AT_ONCE = 200
PARENT = "TRACEPARENT"

Attributes = Mapping[str, str | int | float | bool]


def is_asked_for(environment: Mapping[str, str]) -> bool:
    """Whether the environment asks for traces."""
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if exporters := environment.get("OTEL_TRACES_EXPORTER"):
        return "otlp" in exporters.split(",")
    return any(environment.get(f"OTEL_EXPORTER_OTLP_{name}ENDPOINT") for name in ("", "TRACES_"))


def tracer(service: str, **resource: str) -> Tracer | None:
    """What makes the spans of this process; None if nobody asks for them, or they cannot be made.

    Args:
        service: the name of the service, if the environment does not give one.
        resource: what else is true of all its spans.
    """
    if not is_asked_for(os.environ):
        return None
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get(
        "OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"
    )
    if protocol != "http/protobuf":
        log.warning("no traces: OTLP by %s is not supported, only http/protobuf", protocol)
        return None
    try:
        return Tracer(service, resource)
    except ImportError as error:
        log.warning("no traces: %s is missing: pip install 'lazyfs[otel]'", error.name)
        return None


def child_environment() -> dict[str, str]:
    """The environment of a child process that continues the present span.

    As in https://opentelemetry.io/docs/specs/otel/context/env-carriers/.
    """
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return {**os.environ, **{name.upper(): text for name, text in carrier.items()}}


class Tracer:
    """Makes the spans of one process and sends them, in a thread of its own, in batches.

    Raises:
        ImportError: OpenTelemetry is not installed.
    """

    def __init__(self, service: str, resource: Mapping[str, str]) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        from lazyfs import __version__

        # A collector that is away is said once, when it is not reached for good.
        logging.getLogger("opentelemetry").setLevel(logging.ERROR)
        ours = {"service.name": service, "service.version": __version__, **resource}
        # What the environment says goes before that.
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
        """A span of an answer to a caller, as long as this lasts; gives it for `set_attribute`."""
        from opentelemetry.trace import SpanKind

        with self._tracer.start_as_current_span(
            name, kind=SpanKind.SERVER, attributes=attributes
        ) as span:
            yield span

    def begin(self, name: str, began_s: float, attributes: Attributes) -> Any:
        """A span that began then, and whose children are all that follow; `end` ends it.

        Its own parent is what the environment names as `TRACEPARENT`.
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
        """A span that is over."""
        span = self._tracer.start_span(
            name, context=self._parent, start_time=_since_epoch_ns(began_s), attributes=attributes
        )
        span.end(_since_epoch_ns(ended_s))

    def request(self, operation: str, began_s: float, key: str, size: int, *, failed: bool) -> None:
        """A request to S3 that ended just now; one of those that there is room for."""
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
        """Say of a span that what it is of failed."""
        from opentelemetry.trace import Status, StatusCode

        span.set_status(Status(StatusCode.ERROR))

    def finish(self) -> None:
        """Send what was not sent yet, if that is quick."""
        # In a thread, because the exporter tries again for longer than its timeouts say.
        sender = threading.Thread(target=self._provider.force_flush, daemon=True)
        sender.start()
        sender.join(LAST_SPANS_S)


def _since_epoch_ns(at_s: float) -> int:
    """A moment of the monotonic clock, as OpenTelemetry wants it."""
    return time.time_ns() - int((time.monotonic() - at_s) * 1e9)
