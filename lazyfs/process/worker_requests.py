"""What a supervisor does for its worker: mounts, makes the control socket, starts helpers."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from lazyfs.errors import DaemonError, MountError
from lazyfs.process.mount_helpers import MountHelpers
from lazyfs.process.mount_records import RunningMount, control_socket, listen_at
from lazyfs.process.mounted_session import MountedSession
from lazyfs.process.worker_channel import WorkerChannel
from lazyfs.process.worker_process import (
    END_TIMEOUT_S,
    StartedWorker,
    end_within,
    how_it_ended,
)


class WorkerRequests:
    """The requests of one worker (`worker_channel.py`).

    Args:
        mountpoint: where it serves.
        session: the mount.
        record: the record of the mount.
        owner: the owner of the files.
    """

    def __init__(
        self, mountpoint: Path, session: MountedSession, record: RunningMount, owner: int
    ) -> None:
        self._mountpoint = mountpoint
        self._session = session
        self._record = record
        self._owner = owner

    def serve_until_ready(self, worker: StartedWorker, until_s: float) -> dict[str, Any]:
        """Do what a starting worker asks for; returns its report that the mount can be used.

        Args:
            until_s: by the monotonic clock.

        Raises:
            DaemonError: it cannot be used; the worker has ended.
            MountError: the worker was not ready in time, or ended without a reason.
        """
        channel = WorkerChannel(worker.channel)
        while (said := channel.receive(until_s)) and not said.keys() & {"ready", "error"}:
            if "control" in said:
                self._give_control_socket(channel)
            else:
                self._mount(channel, said["mount"])
        if said is None:
            raise MountError(f"{self._mountpoint}: the daemon was not ready in time")
        if said.get("ready"):
            return said
        code = end_within(worker.process, END_TIMEOUT_S)
        if said:
            raise DaemonError(said["error"], said["exit_code"], said["kind"], code)
        raise MountError(
            f"{self._mountpoint}: the daemon {how_it_ended(code)} before the mount was ready"
        )

    def help_until_end(self, channel: socket.socket) -> None:
        """Start the helper processes that a worker asks for, until it ends; closes the channel."""
        with channel:
            MountHelpers(self._mountpoint, self._owner, lambda: self._session.is_there).serve(
                channel
            )

    def _mount(self, channel: WorkerChannel, wanted: dict[str, Any]) -> None:
        """Mount for a worker that has everything else."""
        try:
            mounted = self._session.begin(
                wanted["source"], allow_other=wanted["allow_other"],
                read_ahead_bytes=wanted["read_ahead"],
            )  # fmt: skip
        except MountError as error:
            channel.refuse(error)
        else:
            channel.give(*mounted)

    def _give_control_socket(self, channel: WorkerChannel) -> None:
        # A mount that was detached while in use is still served, but the socket is the next one's.
        if not self._record.is_current:
            channel.give_socket(None)
            return
        try:
            with listen_at(control_socket(self._mountpoint)) as listener:
                channel.give_socket(listener)
        except MountError as error:
            channel.refuse(error)
