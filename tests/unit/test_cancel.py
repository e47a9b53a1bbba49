"""Requests that another thread ends."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from lazyfs.store.cancel import Cancel, CancelledError


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection over TCP: the request's end, and the server's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    for each in (ours, theirs):
        each.settimeout(20)
    with ours, theirs:
        yield ours, theirs


Pair = tuple[socket.socket, socket.socket]


def test_a_request_that_waits_ends(pair: Pair) -> None:
    ours, theirs = pair
    cancel = Cancel()
    with pytest.raises(CancelledError), cancel.watching(ours):
        cancel()
        assert ours.recv(1) == b"", "it does not wait for the server"
    assert cancel.called
    assert theirs.recv(1) == b""


def test_a_request_that_has_not_begun_does_not(pair: Pair) -> None:
    ours, theirs = pair
    cancel = Cancel()
    cancel()
    with pytest.raises(CancelledError), cancel.watching(ours):
        pytest.fail("it began")
    ours.sendall(b"x")
    assert theirs.recv(1) == b"x", "the connection can be used for others"


def test_a_request_that_has_ended_is_not_touched(pair: Pair) -> None:
    ours, theirs = pair
    cancel = Cancel()
    with cancel.watching(ours):
        ours.sendall(b"a")
    cancel()
    ours.sendall(b"b")
    assert theirs.recv(2, socket.MSG_WAITALL) == b"ab"


@pytest.mark.parametrize("called", [False, True])
def test_errors_of_a_request_that_was_ended_are_not_its_own(pair: Pair, called: bool) -> None:
    ours, _ = pair
    cancel = Cancel()
    with pytest.raises(CancelledError if called else ZeroDivisionError), cancel.watching(ours):
        if called:
            cancel()
        raise ZeroDivisionError


def test_a_closed_connection_can_be_ended(pair: Pair) -> None:
    ours, _ = pair
    cancel = Cancel()
    with pytest.raises(CancelledError), cancel.watching(ours):
        ours.close()
        cancel()
    cancel.use(ours)


@pytest.mark.parametrize("first", ["use", "call"])
def test_a_connection_that_another_process_waits_for_is_ended(pair: Pair, first: str) -> None:
    ours, theirs = pair
    cancel = Cancel()
    if first == "use":
        cancel.use(ours)
        cancel()
    else:
        cancel()
        cancel.use(ours)
    assert theirs.recv(1) == b""
    cancel.use(None)
    cancel()


def test_what_has_come_is_counted(pair: Pair) -> None:
    ours, theirs = pair
    cancel = Cancel()
    assert cancel.received_bytes() is None
    with cancel.watching(ours):
        before = cancel.received_bytes()
        assert before is not None
        theirs.sendall(b"x" * 1000)
        ours.recv(1000, socket.MSG_WAITALL)
        assert cancel.received_bytes() == before + 1000
    with cancel.watching(ours):
        assert cancel.received_bytes() == before + 1000, "it is the same request"
    following = Cancel()
    with following.watching(ours):
        assert following.received_bytes() == 0, "the connection was used before"
        ours.close()
        assert cancel.received_bytes() is None
    assert cancel.received_bytes() is None
