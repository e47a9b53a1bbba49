"""How much of a node the pods of one namespace may take."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from grpc import StatusCode

from csi.errors import RpcError
from csi.staged import VolumeRecord


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of one namespace on this node; 0: no limit.

    Attributes:
        volumes: volumes of its pods.
        daemons: daemons that were started for them. Each takes a process and its memory.
    """

    volumes: int = 0
    daemons: int = 0


class VolumeBound:
    """Counts the volumes of namespaces, with those that are just being published.

    Args:
        most: of one namespace; 0: no limit.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._coming: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def one_more(
        self, namespace: str, volume_id: str, records: Iterable[VolumeRecord]
    ) -> Iterator[None]:
        """Hold the right to publish a volume that is in no record yet.

        Raises:
            RpcError: RESOURCE_EXHAUSTED: the namespace has as many as it may.
        """
        there = sum(
            any(place.namespace == namespace for place in record.places.values())
            for record in records
            if record.volume_id != volume_id
        )
        with self._lock:
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
                self._coming += Counter()  # forgets who has none
