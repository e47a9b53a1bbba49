"""What a worker and its supervisor say to each other while the worker starts.

A `SOCK_SEQPACKET` socket; each message is one JSON object. The worker says one or more of

    {"mount": {"source": S, "allow_other": B}}     everything else is fine: mount now
    {"ready": true, "version": V}                   the mount can be used
    {"error": text, "exit_code": N, "kind": K}      it cannot, and the worker ends

and `mount` is answered with `{"init": HEX}` and a descriptor, or with `{"error": text}`. The
supervisor mounts, so that whatever becomes of a worker that starts, there is somebody who has the
descriptor and can take the mount away again.

Only the standard library.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any

from lazyfs.errors import MountError
from lazyfs.process.worker_process import is_readable

LONGEST_MESSAGE = 1 << 16
# Of a text in a message, which must fit into one.
LONGEST_TEXT = 4096


class WorkerLine:
    """The supervisor's end.

    Args:
        connection: to the worker; it is closed with this.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def receive(self, until_s: float) -> dict[str, Any] | None:
        """The next message; empty if the worker has hung up, None if it says nothing in time.

        Args:
            until_s: by the monotonic clock.
        """
        if not is_readable(self._connection, until_s - time.monotonic()):
            return None
        try:
            message = json.loads(self._connection.recv(LONGEST_MESSAGE) or b"{}")
        except (OSError, ValueError):
            return {}  # it was killed
        return message if isinstance(message, dict) else {}

    def give(self, descriptor: int, init_message: bytes) -> None:
        """Answer `mount`: it is mounted."""
        self._send({"init": init_message.hex()}, [descriptor])

    def refuse(self, error: MountError) -> None:
        """Answer `mount`: that is not possible."""
        self._send({"error": str(error)[:LONGEST_TEXT]}, [])

    def _send(self, message: dict[str, Any], descriptors: list[int]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has just ended
            socket.send_fds(self._connection, [json.dumps(message).encode()], descriptors)


class SupervisorLine:
    """The worker's end.

    Args:
        connection: to the supervisor.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def mount(self, source: str, *, allow_other: bool) -> tuple[int, bytes]:
        """Have the supervisor mount: the descriptor of `/dev/fuse`, and the kernel's FUSE_INIT.

        Raises:
            MountError: that is not possible, or the supervisor is gone.
        """
        self.send({"mount": {"source": source, "allow_other": allow_other}})
        try:
            data, descriptors, _, _ = socket.recv_fds(
                self._connection, LONGEST_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC
            )
        except OSError as error:
            raise MountError(f"the supervisor of this worker is gone: {error}") from error
        answer = json.loads(data or b'{"error": "the supervisor of this worker is gone"}')
        if "error" in answer:
            raise MountError(answer["error"])
        return descriptors[0], bytes.fromhex(answer["init"])

    def ready(self, version: str) -> None:
        """The mount can be used; there is nothing more to say."""
        self.send({"ready": True, "version": version})
        self._connection.close()

    def refuse(self, text: str, exit_code: int, kind: str) -> None:
        """The mount cannot be used, and this worker ends."""
        self.send({"error": text[:LONGEST_TEXT], "exit_code": exit_code, "kind": kind})

    def send(self, message: dict[str, Any]) -> None:
        """Say something. A supervisor that was killed hears nothing, and the worker serves on."""
        with contextlib.suppress(OSError):
            self._connection.send(json.dumps(message).encode())
