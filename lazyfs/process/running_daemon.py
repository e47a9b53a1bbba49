"""Ends a running daemon, or replaces its worker, from a process that is not its supervisor."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from lazyfs.errors import MountError
from lazyfs.process.mount_records import MountRecord, record_of
from lazyfs.process.worker_process import END_TIMEOUT_S, POLL_S, READY_TIMEOUT_S, parent_of, send


def end_daemon(record: MountRecord) -> None:
    """End the daemon of a mount; remaining users of copies of the mount get an error.

    The supervisor ends the kernel's session. If the supervisor was killed, the session ends with
    the worker, which has its last descriptor.
    """
    if record.worker is not None and parent_of(record.worker) != record.supervisor:
        send(record.worker, signal.SIGTERM)
    else:
        send(record.supervisor, signal.SIGTERM)


def replace_worker(record: MountRecord) -> MountRecord:
    """End the worker of a mount, wherever its supervisor runs, and wait for the next one.

    Raises:
        MountError: there is no supervisor to start another one, or none became ready.
    """
    worker = record.worker
    if worker is None or parent_of(worker) != record.supervisor:
        raise MountError(
            f"{record.mountpoint}: its worker has no supervisor that would start another one: "
            "unmount it, and mount it again"
        )
    send(worker, signal.SIGTERM)
    began = time.monotonic()
    while time.monotonic() - began < READY_TIMEOUT_S:
        time.sleep(POLL_S)
        now = record_of(Path(record.mountpoint))
        if now is None:
            raise MountError(f"{record.mountpoint}: was unmounted meanwhile")
        if now.worker != worker:
            return now
        if time.monotonic() - began > END_TIMEOUT_S and parent_of(worker) == record.supervisor:
            send(worker, signal.SIGKILL)
    raise MountError(f"{record.mountpoint}: no new worker became ready; its log says why")
