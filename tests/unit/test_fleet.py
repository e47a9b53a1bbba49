"""The cache of a fleet as a mount sees it: asked first, checked, passed by while it has trouble."""

from __future__ import annotations

import http.server
import logging
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from ports import free_port

from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.memory import BlockMemory
from lazyfs.errors import AccessDeniedError, ObjectChangedError, OptionError, SourceError
from lazyfs.fetch import fleet_policy
from lazyfs.fetch.block_getter import BlockGetter
from lazyfs.fetch.fleet_policy import REST_S, State
from lazyfs.listed_object import File
from lazyfs.observe.recorder import Recorder, Tier
from lazyfs.options.mount_options import MountOptions
from lazyfs.store import fleet_cache
from lazyfs.store.cancel import Cancel
from lazyfs.store.fleet_cache import FleetCache, FleetCacheError, Trouble
from lazyfs.store.resolved_source import Endpoint, ResolvedSource, TimedCredentials
from lazyfs.store.s3_source import S3Source
from lazyfs.store.signing import SigningCredentials
from lazyfs.store.url import SourceUrl
from lazyfs.threads import Threads

DATA = bytes(range(256)) * 64
FILE = File(2, 1, "w", "m/w", len(DATA), '"v1"', 0)
Answer = Callable[[Any], None]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, the first connection may take longer than a mount waits for it."""
    monkeypatch.setattr(fleet_policy, "FIRST_WORD_S", 20.0)


class Server:
    """An HTTP server that answers as it is told, and remembers what it was asked."""

    def __init__(self, answer: Answer, port: int = 0) -> None:
        self.answer = answer
        self.headers: list[dict[str, str]] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.headers.append({k.lower(): v for k, v in self.headers.items()})
                server.answer(self)

            def log_message(self, *_: object) -> None: ...

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.port: int = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def asked(self) -> int:
        return len(self.headers)

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def reply(handler: Any, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in ({"Content-Length": str(len(body))} | headers).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def part(data: bytes = DATA, etag: str = '"v1"', shift: int = 0, size: int = len(DATA)) -> Answer:
    """Answers ranges of `data`, in one way or another wrongly."""

    def answer(handler: Any) -> None:
        first, last = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
        first, last = first + shift, last + shift
        told = f"bytes {first}-{last}/{size}"
        reply(handler, 206, data[first : last + 1], ETag=etag, Content_Range=told)

    return answer


def refusal(status: int, code: str = "") -> Answer:
    body = f"<Error><Code>{code}</Code></Error>".encode() if code else b"<html></html>"
    return lambda handler: reply(handler, status, body)


def cut_off(handler: Any) -> None:
    handler.send_response(206)
    handler.send_header("Content-Length", "1000")
    handler.send_header("Content-Range", f"bytes 0-999/{len(DATA)}")
    handler.send_header("ETag", '"v1"')
    handler.end_headers()
    handler.wfile.write(DATA[:500])
    handler.close_connection = True


def hang_up(handler: Any) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


@contextmanager
def servers(*answers: Answer) -> Iterator[list[Server]]:
    with ExitStack() as stack:
        made = [Server(answer) for answer in answers]
        for each in made:
            stack.callback(each.stop)
        yield made


class Mount:
    """What asks for blocks."""

    def __init__(self, s3: Server, url: str) -> None:
        options = MountOptions(fleet_cache=url)
        endpoint = Endpoint("eu-west-1", "s3", f"http://127.0.0.1:{s3.port}", "/bucket/", "", None)
        timed = TimedCredentials(SigningCredentials("AKID", "secret", "token"))
        source = S3Source(
            SourceUrl("bucket", "m/"), options, resolved=ResolvedSource(endpoint, timed, None)
        )
        self.recorder = Recorder()
        memory = BlockMemory(1 << 30, 1000, BlockMap(1000), lambda: 1)
        self.getter = BlockGetter(source, memory, options, Threads(40), lambda: None, self.recorder)
        assert self.getter.fleet
        self.fleet = self.getter.fleet

    async def get(self, start: int = 0, length: int = 1000) -> Tier:
        """Where a range came from; its bytes are right."""
        got = await self.getter.get(
            FILE, start, length, patience_s=lambda: 30.0, saturated=lambda: False
        )
        assert bytes(got.data) == DATA[start : start + length]
        # What the thread has to tell comes with it, or just after.
        await trio.testing.wait_all_tasks_blocked()
        return got.tier


Scenario = Callable[[Mount], Awaitable[None]]


def run(s3: Server, url: str, scenario: Scenario) -> Mount:
    made: list[Mount] = []

    async def main() -> None:
        made.append(Mount(s3, url))
        with trio.fail_after(60):
            await scenario(made[0])

    trio.run(main)
    recorder = made[0].recorder
    assert {*recorder.requests, *recorder.in_flight} <= {"get", "fleet"}, "names of metrics"
    return made[0]


async def one(mount: Mount) -> None:
    await mount.get()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


def test_the_cache_gets_the_request_of_s3() -> None:
    with servers(part(), part()) as (s3, cache):

        async def first(mount: Mount) -> None:
            assert await mount.get(256) is Tier.FLEET

        mount = run(s3, url(cache), first)
        asked = cache.headers[0]
        assert asked["host"] == f"127.0.0.1:{s3.port}"
        assert (asked["range"], asked["if-match"]) == ("bytes=256-1255", '"v1"')
        assert "Credential=AKID" in asked["authorization"]
        assert asked["x-amz-security-token"] == "token"
        assert s3.asked == 0
        assert mount.fleet.results == {"served": 1}
        assert (mount.recorder.fleet_received_bytes, mount.recorder.received_bytes) == (1000, 0)


def test_one_byte_is_asked_of_s3_alone() -> None:
    """It is how a mount finds out what it may read now."""
    with servers(part(), part()) as (s3, cache):

        async def look(mount: Mount) -> None:
            assert await mount.get(0, 1) is Tier.S3

        run(s3, url(cache), look)
        assert (s3.asked, cache.asked) == (1, 0)


@pytest.mark.parametrize(
    ("answer", "trouble"),
    [
        (refusal(403), "refused"),
        (refusal(412, "PreconditionFailed"), "refused"),
        (refusal(302), "refused"),
        (refusal(500), "failed"),
        (refusal(502), "failed"),
        (part(etag='"v2"'), "wrong"),
        (part(shift=1), "wrong"),
        (part(size=len(DATA) + 1), "wrong"),
        (lambda handler: reply(handler, 206, DATA[:1000], ETag='"v1"'), "wrong"),
        (cut_off, "cut_off"),
        (hang_up, "cut_off"),
    ],
)
def test_blocks_that_the_cache_does_not_deliver_come_from_s3(answer: Answer, trouble: str) -> None:
    with servers(part(), answer) as (s3, cache):

        async def two(mount: Mount) -> None:
            assert await mount.get() is Tier.S3
            assert await mount.get(1000) is Tier.S3

        mount = run(s3, url(cache), two)
        assert s3.asked == 2
        assert mount.fleet.results[trouble] >= 1
        assert not mount.recorder.retries, "a reader notices nothing"
        if trouble != "cut_off":
            assert cache.asked == 1 + (trouble == "wrong"), "it rests"
            assert mount.fleet.state is State.RESTING and mount.fleet.trouble


def test_a_cache_behind_a_unix_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "door.sock"
    cache = FleetCache(f"unix:{path}")
    with pytest.raises(FleetCacheError, match="No such file or directory") as told:
        cache.connect()
    assert told.value.trouble is Trouble.AWAY and told.value.is_certain
    with socket.socket(socket.AF_UNIX) as door, ThreadPoolExecutor() as threads:
        door.bind(str(path))
        door.listen()
        asked = threads.submit(
            cache.ask, "/bucket/m/w", {"Host": "s3.test"}, lambda answer: answer.body.read_all(9),
            Cancel(),
        )  # fmt: skip
        connection = door.accept()[0]
        with connection:
            head = connection.recv(1000).decode()
            connection.sendall(b"HTTP/1.1 206 OK\r\nContent-Length: 4\r\n\r\nbyte")
        assert asked.result() == b"byte"
        monkeypatch.setattr(fleet_cache, "SILENCE_TIMEOUT_S", 0.1)
        with pytest.raises(FleetCacheError) as told:  # nobody accepts
            cache.ask("/bucket/m/w", {}, lambda answer: answer.body.read_all(9), Cancel())
        assert told.value.trouble is Trouble.SILENT
    assert head.startswith("GET /bucket/m/w HTTP/1.1\r\n") and "\r\nHost: s3.test\r\n" in head


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [(403, "AccessDenied", AccessDeniedError), (412, "PreconditionFailed", ObjectChangedError)],
)
def test_a_refusal_that_s3_confirms_is_no_trouble_of_the_cache(
    status: int, code: str, error: type[SourceError]
) -> None:
    with servers(refusal(status, code), refusal(status)) as (s3, cache):

        async def refused(mount: Mount) -> None:
            with pytest.raises(error):
                await mount.get()
            await trio.testing.wait_all_tasks_blocked()
            assert mount.fleet.state is State.USED

        run(s3, url(cache), refused)


def test_an_answer_that_was_cut_off_is_asked_for_again() -> None:
    with servers(part(), cut_off) as (s3, cache):

        def once(handler: Any) -> None:
            cache.answer = part()
            cut_off(handler)

        cache.answer = once

        async def again(mount: Mount) -> None:
            assert await mount.get() is Tier.FLEET

        mount = run(s3, url(cache), again)
        assert (s3.asked, cache.asked) == (0, 2)
        assert mount.fleet.results == {"cut_off": 1, "served": 1}


def test_trouble_of_s3_behind_the_cache_is_waited_for() -> None:
    """Otherwise each node of a fleet would go to an S3 that asks for fewer requests."""
    with servers(part(), part()) as (s3, cache):

        def once(handler: Any) -> None:
            cache.answer = part()
            refusal(503, "SlowDown")(handler)

        cache.answer = once

        async def patient(mount: Mount) -> None:
            assert await mount.get() is Tier.FLEET
            assert mount.fleet.state is State.USED

        mount = run(s3, url(cache), patient)
        assert (s3.asked, cache.asked) == (0, 2)
        assert mount.recorder.retries.total() == 1


def test_trouble_that_s3_does_not_have_is_the_cache_s_own() -> None:
    with servers(part(), refusal(503, "SlowDown")) as (s3, cache):

        async def outdone(mount: Mount) -> None:
            assert await mount.get() is Tier.S3
            assert mount.fleet.state is State.RESTING

        run(s3, url(cache), outdone)


def test_a_cache_that_is_not_there(caplog: pytest.LogCaptureFixture) -> None:
    with servers(part()) as (s3,):

        async def many(mount: Mount) -> None:
            for start in range(0, 5000, 1000):
                assert await mount.get(start) is Tier.S3

        with caplog.at_level(logging.INFO, "lazyfs"):
            mount = run(s3, f"http://127.0.0.1:{free_port()}", many)
        assert mount.fleet.results == {"away": 1}
        assert len([each for each in caplog.records if "fleet cache" in each.message]) == 1


def test_a_cache_that_is_not_there_rests_before_s3_has_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else what S3 takes long to answer would send a cache to rest that is there again."""
    monkeypatch.setattr(fleet_policy, "RETURN_S", 0.05)
    hold = threading.Event()

    def slow(handler: Any) -> None:
        hold.wait(30)
        part()(handler)

    with servers(slow) as (s3,):

        async def early(mount: Mount) -> None:
            mount.fleet.state = State.USED  # as if it had been there
            async with trio.open_nursery() as nursery:
                nursery.start_soon(mount.get)
                while not s3.asked:
                    await trio.sleep(0.01)
                assert mount.fleet.state is State.RESTING
                mount.fleet.state = State.USED
                hold.set()
            assert mount.fleet.state is State.USED
            assert mount.fleet.results == {"away": 1} or mount.fleet.results == {"away": 2}

        run(s3, f"http://127.0.0.1:{free_port()}", early)


