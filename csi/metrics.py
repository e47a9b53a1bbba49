"""The metrics of all mounts of a node plugin, for Prometheus: its workers are asked for theirs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from csi.attachments import Attachments
from csi.daemons import Daemon
from lazyfs.control.client import ControlClient, ControlError
from lazyfs.mount.runtime import control_socket
from lazyfs.observe.exposition import exposition
from lazyfs.observe.metrics import Values

# A node has few daemons; a worker answers in milliseconds, or is stopped and does not at all.
ASKED_AT_ONCE = 16
# Prometheus itself waits for 10 s in all, for the answer of the others too.
TIMEOUT_S = 3.0


def mount_metrics(attachments: Attachments) -> str:
    """The text of all of them; the label `volume` has the ids of the volumes that a mount serves.

    Of a mount whose worker does not answer, `lazyfs_up` is 0 and the rest is missing.
    """
    served = attachments.served()
    with ThreadPoolExecutor(ASKED_AT_ONCE) as threads:
        values = list(threads.map(_ask, served))
    labels = [{"volume": ",".join(volumes)} for volumes in served.values()]
    return exposition(zip(labels, values, strict=True))


def _ask(daemon: Daemon) -> Values:
    try:
        client = ControlClient(control_socket(daemon.mountpoint), TIMEOUT_S)
        values: Values = client.get("/metrics.json")
    except ControlError:
        return {"lazyfs_up": [({}, 0)]}
    return values
