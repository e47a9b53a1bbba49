"""Keeper and supervisor of one mount, in one process, without the CSI driver.

`lazyfs mount` leaves this process in the background (`background.py`), or becomes it in the
foreground. On SIGTERM and SIGINT it unmounts and ends.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import threading
from typing import Any

from lazyfs.end_signals import EndSignals, end_signals
from lazyfs.errors import LazyfsError, MountError
from lazyfs.escaping import escaped
from lazyfs.handover.keeper import Keeper, allow_many_descriptors
from lazyfs.log import configure
from lazyfs.process.mount_spec import MountSpec
from lazyfs.process.privileges import leave_no_core_dump, protect_from_oom
from lazyfs.process.supervisor import Supervisor

log = logging.getLogger(__name__)


def main(spec: MountSpec, report_fd: int | None = None) -> int:
    """Keep and supervise one mount in this process; returns the exit code.

    Args:
        spec: what to mount.
        report_fd: a pipe to the command that waits for the mount; without it, errors are printed.
    """
    os.chdir("/")
    configure(
        str(spec.options.get("log-level", "info")),
        str(spec.options.get("log-format", "text")),
        mountpoint=spec.mountpoint,
    )
    with end_signals() as signals:
        return _run(spec, report_fd, signals)


def _run(spec: MountSpec, report_fd: int | None, signals: EndSignals) -> int:
    keeper = Keeper()

    def connect() -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        threading.Thread(target=keeper.serve, args=[ours], daemon=True).start()
        return theirs

    leave_no_core_dump()
    protect_from_oom()
    allow_many_descriptors()
    supervisor = Supervisor(spec, connect, leash=False, on_end=signals.wake)
    try:
        supervisor.start()
    except Exception as error:
        if isinstance(error, LazyfsError):
            return _refused(error, report_fd)
        log.exception("the mount could not be started")
        return _refused(
            MountError(f"{spec.mountpoint}: {type(error).__name__}: {error}"), report_fd
        )
    _report(report_fd, {"ready": True})
    manager = None if report_fd is not None else os.environ.pop("NOTIFY_SOCKET", None)
    _notify(manager, f"READY=1\nSTATUS=Serving {spec.source} at {spec.mountpoint}")
    while (number := signals.wait()) is not None:
        log.info("ending on %s", number.name)
        _notify(manager, "STOPPING=1")
        supervisor.stop()
    return 0


def _refused(error: LazyfsError, report_fd: int | None) -> int:
    if report_fd is None:
        print(f"lazyfs: {escaped(str(error))}", file=sys.stderr)
    _report(report_fd, {"error": str(error), "exit_code": error.exit_code})
    return error.exit_code


def _notify(manager: str | None, state: str) -> None:
    """Tell the service manager that started this process in the foreground, if one did.

    Args:
        manager: the address of its socket, from the environment (sd_notify(3)).
        state: lines of `NAME=VALUE`.
    """
    if not manager:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
            # An @ stands for the zero byte of an abstract address.
            connection.connect(f"\0{manager[1:]}" if manager.startswith("@") else manager)
            connection.send(state.encode())
    except OSError as error:
        log.warning("the service manager does not listen: %s", error.strerror)


def _report(descriptor: int | None, message: dict[str, Any]) -> None:
    if descriptor is not None:
        # If the command was interrupted, it also told this process to end.
        with contextlib.suppress(BrokenPipeError), open(descriptor, "w") as pipe:
            json.dump(message, pipe)