def test_a_cache_that_is_started_again_is_used_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_policy, "RECONNECT_S", 0.05)
    monkeypatch.setattr(fleet_policy, "RETURN_S", 0.05)
    port = free_port()
    with servers(part()) as (s3,):

        async def starts(mount: Mount) -> None:
            mount.fleet.state = State.USED  # as if it had been there
            assert await mount.get() is Tier.S3
            assert mount.fleet.state is State.RESTING
            cache = Server(part(), port)
            try:
                while await mount.get(1000) is not Tier.FLEET:
                    await trio.sleep(0.05)
                assert mount.fleet.state is State.USED
            finally:
                cache.stop()

        run(s3, f"http://127.0.0.1:{port}", starts)


def test_requests_wait_for_a_cache_that_comes_back() -> None:
    port = free_port()
    with servers(part()) as (s3,):

        async def returns(mount: Mount) -> None:
            mount.fleet.state = State.USED  # as if it had been there
            found: list[Tier] = []

            async def get(start: int) -> None:
                found.append(await mount.get(start))

            async with trio.open_nursery() as nursery:
                for start in range(0, 5000, 1000):
                    nursery.start_soon(get, start)
                while not mount.fleet.is_lost:
                    await trio.sleep(0.01)
                cache = Server(part(), port)
            try:
                assert found == [Tier.FLEET] * 5
                assert mount.fleet.state is State.USED and not mount.fleet.is_lost
            finally:
                cache.stop()

        run(s3, f"http://127.0.0.1:{port}", returns)
        assert s3.asked == 0


