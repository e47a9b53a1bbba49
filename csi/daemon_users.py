"""Which volumes and pods each daemon of this node serves, for metrics and logs."""

from __future__ import annotations

import logging
import queue
from dataclasses import dataclass

from csi.daemon import Daemon
from csi.daemons import Daemons
from csi.node_records import NodeRecords
from lazyfs.errors import LazyfsError
from lazyfs.faults import start_watching
from lazyfs.handover.keeper import KeeperError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Served:
    """The users of a daemon: volumes by id, and pods by namespace and name."""

    volumes: set[str]
    pods: set[tuple[str, str]]


class DaemonUsers:
    """The users of each daemon, as recorded; daemons are told, so that their logs name volumes.

    Args:
        state: the records on disk.
        daemons: the daemons of this node.
    """

    def __init__(self, state: NodeRecords, daemons: Daemons) -> None:
        self._state = state
        self._daemons = daemons
        self._changed: queue.SimpleQueue[Daemon] = queue.SimpleQueue()

    def watch(self) -> None:
        """Begin to tell daemons their volumes, in a thread: no RPC waits for a stopped worker."""
        for daemon in self.served():
            self.changed(daemon)
        start_watching("naming volumes", self._tell_forever)

    def changed(self, daemon: Daemon) -> None:
        """Tell a daemon soon which volumes it serves."""
        self._changed.put(daemon)

    def served(self) -> dict[Daemon, Served]:
        """The volumes and pods that each daemon serves."""
        found: dict[Daemon, Served] = {}
        for record in self._state.volumes():
            for place in record.places.values():
                daemon = self._daemons.get(place.daemon) if place.daemon else None
                if daemon is None:
                    continue
                served = found.setdefault(daemon, Served(set(), set()))
                served.volumes.add(record.volume_id)
                if place.pod:
                    served.pods.add((place.namespace, place.pod))
        return found

    def _tell_forever(self) -> None:
        while True:
            daemon = self._changed.get()
            served = self.served().get(daemon)
            try:
                if served is not None and not daemon.retired:
                    daemon.name_volumes(",".join(sorted(served.volumes)))
            except (LazyfsError, KeeperError) as error:
                log.debug("%s: cannot be told its volumes: %s", daemon.mountpoint, error)
