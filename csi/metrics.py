"""The metrics of all mounts of a node plugin, for Prometheus, collected from its workers."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

from csi.daemon import Daemon
from csi.daemon_users import DaemonUsers, Served
from lazyfs.control.client import ControlClient, ControlError
from lazyfs.observe.exposition import exposition
from lazyfs.observe.metrics import Values
from lazyfs.process.mount_records import control_socket

log = logging.getLogger(__name__)

# A node has few daemons. A worker answers in milliseconds, or is stopped and does not answer.
ASKED_AT_ONCE = 16
# Prometheus waits 10 s for the answers of all workers together.
TIMEOUT_S = 3.0
# The metrics of one mount are some 50 KiB.
MOST_BYTES = 2 << 20
_DOWN: Values = {"lazyfs_up": [({}, 0)]}


def mount_metrics(users: DaemonUsers) -> str:
    """The metrics of all mounts, as text; the label `volume` has the ids of a mount's volumes.

    If the worker of a mount does not answer, its `lazyfs_up` is 0, and only its users are known.
    """
    served = users.served()
    with ThreadPoolExecutor(ASKED_AT_ONCE) as threads:
        values = list(threads.map(_ask, served))
    mounts = [
        ({"volume": ",".join(sorted(each.volumes))}, {**told, **_pods(each)})
        for each, told in zip(served.values(), values, strict=True)
    ]
    return exposition(mounts)


def _pods(served: Served) -> Values:
    """The pods that use a mount, for joins with other metrics on `volume`.

    One sample for each pod, as in `kube_pod_info`, instead of labels on every metric, which would
    change as pods start and end.
    """
    pods = sorted(served.pods)
    return {
        "lazyfs_volume_pod_info": [
            ({"namespace": namespace, "pod": pod}, 1) for namespace, pod in pods
        ]
    }


def _ask(daemon: Daemon) -> Values:
    try:
        client = ControlClient(control_socket(daemon.mountpoint), TIMEOUT_S, MOST_BYTES)
        values: Values = client.get("/metrics.json")
    except ControlError:
        return _DOWN
    try:
        exposition([({}, values)])
    except Exception as error:  # a worker that was taken over says what it likes
        log.warning("%s: its metrics cannot be understood: %r", daemon.spec.source, error)
        return _DOWN
    return values