@contextmanager
def holding_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, threading.Event]]:
    """An S3 whose answers wait for the event, for a cache that stays away."""
    monkeypatch.setattr(fleet_policy, "RETURN_S", 0.05)
    monkeypatch.setattr(fleet_policy, "DOUBLES_S", 1e9)
    hold = threading.Event()

    def slow(handler: Any) -> None:
        hold.wait(30)
        part()(handler)

    with servers(slow) as (s3,):
        yield s3, hold


async def ask_for_eight(mount: Mount, s3: Server, nursery: trio.Nursery) -> None:
    """Request eight ranges, and return when the first of them have reached S3."""
    mount.fleet.state = State.USED  # as if it had been there
    for start in range(0, 8000, 1000):
        nursery.start_soon(mount.get, start)
    while s3.asked < fleet_policy.FIRST_DIRECT:
        await trio.sleep(0.01)


def test_a_cache_that_stays_away_sends_few_requests_to_s3_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And more later, so that a load goes on at its speed."""
    monkeypatch.setattr(fleet_policy, "RECONNECT_S", 0.05)
    with holding_s3(monkeypatch) as (s3, hold):

        async def stays(mount: Mount) -> None:
            async with trio.open_nursery() as nursery:
                await ask_for_eight(mount, s3, nursery)
                await trio.sleep(0.5)  # the others would have come
                assert s3.asked == fleet_policy.FIRST_DIRECT
                monkeypatch.setattr(fleet_policy, "DOUBLES_S", 0.01)
                while s3.asked < 8:
                    await trio.sleep(0.01)
                hold.set()

        run(s3, f"http://127.0.0.1:{free_port()}", stays)
        assert s3.asked == 8


def test_requests_that_are_not_wanted_any_more_leave_their_turn_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with holding_s3(monkeypatch) as (s3, hold):

        async def leaves(mount: Mount) -> None:
            async with trio.open_nursery() as nursery:
                await ask_for_eight(mount, s3, nursery)
                nursery.cancel_scope.cancel()
            s3.answer = part()
            assert await mount.get() is Tier.S3
            hold.set()

        run(s3, f"http://127.0.0.1:{free_port()}", leaves)


def test_wrong_bytes_on_a_shelf_are_replaced() -> None:
    with servers(part(), part()) as (s3, cache):

        def stored(handler: Any) -> None:
            good = handler.headers["X-Lazyfs-Refresh"] == "1"
            (part() if good else part(shift=1))(handler)

        cache.answer = stored

        async def replaced(mount: Mount) -> None:
            assert await mount.get() is Tier.FLEET
            assert mount.fleet.state is State.USED

        mount = run(s3, url(cache), replaced)
        assert (s3.asked, cache.asked) == (0, 2)
        assert mount.fleet.results == {"wrong": 1, "served": 1}


def test_a_file_that_is_cut_off_on_a_shelf_is_replaced() -> None:
    """Only the third time: cut off once, it is most likely a machine that has died."""
    with servers(part(), part()) as (s3, cache):

        def stored(handler: Any) -> None:
            good = handler.headers["X-Lazyfs-Refresh"] == "1"
            (part() if good else cut_off)(handler)

        cache.answer = stored

        async def replaced(mount: Mount) -> None:
            assert await mount.get() is Tier.FLEET

        run(s3, url(cache), replaced)
        assert (s3.asked, cache.asked) == (0, 3)


def test_a_cache_that_does_not_accept_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queue of connections is full: the kernel answers nothing more."""
    monkeypatch.setattr(fleet_cache, "CONNECT_TIMEOUT_S", 30.0)
    monkeypatch.setattr(fleet_policy, "FIRST_WORD_S", 0.25)
    with servers(part()) as (s3,), socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        queued = [socket.socket() for _ in range(4)]
        for each in queued:
            each.setblocking(False)
            each.connect_ex(deaf.getsockname())

        async def many(mount: Mount) -> None:
            for start in range(0, 3000, 1000):
                assert await mount.get(start) is Tier.S3
            assert mount.fleet.state is State.UNKNOWN

        run(s3, f"http://127.0.0.1:{deaf.getsockname()[1]}", many)
        for each in queued:
            each.close()


