"""What a door and a shelf do with answers of a store that S3 would not give: real nginx."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fleet import Fleet, Node, needs_programs

DATA = bytes(range(256)) * 8
ETAG = '"v1"'
RANGE = "bytes=0-1023"
Headers = dict[str, str]
# For a verdict, and for a block: status, headers, body.
Reply = tuple[int, Headers, bytes]


def byte(**headers: str) -> Reply:
    """Permits a reader."""
    told = {"ETag": ETAG, "Content-Range": f"bytes 0-0/{len(DATA)}"}
    return 206, told | {name.replace("_", "-"): it for name, it in headers.items()}, DATA[:1]


def block(body: bytes = DATA[:1024], **headers: str) -> Reply:
    told = {"ETag": ETAG, "Content-Range": f"bytes 0-1023/{len(DATA)}"}
    return 206, told | {name.replace("_", "-"): it for name, it in headers.items()}, body


class Store:
    """A store that answers as it is told."""

    def __init__(self) -> None:
        self.verdict, self.block = byte(), block()
        self.blocks = 0
        store = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                is_verdict = self.headers["Range"] == "bytes=0-0"
                store.blocks += self.headers["Range"] == RANGE
                status, headers, body = store.verdict if is_verdict else store.block
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)
                self.close_connection = "Content-Length" in headers

            def log_message(self, *_: object) -> None: ...

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def store() -> Iterator[Store]:
    made = Store()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def fleet(store: Store, tmp_path: Path) -> Iterator[Fleet]:
    """Without nodes."""
    needs_programs()
    made = Fleet(tmp_path, store.url)
    yield made
    made.stop()


Ask = Callable[..., tuple[int, bytes]]


def asks(node: Node, store: Store) -> Ask:
    """Asks the door of a node for the first block, as a mount does."""
    host, _, port = node.door.removeprefix("http://").rpartition(":")

    def ask(reader: str = "reader", name: str = "object", **more: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        headers = {
            "Host": store.url.removeprefix("http://"), "Range": RANGE, "If-Match": ETAG,
            "Authorization": reader, **{name.replace("_", "-"): it for name, it in more.items()},
        }  # fmt: skip
        connection.request("GET", f"/bucket/{name}", headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()

    return ask


@pytest.mark.parametrize(
    "verdict",
    [
        (200, {"ETag": ETAG}, DATA),
        (200, {"ETag": ETAG, "Content-Range": f"bytes 0-0/{len(DATA)}"}, DATA[:1]),
        (200, {}, b"<html>log in here</html>"),
        (204, {}, b""),
        (206, {"ETag": ETAG}, DATA[:1]),
        byte(ETag='"v2"'),
        byte(Content_Range=f"bytes 0-1/{len(DATA)}"),
        (302, {"Location": "http://127.0.0.1:9/"}, b""),
    ],
    ids=["whole", "200", "page", "204", "no-range", "version", "range", "redirect"],
)
def test_only_the_byte_that_was_asked_for_permits_a_reader(
    store: Store, fleet: Fleet, verdict: Reply
) -> None:
    """On a shelf that has the block, which another reader may have."""
    ask = asks(fleet.add("127.0.77.1"), store)
    assert ask() == (206, DATA[:1024])
    assert ask() == (206, DATA[:1024]), "by a verdict that was kept"
    assert store.blocks == 1
    store.verdict = verdict
    status, body = ask("another")
    assert status == 403
    assert DATA[:100] not in body
    assert ask()[0] == 206


@pytest.mark.parametrize(
    "bad",
    [
        block(DATA[:100], Content_Range=f"bytes 0-99/{len(DATA)}"),
        block(DATA[1:1025], Content_Range=f"bytes 1-1024/{len(DATA)}"),
        block(Content_Range="bytes */2048"),
        block(ETag='"v2"'),
        block(DATA[:100], Content_Length="1024"),
        (200, {"ETag": ETAG}, DATA),
        (206, {"ETag": ETAG}, DATA[:1024]),
        (404, {}, b""),
    ],
    ids=["short", "shifted", "unsatisfied", "version", "cut-off", "whole", "no-range", "error"],
)
def test_what_is_not_the_range_is_not_kept(store: Store, fleet: Fleet, bad: Reply) -> None:
    node = fleet.add("127.0.77.1")
    ask = asks(node, store)
    store.block = bad
    with contextlib.suppress(http.client.IncompleteRead):
        ask()
    store.block = block()
    assert ask() == (206, DATA[:1024])
    assert store.blocks == 2


def test_a_stored_answer_of_another_length_is_replaced_on_request(
    store: Store, fleet: Fleet
) -> None:
    """In each ring of a fleet with groups. nginx cannot compare numbers; lazyfs can."""
    for number in range(1, 5):
        fleet.add(f"127.0.77.{number}", **{"group-size": 2})
    fleet.know()
    store.block = block(DATA[:1000])
    doors = [asks(each, store) for each in fleet.nodes]
    assert [ask() for ask in doors] == [(206, DATA[:1000])] * 4
    store.block = block()
    blocks = store.blocks
    assert doors[0]() == (206, DATA[:1000])
    assert doors[0](X_Lazyfs_Refresh="1") == (206, DATA[:1024])
    assert doors[0]() == (206, DATA[:1024])
    assert store.blocks == blocks + 1


def test_a_new_node_takes_its_share_from_those_that_had_it(store: Store, fleet: Fleet) -> None:
    """And from the store if they are gone."""
    for number in (1, 2):
        fleet.add(f"127.0.77.{number}")
    fleet.know()
    names = [f"object-{number}" for number in range(24)]
    first = asks(fleet.nodes[0], store)
    assert [first(name=name) for name in names] == [(206, DATA[:1024])] * len(names)
    assert store.blocks == len(names)
    new = fleet.add("127.0.77.3")
    fleet.know()
    third = asks(new, store)
    assert [third(name=name) for name in names] == [(206, DATA[:1024])] * len(names)
    assert store.blocks == len(names)
    assert 0 < new.kept() < len(names)
    assert third(name="nobody-has-it") == (206, DATA[:1024])
    assert store.blocks == len(names) + 1
    for each in fleet.nodes[:2]:
        each.stop()
    more = [f"more-{number}" for number in range(8)]
    assert [third(name=name) for name in more] == [(206, DATA[:1024])] * len(more)
    assert store.blocks == len(names) + 1 + len(more)


def test_errors_of_the_store_pass_through_a_shelf(store: Store, fleet: Fleet) -> None:
    """With peers that are asked first, and have nothing."""
    for number in (1, 2):
        fleet.add(f"127.0.77.{number}")
    fleet.know()
    ask = asks(fleet.nodes[0], store)
    for number, status in enumerate((403, 404, 412, 500, 503)):
        store.block = (status, {}, b"<Error><Code>Told</Code></Error>")
        told = {ask(name=f"object-{number}-{each}") for each in range(8)}
        assert told == {(status, b"<Error><Code>Told</Code></Error>")}
