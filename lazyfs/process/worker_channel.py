"""The messages between a worker and its supervisor.

They use a `SOCK_SEQPACKET` socket; each message is one JSON object. The worker sends

    {"control": true}                               the control socket is needed
    {"mount": {"source": S, "allow_other": B, "read_ahead": N}}
                                                    everything else is ready: mount now
    {"ready": true, "version": V, "mounted_ns": T}  the mount can be used; since when there is one
    {"error": text, "exit_code": N, "kind": K}      it cannot, and the worker ends

and later, with the two ends of pipes, requests for helper processes (`mount_helpers.py`). The
supervisor answers `control` with the listening socket, or without one if the mountpoint is another
mount's now; `mount` with `{"init": HEX}` and a descriptor; both with `{"error": text}` if it is not
possible. The supervisor mounts, so that it has the descriptor and can unmount if the worker dies
while it starts, and because the worker has no right to.

Uses only the standard library.
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
# Maximum length of a text in a message, which must fit into one packet.
LONGEST_TEXT = 4096


class WorkerChannel:
    """The supervisor's end.

    Args:
        connection: to the worker; closed with this object.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def receive(self, until_s: float) -> dict[str, Any] | None:
        """The next message; empty if the worker has hung up, None after the timeout.

        Args:
            until_s: by the monotonic clock.
        """
        if not is_readable(self._connection, until_s - time.monotonic()):
            return None
        try:
            message = json.loads(self._connection.recv(LONGEST_MESSAGE) or b"{}")
        except (OSError, ValueError, RecursionError):
            return {}  # it was killed, or sent nonsense
        return message if isinstance(message, dict) else {}

    def give(self, descriptor: int, init_message: bytes) -> None:
        """Answer `mount` with success."""
        self._send({"init": init_message.hex()}, [descriptor])

    def give_socket(self, listener: socket.socket | None) -> None:
        """Answer `control`."""
        self._send({}, [] if listener is None else [listener.fileno()])

    def refuse(self, error: MountError) -> None:
        """Answer with an error."""
        self._send({"error": str(error)[:LONGEST_TEXT]}, [])

    def _send(self, message: dict[str, Any], descriptors: list[int]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has just ended
            socket.send_fds(self._connection, [json.dumps(message).encode()], descriptors)


class SupervisorChannel:
    """The worker's end.

    Args:
        connection: to the supervisor.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def mount(self, source: str, *, allow_other: bool, read_ahead_bytes: int) -> tuple[int, bytes]:
        """Have the supervisor mount; returns the descriptor of `/dev/fuse` and FUSE_INIT.

        Raises:
            MountError: it is not possible, or the supervisor is gone.
        """
        wanted = {
            "source": source, "allow_other": allow_other, "read_ahead": read_ahead_bytes,
        }  # fmt: skip
        answer, descriptors = self._ask({"mount": wanted})
        return descriptors[0], bytes.fromhex(answer["init"])

    def control_socket(self) -> socket.socket | None:
        """A listening socket; None if the mountpoint is another mount's now.

        Raises:
            MountError: it cannot be made, or the supervisor is gone.
        """
        _, descriptors = self._ask({"control": True})
        return socket.socket(fileno=descriptors[0]) if descriptors else None

    def _ask(self, message: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        self.send(message)
        try:
            data, descriptors, _, _ = socket.recv_fds(
                self.connection, LONGEST_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC
            )
        except OSError as error:
            raise MountError(f"the supervisor of this worker is gone: {error}") from error
        answer = json.loads(data or b'{"error": "the supervisor of this worker is gone"}')
        if "error" in answer:
            raise MountError(answer["error"])
        return answer, descriptors

    def ready(self, version: str, mounted_ns: int) -> None:
        """Report that the mount can be used.

        Args:
            mounted_ns: since when there is a mount, in nanoseconds since the epoch.
        """
        self.send({"ready": True, "version": version, "mounted_ns": mounted_ns})

    def refuse(self, text: str, exit_code: int, kind: str) -> None:
        """Report that the mount cannot be used; this worker ends."""
        self.send({"error": text[:LONGEST_TEXT], "exit_code": exit_code, "kind": kind})

    def send(self, message: dict[str, Any]) -> None:
        """Send a message. Without a supervisor it is lost, and the worker keeps serving."""
        with contextlib.suppress(OSError):
            self.connection.send(json.dumps(message).encode())
