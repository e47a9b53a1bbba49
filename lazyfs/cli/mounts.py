"""Finds the mounts of this machine and queries their workers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lazyfs.control.client import ControlClient, ControlError
from lazyfs.errors import MountError
from lazyfs.process.mount_records import MountRecord, control_socket, record_of

Status = dict[str, Any]


def record_at(mountpoint: Path) -> MountRecord:
    """The record of the mount at a mountpoint. Raises MountError if there is none."""
    path = Path(os.path.realpath(mountpoint))
    record = record_of(path)
    if record is None:
        raise MountError(
            f"{path}: no lazyfs daemon serves it; `lazyfs status` lists the mounts that exist"
        )
    return record


def status_of(record: MountRecord) -> Status:
    """The status of a mount from its worker; with an `error` if the worker does not answer."""
    try:
        answer: Status = ControlClient(control_socket(Path(record.mountpoint))).get("/status")
    except ControlError as error:
        return {
            "mountpoint": record.mountpoint,
            "source": record.source,
            "version": record.version,
            "restarts": record.restarts,
            "error": str(error),
        }
    return answer
