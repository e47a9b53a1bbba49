"""The metrics of all mounts of a node plugin, for Prometheus: its workers are asked for theirs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from csi.attachments import Attachments, Served
from csi.daemon import Daemon
from lazyfs.control.client import ControlClient, ControlError
from lazyfs.observe.exposition import exposition
from lazyfs.observe.metrics import Values
from lazyfs.process.mount_records import control_socket

# A node has few daemons; a worker answers in milliseconds, or is stopped and does not at all.
ASKED_AT_ONCE = 16
# Prometheus itself waits for 10 s in all, for the answer of the others too.
TIMEOUT_S = 3.0


def mount_metrics(attachments: Attachments) -> str:
    """The text of all of them; the label `volume` has the ids of the volumes that a mount serves.

    Of a mount whose worker does not answer, `lazyfs_up` is 0, and only who uses it is known.
    """
    served = attachments.served()
    with ThreadPoolExecutor(ASKED_AT_ONCE) as threads:
        values = list(threads.map(_ask, served))
    mounts = [
        ({"volume": ",".join(sorted(each.volumes))}, {**told, **_pods(each)})
        for each, told in zip(served.values(), values, strict=True)
    ]
    return exposition(mounts)


def _pods(served: Served) -> Values:
    """Who uses the mount: to be joined with the others by `volume`, of which several pods have one.

    A sample for each, as of `kube_pod_info`, instead of labels on every metric, which would change
    as pods come and go.
    """
    pods = sorted(served.pods)
    return {
        "lazyfs_volume_pod_info": [
            ({"namespace": namespace, "pod": pod}, 1) for namespace, pod in pods
        ]
    }


def _ask(daemon: Daemon) -> Values:
    try:
        client = ControlClient(control_socket(daemon.mountpoint), TIMEOUT_S)
        values: Values = client.get("/metrics.json")
    except ControlError:
        return {"lazyfs_up": [({}, 0)]}
    return values
