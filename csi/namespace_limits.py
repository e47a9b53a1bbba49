"""The limits of each namespace on a node."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from grpc import StatusCode

from csi.errors import RpcError
from csi.node_records import VolumeRecord


@dataclass(frozen=True, slots=True)
class NamespaceLimits:
    """The limits of one namespace on this node; 0: no limit.

    Attributes:
        volumes: the most volumes of its pods.
        daemons: the most daemons started for them. Each takes a process and its memory.
    """

    volumes: int = 0
    daemons: int = 0


class VolumeLimit:
    """Counts the volumes of each namespace, including those that are being published.

    Args:
        most: the limit of one namespace; 0: no limit.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._coming: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def one_more(
        self, namespace: str, volume_id: str, records: Callable[[], Iterable[VolumeRecord]]
    ) -> Iterator[None]:
        """Count a volume that has no record yet, while it is being published.

        Raises:
            RpcError: RESOURCE_EXHAUSTED: the namespace has reached its limit.
        """
        with self._lock:
            # Not before: a volume is in a record, or is counted as coming, or both.
            there = sum(
                any(place.namespace == namespace for place in record.places.values())
                for record in records()
                if record.volume_id != volume_id
            )
            if namespace and 0 < self._most <= there + self._coming[namespace]:
                raise RpcError(
                    StatusCode.RESOURCE_EXHAUSTED,
                    f"namespace {namespace} has {self._most} volumes on this node, which is the "
                    "limit of the driver (--max-volumes-per-namespace); this one is mounted when "
                    "others are gone",
                )
            self._coming[namespace] += 1
        try:
            yield
        finally:
            with self._lock:
                self._coming[namespace] -= 1
                self._coming += Counter()  # removes zero counts
