"""Answers of HTTP: the head, and a body that is received into given memory.

A body goes from the socket straight into memory that the caller owns: one copy, made by the kernel
or by OpenSSL while other threads run, in one call for the whole body (`_receive.c`). Other clients
cannot do that, because they return memory of their own (`bench/transport.py`).
"""

from __future__ import annotations

import http.client
import math
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Protocol

from lazyfs.store._receive import receive

# How many bytes of a body are received before the rest is checked.
PIECE = 1 << 20
# Shorter bodies are left to the library.
LEAST_RECEIVED = 64 << 10
# The most informational answers (103 and the like) before the final one.
MOST_INFORMATIONAL = 20
# The longest head of an answer; curl accepts 300 KiB. An object may have hundreds of headers as
# metadata; the library's limit of 100 is raised for the whole process.
MOST_HEAD_BYTES = 256 << 10
http.client._MAXHEADERS = 2000  # type: ignore[attr-defined]


class CutOffError(ConnectionError):
    """The answer ended too early, after `came` bytes for the buffer, or is not HTTP."""

    def __init__(self, message: str, came: int = 0) -> None:
        super().__init__(message)
        self.came = came


class Body(Protocol):
    """The body of an answer. For one thread at a time."""

    def read_into(self, into: memoryview) -> None:
        """Fill a buffer. Raises OSError if less comes."""

    def read_all(self, most: int) -> bytes:
        """The rest of the body, but at most `most` bytes. Raises OSError."""

    def skip(self, count: int) -> None:
        """Discard bytes. Raises OSError if less comes."""

    @property
    def is_at_end(self) -> bool:
        """Whether the whole body was read; a chunked body does not announce its length."""


class ComingBody:
    """A body that is being received.

    Args:
        answer: an answer whose head was read.
        wire: the socket that it comes from.
    """

    def __init__(self, answer: http.client.HTTPResponse, wire: socket.socket) -> None:
        self._answer = answer
        self._wire = wire

    def read_into(self, into: memoryview) -> None:
        done = self._receive(into)
        while done < len(into):
            try:
                count = self._answer.readinto(into[done : done + PIECE])
            except (http.client.HTTPException, ConnectionError, ssl.SSLError) as error:
                raise CutOffError(told_of(error), done) from error
            if count == 0:
                raise CutOffError(f"{len(into) - done} bytes are missing", done)
            done += count

    def _receive(self, into: memoryview) -> int:
        """Fill a buffer from the socket, but for its last byte; returns the bytes received.

        The library would do the same with many calls for each record of TLS, or segment.
        """
        answer, wire = self._answer, self._wire
        if not answer.length or answer.chunked or len(into) < LEAST_RECEIVED:
            return 0
        try:
            # First what the library has received ahead.
            done = answer.readinto(into[: len(answer.fp.peek())])
        except (ConnectionError, ssl.SSLError) as error:
            raise CutOffError(told_of(error)) from error
        # The last byte is left to the library, which sees that the body is over.
        most = min(len(into), done + answer.length) - 1
        tls = getattr(wire, "_sslobj", None)
        silence_s = wire.gettimeout() or math.inf
        count, failed = receive(wire.fileno(), tls, into[done:most], silence_s)
        answer.length -= count
        done += count
        if failed:
            raise CutOffError(f"{failed}: {len(into) - done} bytes are missing", done)
        return done

    def read_all(self, most: int) -> bytes:
        try:
            return self._answer.read(most)
        except http.client.HTTPException as error:
            raise CutOffError(told_of(error)) from error

    def skip(self, count: int) -> None:
        into = memoryview(bytearray(min(count, PIECE)))
        while count:
            taken = into[: min(count, PIECE)]
            try:
                self.read_into(taken)
            except CutOffError as error:
                raise CutOffError(str(error)) from error
            count -= len(taken)

    @property
    def is_at_end(self) -> bool:
        return not self.read_all(1)


@dataclass(frozen=True, slots=True)
class Answer:
    """The head of an answer, and its body, which is being received.

    Attributes:
        headers: names are in lower case; of a repeated header, the first value.
        length: the length of the body in bytes; None if the answer does not say.
    """

    status: int
    headers: Mapping[str, str]
    length: int | None
    body: Body


class _Head:
    """Reads the head of an answer, unless it is too long."""

    def __init__(self, stream: BufferedIOBase) -> None:
        self._stream = stream
        self._left = MOST_HEAD_BYTES
        self.close = stream.close

    def readline(self, most: int) -> bytes:
        line = self._stream.readline(min(most, self._left + 1))
        self._left -= len(line)
        if self._left < 0:
            raise http.client.HTTPException(
                f"the headers of the answer have over {MOST_HEAD_BYTES >> 10} KiB"
            )
        return line


class Response(http.client.HTTPResponse):
    """Skips informational answers, which the library mistakes for the final one.

    RFC 9110, 15.2: a client must be able to parse one or more of them.
    """

    def begin(self) -> None:
        stream = self.fp
        self.fp = _Head(stream)  # type: ignore[assignment]
        try:
            super().begin()
        finally:
            if self.fp:  # it was not closed
                self.fp = stream

    def _read_status(self) -> tuple[str, int, str]:
        for _ in range(MOST_INFORMATIONAL):
            found: tuple[str, int, str] = super()._read_status()  # type: ignore[misc]
            if not 100 < found[1] < 200 or found[1] == http.client.SWITCHING_PROTOCOLS:
                return found
            http.client.parse_headers(self.fp)
        raise http.client.BadStatusLine("informational answers only")


def told_of(error: Exception) -> str:
    """What went wrong, short enough for a message."""
    return f"{type(error).__name__}: {error}"[:200]
