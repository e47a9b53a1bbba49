"""One call of a function in a mover, on a line.

A *line* is a socket between a thread of the worker and a thread of a mover, which runs one call at
a time. The worker sends the function's name, its arguments and the places of its buffers in the
arena as JSON; the mover answers with the value or the exception. Before that it may pass the
connection that the call waits for, so that the worker can end it, or parts of the value. The worker
can send words to a running call (`Nudge`).
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lazyfs.blocks import buffers
from lazyfs.movers.context import WIRE

# The longest message: a function's name and arguments, or its result, in bytes.
MOST_BYTES = 192 << 10
# The exceptions that a call can raise: the first class that fits the function's own exception.
OS_ERRORS = (TimeoutError, ConnectionError, FileNotFoundError, OSError)


class MoverLostError(Exception):
    """There is no mover, or it ended; the effect of the call is unknown."""


class MoverFaultError(Exception):
    """A function raised an unexpected exception; the message has the end of its traceback."""


class Wire(Protocol):
    """An object that can end a call that waits for a server (`store/cancel.py`)."""

    def use(self, connection: socket.socket | None) -> None:
        """Set the connection that the call waits for; ends it at once if the call was cancelled."""


class Nudge:
    """Sends words to the function of a call, before or while it runs. Later ones have no effect."""

    def __init__(self) -> None:
        self._channel: socket.socket | None = None
        self._early: list[bytes] = []

    def begin(self, channel: socket.socket) -> None:
        """The call begins; `channel` leads to its function."""
        self._channel = channel
        for word in self._early:
            self.send(word)

    def end(self) -> None:
        """The call has ended."""
        self._channel = None

    def send(self, word: bytes) -> None:
        """Send a word. Does not block."""
        if self._channel is None:
            self._early.append(word)
            return
        with contextlib.suppress(OSError):  # the mover has ended, or has many words to read
            self._channel.send(word, socket.MSG_DONTWAIT)


class Line:
    """The worker's end of a line.

    Attributes:
        channel: the socket.
        wire: the connection that the mover's thread waits for, if it said so.
    """

    __slots__ = ("channel", "wire")

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.wire: socket.socket | None = None

    def close(self) -> None:
        """Close the socket and our descriptor of the connection."""
        self.channel.close()
        if self.wire is not None:
            self.wire.close()

    def send(self, asked: bytes, wire: Wire | None) -> None:
        """Begin a call. Raises OSError: the mover has ended."""
        self.channel.send(asked)
        if wire is not None:
            wire.use(self.wire)

    def exchange(self, asked: bytes, wire: Wire | None) -> dict[str, Any]:
        """Make a call and wait for its answer. Raises OSError: the mover has ended."""
        self.send(asked, wire)
        try:
            while True:
                if (told := self.receive(wire)) is not None:
                    return told
        finally:
            if wire is not None:
                wire.use(None)

    async def wait_for_answer(
        self, wire: Wire | None, came: Callable[[Any], None] = lambda part: None
    ) -> dict[str, Any]:
        """Wait for the answer to a call in a task.

        Args:
            came: called with each part of the value that the mover tells before.

        Raises:
            OSError: the mover has ended.
            ValueError: it sent no answer but something else.
        """
        import trio  # not for movers and for the probe of S3, which every mount waits for

        while True:
            await trio.lowlevel.wait_readable(self.channel)
            told = self.receive(wire)
            if told is not None and "part" not in told:
                return told
            if told is not None:
                came(told["part"])

    def receive(self, wire: Wire | None) -> dict[str, Any] | None:
        """The next message of a call: its answer, or None if it was the connection to wait for.

        Raises:
            OSError: the mover has ended.
            ValueError: the message is no answer.
        """
        message, descriptors, _, _ = socket.recv_fds(self.channel, MOST_BYTES, 1)
        if not message:
            raise ConnectionResetError("it ended")
        if descriptors:
            former, self.wire = self.wire, socket.socket(fileno=descriptors[0])
            if wire is not None:
                wire.use(self.wire)
            if former is not None:
                former.close()
            return None
        if message == WIRE:
            return None  # this process may open no more files
        told: dict[str, Any] = json.loads(message)
        return told


def told_of(error: OSError) -> dict[str, Any]:
    """What the mover tells of an exception, for `error_of`."""
    kind = next(number for number, each in enumerate(OS_ERRORS) if isinstance(error, each))
    return {"kind": kind, "errno": error.errno or 0, "text": error.strerror or str(error)}


def error_of(told: dict[str, Any]) -> OSError:
    """The exception that the mover told of."""
    return OS_ERRORS[told["kind"]](told["errno"], told["text"])


def message_of(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    buffer: memoryview | Sequence[memoryview],
) -> bytes:
    """The message that makes a call with a buffer, or with several.

    Raises:
        MoverLostError: a buffer is not shared with movers, or the message is too long.
    """
    parts = [buffer] if isinstance(buffer, memoryview) else buffer
    places = [(buffers.shared_offset(part), len(part)) for part in parts]
    if any(offset is None for offset, _ in places):
        raise MoverLostError("not shared")
    name = f"{function.__module__}:{function.__qualname__}"
    asked = json.dumps([name, arguments, places]).encode()
    if len(asked) > MOST_BYTES:
        raise MoverLostError("too much to say")
    return asked


def value_of(told: dict[str, Any]) -> Any:
    """The value of a call. Raises what its function raised: OSError, MoverFaultError."""
    if "errno" in told:
        raise error_of(told)
    if "fault" in told:
        raise MoverFaultError(told["fault"])
    return told["value"]