def test_a_silent_cache_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_cache, "SILENCE_TIMEOUT_S", 0.3)
    hold = threading.Event()
    with servers(part(), lambda _: hold.wait(30)) as (s3, cache):

        async def one(mount: Mount) -> None:
            assert await mount.get() is Tier.S3

        mount = run(s3, url(cache), one)
        hold.set()
        assert mount.fleet.results == {"silent": 1}


def test_after_its_rest_one_request_tries() -> None:
    with servers(part(), refusal(500)) as (s3, cache):

        async def rest(mount: Mount) -> None:
            assert await mount.get() is Tier.S3
            mount.fleet._rests_until_s = trio.current_time()  # REST_S later
            assert await mount.fleet.may_be_asked(), "the trial"
            assert not await mount.fleet.may_be_asked(), "and no other"
            mount.fleet.let_go()
            cache.answer = part()
            assert await mount.get() is Tier.FLEET
            assert mount.fleet.state is State.USED and mount.fleet.trouble is None

        run(s3, url(cache), rest)
        assert REST_S == 30


def test_requests_of_the_cache_are_not_hedged(monkeypatch: pytest.MonkeyPatch) -> None:
    """However late it is: another request of each node would reach S3."""
    monkeypatch.setattr("lazyfs.fetch.concurrency.HedgeTimer.delay_s", 0.05)
    hold = threading.Event()

    def slow(handler: Any) -> None:
        hold.wait(30)
        part()(handler)

    with servers(part(), slow) as (s3, cache):

        async def waits(mount: Mount) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(mount.get)
                await trio.sleep(1)  # twenty times what makes a request late
                hold.set()
            assert mount.recorder.hedges == 0

        run(s3, url(cache), waits)
        assert (s3.asked, cache.asked) == (0, 1)


@pytest.mark.parametrize(
    "text",
    ["https://a:1", "http://a", "unix:a", "http://a:1/x", "http://u@a:1", "a:1", "http://a:x", ""],
)
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="http://HOST:PORT"):
        MountOptions.parse(("--{name}", {"fleet-cache": text}))


def test_off_is_none() -> None:
    options = MountOptions.parse(("--{name}", {"fleet-cache": "off"}))
    assert options.fleet_cache is None
