"""Locks of volumes: RPCs run in many threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from grpc import StatusCode

from csi.errors import RpcError


class VolumeLocks:
    """One call for a volume at a time."""

    def __init__(self) -> None:
        self._held: set[str] = set()
        self._changed = threading.Condition()

    @contextmanager
    def held(self, volume_id: str, *, wait: bool = False) -> Iterator[None]:
        """Hold the lock of one volume.

        Raises:
            RpcError: ABORTED: another call holds it, and waiting was not requested. The caller
                tries again later (spec.md, "Concurrency").
        """
        with self._changed:
            while volume_id in self._held:
                if not wait:
                    raise RpcError(
                        StatusCode.ABORTED, f"another call for volume {volume_id} is under way"
                    )
                self._changed.wait()
            self._held.add(volume_id)
        try:
            yield
        finally:
            with self._changed:
                self._held.remove(volume_id)
                self._changed.notify_all()
