"""Bodies of answers, and how they are received into memory."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from lazyfs.store import http_answer
from lazyfs.store.http_answer import (
    MOST_HEAD_BYTES,
    MOST_INFORMATIONAL,
    PIECE,
    ComingBody,
    CutOffError,
    Response,
    told_of,
)

Wires = tuple[socket.socket, socket.socket]


@pytest.fixture
def wires() -> Iterator[Wires]:
    """Our end of a connection over TCP, and the server's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    for each in (ours, theirs):
        each.settimeout(20)
    with ours, theirs:
        yield ours, theirs


@contextlib.contextmanager
def begun(wires: Wires, head: bytes, body: bytes = b"", *, ends: bool = True) -> Iterator[Response]:
    """An answer whose head was read."""
    ours, theirs = wires
    theirs.sendall(head + body)
    if ends:
        theirs.close()
    with Response(ours) as answer:
        answer.begin()
        yield answer


def head(*lines: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode()


@pytest.mark.parametrize("count", [0, 1, 5, 9])
def test_bytes_before_a_range_are_skipped(
    wires: Wires, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(http_answer, "PIECE", 2)
    with begun(wires, head("Content-Length: 10"), b"0123456789") as answer:
        body = ComingBody(answer, wires[0])
        body.skip(count)
        assert not body.is_at_end
    assert PIECE == 1 << 20


def test_what_was_skipped_does_not_count_as_received(wires: Wires) -> None:
    """Nothing came for the buffer."""
    with begun(wires, head("Content-Length: 10"), b"012345") as answer:
        body = ComingBody(answer, wires[0])
        with pytest.raises(CutOffError, match="2 bytes are missing") as told:
            body.skip(8)
    assert told.value.came == 0


def test_the_rest_of_a_body_is_read_up_to_a_bound(wires: Wires) -> None:
    with begun(wires, head("Content-Length: 10"), b"0123456789") as answer:
        body = ComingBody(answer, wires[0])
        assert (body.read_all(4), body.read_all(100), body.read_all(1)) == (b"0123", b"456789", b"")
        assert body.is_at_end


def test_the_rest_of_a_body_in_broken_chunks_is_cut_off(wires: Wires) -> None:
    with begun(wires, head("Transfer-Encoding: chunked"), b"zz\r\n") as answer:
        body = ComingBody(answer, wires[0])
        with pytest.raises(CutOffError, match="IncompleteRead"):
            body.read_all(100)


def test_a_part_in_broken_chunks_is_cut_off_after_what_came(wires: Wires) -> None:
    with begun(wires, head("Transfer-Encoding: chunked"), b"3\r\nabc\r\nzz\r\n") as answer:
        into = memoryview(bytearray(10))
        with pytest.raises(CutOffError) as told:
            ComingBody(answer, wires[0]).read_into(into)
    assert bytes(into[: told.value.came]) == b"abc"[: told.value.came]


@pytest.mark.parametrize("length", [0, 100_000])
def test_no_more_is_waited_for_than_there_is(wires: Wires, length: int) -> None:
    """Even where the connection stays open."""
    wires[0].settimeout(5)
    body = bytes(length)
    with begun(wires, head(f"Content-Length: {length}"), body, ends=False) as answer:
        coming = ComingBody(answer, wires[0])
        coming.read_into(memoryview(bytearray(length)))
        with pytest.raises(CutOffError, match="200000 bytes are missing"):
            coming.read_into(memoryview(bytearray(200_000)))
        assert coming.is_at_end


def test_a_reset_before_the_body_is_told(wires: Wires) -> None:
    with begun(wires, head("Content-Length: 100000"), ends=False) as answer:
        wires[1].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        wires[1].close()
        with pytest.raises(CutOffError, match="Connection reset") as told:
            ComingBody(answer, wires[0]).read_into(memoryview(bytearray(100_000)))
    assert told.value.came == 0


EARLY = head("Link: </x>", status="103 Early Hints")


def test_a_few_informational_answers_may_come_first(wires: Wires) -> None:
    early = EARLY * (MOST_INFORMATIONAL - 1)
    with begun(wires, early + head("Content-Length: 2"), b"ok") as answer:
        assert (answer.status, answer.read()) == (200, b"ok")


def test_more_informational_answers_are_no_answer(wires: Wires) -> None:
    early = EARLY * MOST_INFORMATIONAL
    with (
        pytest.raises(http_answer.http.client.BadStatusLine, match="informational answers only"),
        begun(wires, early + head("Content-Length: 2"), b"ok"),
    ):
        pytest.fail("it was taken")


def test_a_server_that_only_says_continue_is_not_listened_to_for_ever(wires: Wires) -> None:
    said = head(status="100 Continue")
    with (
        pytest.raises(http_answer.http.client.HTTPException, match="have over 256 KiB"),
        begun(wires, said * (MOST_HEAD_BYTES // len(said) + 1)),
    ):
        pytest.fail("it was taken")


@pytest.mark.parametrize("status", [101, 200, 206, 404])
def test_any_other_status_is_final(wires: Wires, status: int) -> None:
    with begun(wires, head("Content-Length: 0", status=f"{status} Said")) as answer:
        assert answer.status == status


@pytest.mark.parametrize("over", [0, 1])
def test_a_head_may_have_many_bytes_and_no_more(wires: Wires, over: int) -> None:
    empty = len(head(*["X-A: "] * 10))
    filler = MOST_HEAD_BYTES - empty
    lengths = [filler // 10] * 9 + [filler - 9 * (filler // 10) + over]
    long = head(*(f"X-A: {'v' * length}" for length in lengths))
    assert len(long) == MOST_HEAD_BYTES + over
    if not over:
        with begun(wires, long) as answer:
            assert len(answer.getheaders()) == 10
    else:
        with (
            pytest.raises(http_answer.http.client.HTTPException, match="have over 256 KiB"),
            begun(wires, long),
        ):
            pytest.fail("it was taken")


def test_what_went_wrong_is_told_in_short() -> None:
    assert told_of(ValueError("no")) == "ValueError: no"
    assert len(told_of(ValueError("x" * 5000))) == 200
