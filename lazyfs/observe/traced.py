"""A recorder that also makes spans. Only a mount with traces imports it."""

from __future__ import annotations

import time
from collections.abc import Mapping

from lazyfs.observe.recorder import Recorder
from lazyfs.observe.tracing import Attributes, Tracer


class TracedRecorder(Recorder):
    """Makes a span for the mount until it is ready, and child spans for what follows.

    Args:
        policy: the value of `--prefetch`.
        tracer: makes the spans.
        about: attributes that identify the mount.
    """

    def __init__(self, policy: str, tracer: Tracer, about: Mapping[str, str]) -> None:
        super().__init__(policy, time.monotonic)
        self._tracer = tracer
        self._is_ready = False
        self._mount = tracer.begin("mount", self._began_s, about)

    def ready(self) -> None:
        self._is_ready = True
        self._mount.end()

    def resumed(self) -> None:
        super().resumed()
        self._mount.set_attribute("lazyfs.resumed", True)

    def loaded(self, start_s: float, end_s: float, facts: Attributes) -> None:
        self._tracer.span("first load", self._began_s + start_s, self._began_s + end_s, facts)

    def answered(
        self, operation: str, began_s: float, size: int = 0, *, key: str = "", failed: bool
    ) -> None:
        super().answered(operation, began_s, size, key=key, failed=failed)
        self._tracer.request(operation, began_s, key, size, failed=failed)

    def close(self) -> None:
        if not self._is_ready:
            self._tracer.mark_failed(self._mount)
            self._mount.end()
        self._tracer.finish()
