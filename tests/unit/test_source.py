"""A source before a service that answers as it is told."""

from __future__ import annotations

import gzip
import http.server
import json
import socket
import ssl
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import pytest
from certificates import make_certificates
from test_listing_page import entry, page, prefix

from lazyfs import errors
from lazyfs.errors import BadRequestError, SourceError
from lazyfs.listed_object import ListedObject
from lazyfs.options.mount_options import MountOptions
from lazyfs.store import http as transport
from lazyfs.store import http_answer, listing, range_reader, servers
from lazyfs.store import s3_source as sources
from lazyfs.store.credentials import StaticCredentials, WebIdentity, credentials_from
from lazyfs.store.http import Proxy
from lazyfs.store.listing_page import Hidden, Page
from lazyfs.store.resolved_source import Endpoint, ResolvedSource, TimedCredentials
from lazyfs.store.s3_source import S3Source
from lazyfs.store.signing import SigningCredentials
from lazyfs.store.url import SourceUrl

PROXY = Proxy("proxy", 80, {"a": "b"})
ENDPOINT = Endpoint("eu-west-1", "s3", "http://127.0.0.1:9", "/bucket/", "/etc/ca.pem", PROXY)
URL = SourceUrl.parse("s3://bucket/m")
DATA = bytes(range(256)) * 16
PIN = ListedObject("m/k", len(DATA), '"v1"', 0, "m/k")
ANSWER = tuple[int, dict[str, str], bytes]


class Request:
    """What was asked: `query` and `headers` by name, headers in lower case."""

    def __init__(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        self.body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        url = urlsplit(handler.path)
        self.method, self.path, self.target = handler.command, url.path, handler.path
        self.query = dict(parse_qsl(url.query, keep_blank_values=True))
        self.headers = {name.lower(): value for name, value in handler.headers.items()}
        self.port: int = handler.client_address[1]

    @property
    def range(self) -> tuple[int, int]:
        start, _, end = self.headers["range"].removeprefix("bytes=").partition("-")
        return int(start), int(end)


class Service:
    """An S3 of which a test says how it answers.

    Args:
        pair: a certificate and its key, to serve https.
    """

    def __init__(self, answer: Callable[[Request], ANSWER], *pair: Path) -> None:
        self.answer = answer
        self.requests: list[Request] = []
        service = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                request = Request(self)
                service.requests.append(request)
                status, headers, body = service.answer(request)
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_HEAD = do_POST = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if pair:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(*pair)
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.url = f"http{'s' * bool(pair)}://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True).start()

    def source(self, *, authorities: Path = Path("/none"), **options: Any) -> S3Source:
        endpoint = Endpoint("us-east-1", "s3", self.url, "/bucket/", str(authorities), None)
        timed = TimedCredentials(SigningCredentials("id", "secret"))
        return S3Source(URL, MountOptions(**options), None, ResolvedSource(endpoint, timed, None))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[Request], ANSWER]], Service]]:
    services: list[Service] = []

    def make(answer: Callable[[Request], ANSWER]) -> Service:
        services.append(Service(answer))
        return services[-1]

    yield make
    for service in services:
        service.close()


Serve = Callable[[Callable[[Request], ANSWER]], Service]


def refusal(status: int, code: str, **headers: str) -> ANSWER:
    body = f"<Error><Code>{code}</Code><Message>as told</Message></Error>"
    return status, {name.replace("_", "-"): text for name, text in headers.items()}, body.encode()


def part(request: Request, etag: str = '"v1"', data: bytes = DATA) -> ANSWER:
    start, end = request.range
    body = data[start : end + 1]
    told = f"bytes {start}-{start + len(body) - 1}/{len(data)}"
    return 206, {"Content-Range": told, "ETag": etag}, body


# What another process needs to know


@pytest.mark.parametrize(
    "timed",
    [None, TimedCredentials(SigningCredentials("id", "s", "t"), 12.5),
     TimedCredentials(SigningCredentials("id", "s"))],
)  # fmt: skip
@pytest.mark.parametrize(
    "first",
    [None, Page([ListedObject("m/ä", 3, '"e"', 10**18, "m/ä")], ["m/a/"], "next",
                [Hidden("%ff", "not UTF-8")])],
)  # fmt: skip
@pytest.mark.parametrize("proxy", [None, PROXY])
def test_a_resolved_source_can_be_passed_to_another_process(
    timed: TimedCredentials | None, first: Page | None, proxy: Proxy | None
) -> None:
    endpoint = Endpoint("eu-west-1", "s3", "https://host", "/", "/etc/ca.pem", proxy)
    found = ResolvedSource(endpoint, timed, first)
    assert ResolvedSource.of_json(json.loads(json.dumps(found.as_json()))) == found


def test_secrets_are_not_shown() -> None:
    timed = TimedCredentials(SigningCredentials("the-id", "the-secret", "the-token"))
    found = ResolvedSource(ENDPOINT, timed, None)
    assert not [word for word in ("the-id", "the-secret", "the-token") if word in repr(found)]


def test_a_listed_page_is_given_once(serve: Serve) -> None:
    service = serve(lambda _: (200, {}, page(entry("m/a"))))
    endpoint = Endpoint("us-east-1", "s3", service.url, "/bucket/", "/none", None)
    first = Page([], [], None)
    source = S3Source(URL, MountOptions(no_sign_request=True), None,
                    ResolvedSource(endpoint, None, first))  # fmt: skip
    assert source.list_page("m/") is first
    assert [each.key for each in source.list_page("m/").objects] == ["m/a"]


# Credentials


class Resolver:
    """In the place of botocore.

    Args:
        only: the credentials that it always finds; None: others each time.
    """

    def __init__(self, only: SigningCredentials | None = None) -> None:
        self.asked = 0
        self.only = only

    def credentials(self, anew: bool = False) -> TimedCredentials:
        self.asked += 1
        found = self.only or SigningCredentials(f"id-{self.asked}", "s")
        return TimedCredentials(found, time.time() + 300)

    def replace_credentials(self, credentials: object) -> None: ...


def signed_with(serve: Serve, given: Any, found: TimedCredentials, new: Any) -> tuple[str, int]:
    """The key id of a request once others were given, and how often botocore was asked."""
    service = serve(lambda _: (200, {}, page(entry("m/a"))))
    endpoint = Endpoint("us-east-1", "s3", service.url, "/bucket/", "/none", None)
    source = S3Source(URL, MountOptions(), given, ResolvedSource(endpoint, found, None))
    resolver = Resolver()
    source._resolver = resolver  # type: ignore[assignment]
    if new:
        source.set_credentials(new)
    source.list_page("m/")
    signed = service.requests[-1].headers["authorization"]
    return signed.split("Credential=")[1].split("/")[0], resolver.asked


def test_credentials_that_were_found_are_used_until_they_end(serve: Serve) -> None:
    found = SigningCredentials("found", "s")
    assert signed_with(serve, None, TimedCredentials(found), None) == ("found", 0)
    ended = TimedCredentials(found, time.time() - 1)
    assert signed_with(serve, None, ended, None) == ("id-1", 1)


def test_given_credentials_are_replaced(serve: Serve) -> None:
    first, second = StaticCredentials("one", "s"), StaticCredentials("two", "s", "token")
    found = TimedCredentials(SigningCredentials("one", "s"))
    assert signed_with(serve, first, found, second) == ("two", 0)


def test_given_credentials_sign_when_none_are_known_yet(serve: Serve) -> None:
    """As in a mount that goes on after its worker was replaced."""
    service = serve(lambda _: (200, {}, page(entry("m/a"))))
    endpoint = Endpoint("us-east-1", "s3", service.url, "/bucket/", "/none", None)
    source = S3Source(
        URL, MountOptions(endpoint_url=service.url), StaticCredentials("one", "s"),
        ResolvedSource(endpoint, None, None),
    )  # fmt: skip
    source.list_page("m/")
    assert "Credential=one/" in service.requests[0].headers["authorization"]
    found = source.resolved(None).credentials
    assert found is not None and found.credentials == SigningCredentials("one", "s")


@pytest.mark.parametrize(("role", "expected"), [("role", "found"), ("another", "id-1")])
def test_a_new_token_of_a_role_is_for_the_next_credentials(
    serve: Serve, role: str, expected: str
) -> None:
    first, second = WebIdentity("role", "pod", "old"), WebIdentity(role, "pod", "new")
    found = TimedCredentials(SigningCredentials("found", "s"), time.time() + 300)
    assert signed_with(serve, first, found, second)[0] == expected


def test_credentials_that_were_not_given_are_not_replaced() -> None:
    found = TimedCredentials(SigningCredentials("found", "s"))
    source = S3Source(URL, MountOptions(), None, ResolvedSource(ENDPOINT, found, None))
    with pytest.raises(BadRequestError, match="without credentials of its own"):
        source.set_credentials(StaticCredentials("one", "s"))


def test_keys_that_cannot_be_sent_are_refused_and_not_shown() -> None:
    found = TimedCredentials(SigningCredentials("found", "s"))
    given = StaticCredentials("one", "s")
    source = S3Source(URL, MountOptions(), given, ResolvedSource(ENDPOINT, found, None))
    with pytest.raises(BadRequestError, match=r"^s3://bucket/m: the access key id is") as told:
        source.set_credentials(StaticCredentials("the id", "s"))
    assert "the id" not in str(told.value)


def test_a_resumed_mount_does_not_wait_for_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data on this machine needs none."""
    monkeypatch.setattr(sources, "CREDENTIALS_SOON_S", 0.05)
    asked, over = threading.Event(), threading.Event()

    class Slow(Resolver):
        def credentials(self, anew: bool = False) -> TimedCredentials:
            asked.set()
            over.wait(30)
            return super().credentials(anew)

    for unsigned in (True, False):
        options = MountOptions(no_sign_request=unsigned)
        source = S3Source(URL, options, None, ResolvedSource(ENDPOINT, None, None))
        source._resolver = Slow()  # type: ignore[assignment]
        source.prepare()
        assert not asked.is_set() if unsigned else asked.wait(20)
    assert source.resolved(None).credentials is None
    over.set()


def test_credentials_that_are_there_soon_are_waited_for() -> None:
    source = S3Source(URL, MountOptions(), None, ResolvedSource(ENDPOINT, None, None))
    source._resolver = Resolver()  # type: ignore[assignment]
    source.prepare()
    found = source.resolved(None).credentials
    assert found is not None and found.credentials.access_key_id == "id-1"


def test_a_source_without_credentials_goes_on_without() -> None:
    class Empty(Resolver):
        def credentials(self, anew: bool = False) -> TimedCredentials:
            raise errors.AccessDeniedError("none")

    source = S3Source(URL, MountOptions(), None, ResolvedSource(ENDPOINT, None, None))
    source._resolver = Empty()  # type: ignore[assignment]
    source.prepare()
    assert source.resolved(None).credentials is None


def test_a_source_has_names() -> None:
    source = S3Source(
        URL, MountOptions(no_sign_request=True), None, ResolvedSource(ENDPOINT, None, None)
    )
    assert (source.region, source.endpoint) == ("eu-west-1", "http://127.0.0.1:9/bucket/")
    assert source.name("m/k") == "s3://bucket/m/k"


def test_fields_that_are_no_credentials_are_named_without_their_values() -> None:
    with pytest.raises(ValueError, match=r"not credentials: access_key_id, token$") as told:
        credentials_from({"token": "the-token", "access_key_id": "the-id"})
    assert "the-" not in str(told.value)


@pytest.mark.parametrize("worked", [True, False])
def test_a_signature_that_held_before_may_hold_again(serve: Serve, worked: bool) -> None:
    """A Secret was replaced, and has not arrived here; or it never was the right one."""
    answers = iter([part] * worked)
    service = serve(lambda request: next(answers, signature_refused)(request))
    source = service.source()
    source._resolver = Resolver(SigningCredentials("id", "secret"))  # type: ignore[assignment]
    if worked:
        assert read(source) == DATA[256:768]
    kind = errors.CredentialsExpiredError if worked else errors.AccessDeniedError
    with pytest.raises(kind, match="SignatureDoesNotMatch"):
        read(source)


def signature_refused(_: Request) -> ANSWER:
    return refusal(403, "SignatureDoesNotMatch")


# What another process finds out


def test_a_source_is_resolved_with_its_first_page(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing_of = listed(part)
    service = serve(listing_of)
    options = MountOptions(endpoint_url=service.url, no_sign_request=True)
    found = S3Source.resolve(URL, options)
    assert (found.endpoint.server, found.endpoint.path) == (service.url, "/bucket/")
    assert found.credentials is None
    assert found.page is not None and [each.key for each in found.page.objects] == ["m/k"]
    asked = len(service.requests)
    resumed = S3Source.resolve(URL, options, region="eu-west-1")
    assert (resumed.endpoint.region, resumed.page) == ("eu-west-1", None)
    assert len(service.requests) == asked, "a resumed mount needs no S3"


def test_an_object_that_is_slow_to_come_does_not_hold_a_mount(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(transport, "SILENCE_TIMEOUT_S", 0.3)
    closing = threading.Event()
    reads = []

    def silent(request: Request) -> ANSWER:
        reads.append(request)
        closing.wait(30)
        return part(request)

    try:
        options = MountOptions(endpoint_url=serve(listed(silent)).url, no_sign_request=True)
        assert S3Source.resolve(URL, options).page is not None
    finally:
        closing.set()
    assert len(reads) == 2, "over the kept connection, and over a new one"
    assert "listed, but not read yet: s3://bucket/m/k: no usable answer" in caplog.text


def test_no_connection_is_not_taken_for_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(address: tuple[str, int], timeout_s: float) -> socket.socket:
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", never)
    endpoint = Endpoint("us-east-1", "s3", "http://127.0.0.1:9", "/bucket/", "/none", None)
    source = S3Source(
        URL, MountOptions(no_sign_request=True), None, ResolvedSource(endpoint, None, None)
    )
    with pytest.raises(errors.UnavailableError, match="no connection within 5 s"):
        read(source)


# Listings


def keys(source: S3Source, delimiter: str = "") -> list[str]:
    """All that is listed, page by page."""
    found, token = [], None
    for _ in range(20):
        one = source.list_page("m/", token, delimiter=delimiter)
        found += [each.key for each in one.objects] + one.prefixes
        token = one.next_token
        if token is None:
            return found
    raise AssertionError("the listing has no end")


STORED = [f"m/{number:02}" for number in range(7)]


def after(request: Request, *names: str) -> list[str]:
    last = max((request.query.get(name, "") for name in names), default="")
    return [key for key in STORED if key > last]


def without_token(*names: str) -> Callable[[Request], ANSWER]:
    """Pages of three, of a service that heeds these parameters and gives no token."""

    def answer(request: Request) -> ANSWER:
        rest = after(request, *names)
        return 200, {}, page(*map(entry, rest[:3]), IsTruncated=str(len(rest) > 3).lower())

    return answer


@pytest.mark.parametrize("names", [["start-after"], ["marker"], ["start-after", "marker"]])
def test_truncated_without_a_token_goes_on_after_the_last_key(
    serve: Serve, names: list[str]
) -> None:
    assert keys(serve(without_token(*names)).source()) == STORED


def test_a_listing_that_does_not_advance_is_an_error(serve: Serve) -> None:
    with pytest.raises(SourceError, match="does not advance"):
        keys(serve(without_token()).source())


def test_common_prefixes_are_passed_as_a_whole(serve: Serve) -> None:
    def answer(request: Request) -> ANSWER:
        last = request.query.get("start-after", "")
        below = ["m/a/x", "m/a/y", "m/b/x", "m/c/x"]
        found = sorted({key[:4] for key in below if key > last})
        more = str(len(found) > 1).lower()
        return 200, {}, page(*map(prefix, found[:1]), IsTruncated=more)

    assert keys(serve(answer).source(), "/") == ["m/a/", "m/b/", "m/c/"]


def test_an_empty_page_goes_on(serve: Serve) -> None:
    def answer(request: Request) -> ANSWER:
        if "continuation-token" not in request.query:
            return 200, {}, page(IsTruncated="true", NextContinuationToken="a +/=é")
        assert request.query["continuation-token"] == "a +/=é"
        return 200, {}, page(entry("m/a"))

    assert keys(serve(answer).source()) == ["m/a"]


def test_truncated_and_empty_and_without_a_token(serve: Serve) -> None:
    source = serve(lambda _: (200, {}, page(IsTruncated="true"))).source()
    with pytest.raises(SourceError, match="more follows"):
        source.list_page("m/")


def test_version_1_where_version_2_is_not_known(serve: Serve) -> None:
    def answer(request: Request) -> ANSWER:
        if "list-type" in request.query:
            return refusal(501, "NotImplemented")
        return without_token("marker")(request)

    service = serve(answer)
    assert keys(service.source()) == STORED
    assert sum("list-type" in request.query for request in service.requests) == 1


@pytest.mark.parametrize("encode", [lambda key: quote(key, safe="/+"), lambda key: key])
def test_the_meaning_of_plus_is_tested_if_a_page_does_not_show_it(
    serve: Serve, encode: Callable[[str], str]
) -> None:
    def answer(request: Request) -> ANSWER:
        if "encoding-type" in request.query:
            return 200, {}, page(entry(encode("m/a+b")), EncodingType="url")
        return 200, {}, page(entry("m/a+b"))

    service = serve(answer)
    source = service.source()
    assert keys(source) == keys(source) == ["m/a+b"]
    assert len(service.requests) == 3, "it is asked once"


def test_a_plus_of_aws_is_a_space(serve: Serve) -> None:
    def answer(request: Request) -> ANSWER:
        if "encoding-type" in request.query:
            return 200, {}, page(entry("m/a+b"), EncodingType="url")
        return 200, {}, page(entry("m/a b"))

    assert keys(serve(answer).source()) == ["m/a b"]


@pytest.mark.parametrize("body", [b"", b"<html/>", b"{}", page(entry())[:-30]])
def test_answers_that_are_not_listings_are_retried(serve: Serve, body: bytes) -> None:
    source = serve(lambda _: (200, {}, body)).source()
    with pytest.raises(SourceError, match="not a listing of S3") as raised:
        source.list_page("m/")
    assert raised.value.transient


def test_an_error_in_an_answer_of_200(serve: Serve) -> None:
    source = serve(lambda _: refusal(200, "SlowDown")).source()
    with pytest.raises(errors.ThrottledError):
        source.list_page("m/")


def test_a_listing_of_any_length_is_not_kept_in_memory(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "MOST_BYTES", 10_000)
    for body in (page(*[entry()] * 200), gzip.compress(page(*[entry()] * 200))):
        encoding = {"Content-Encoding": "gzip"} if body[:1] == b"\x1f" else {}
        source = serve(lambda _, b=body, e=encoding: (200, e, b)).source()  # type: ignore[misc]
        with pytest.raises(BadRequestError, match="no listing has"):
            source.list_page("m/")


def test_a_listing_is_not_unpacked_beyond_its_bounds(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "MOST_BYTES", 1 << 20)
    body = gzip.compress(bytes(64 << 20))
    source = serve(lambda _: (200, {"Content-Encoding": "gzip"}, body)).source()
    tracemalloc.start()
    try:
        with pytest.raises(BadRequestError, match="has over 1 MiB, which no listing has"):
            source.list_page("m/")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_listing_that_a_proxy_has_packed(serve: Serve) -> None:
    body = gzip.compress(page(entry("m/a")))
    assert keys(serve(lambda _: (200, {"Content-Encoding": "gzip"}, body)).source()) == ["m/a"]


# Ranges


def read(source: S3Source, start: int = 256, length: int = 512) -> bytes:
    return bytes(source.ranges.read(PIN, start, length))


def test_range_and_condition_are_sent_and_not_signed(serve: Serve) -> None:
    service = serve(part)
    assert read(service.source(requester_pays=True)) == DATA[256:768]
    headers = service.requests[0].headers
    assert (headers["range"], headers["if-match"]) == ("bytes=256-767", '"v1"')
    signed = headers["authorization"].split("SignedHeaders=")[1].split(",")[0]
    assert signed == "host;x-amz-content-sha256;x-amz-date;x-amz-request-payer"


def test_answers_of_another_version_reach_no_reader(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(body: object, into: memoryview) -> None:
        raise AssertionError("its bytes were taken")

    for answer in (
        lambda request: part(request, '"v2"', DATA[::-1]),
        lambda request: part(request, 'W/"v2"', DATA[::-1]),
        lambda request: part(request, "", DATA + b"x"),
    ):
        monkeypatch.setattr(http_answer.ComingBody, "read_into", nobody)
        with pytest.raises(errors.ObjectChangedError):
            serve(answer).source().ranges.read(PIN, 0, 100)


@pytest.mark.parametrize(
    ("status", "code"), [(412, "PreconditionFailed"), (501, "NotImplemented"),
                         (400, "InvalidArgument")],
)  # fmt: skip
def test_a_service_that_does_not_take_the_condition(serve: Serve, status: int, code: str) -> None:
    def answer(request: Request) -> ANSWER:
        return refusal(status, code) if "if-match" in request.headers else part(request)

    service = serve(answer)
    source = service.source()
    assert read(source) == read(source) == DATA[256:768]
    assert ["if-match" in request.headers for request in service.requests] == [True, False, False]


def test_a_condition_that_does_not_hold(serve: Serve) -> None:
    def answer(request: Request) -> ANSWER:
        if "if-match" in request.headers:
            return refusal(412, "PreconditionFailed")
        return part(request, '"v2"')

    with pytest.raises(errors.ObjectChangedError):
        read(serve(answer).source())


def test_a_weak_tag_is_no_condition(serve: Serve) -> None:
    service = serve(part)
    weak = ListedObject("m/k", len(DATA), 'W/"v1"', 0, "m/k")
    assert service.source().ranges.read(weak, 0, 10) == DATA[:10]
    assert "if-match" not in service.requests[0].headers


def test_a_service_that_ignores_ranges(serve: Serve) -> None:
    source = serve(lambda _: (200, {"ETag": '"v1"'}, DATA)).source()
    assert read(source) == read(source) == DATA[256:768]
    assert read(source, 0, len(DATA)) == DATA


def test_a_range_may_come_with_200(serve: Serve) -> None:
    """If its length and its ETag say that it is the range."""
    service = serve(lambda _: (200, {"ETag": '"v1"'}, DATA[256:768]))
    assert read(service.source()) == DATA[256:768]


def test_idle_connections_are_closed_after_a_while(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve(part)
    source = service.source()
    read(source)
    source.close_idle(transport.MOST_IDLE_S)
    read(source)
    with monkeypatch.context() as later:
        now_s = time.monotonic() + transport.MOST_IDLE_S
        later.setattr(time, "monotonic", lambda: now_s)
        source.close_idle(transport.MOST_IDLE_S)
    read(source)
    ports = [request.port for request in service.requests]
    assert ports[0] == ports[1] != ports[2]


@pytest.mark.parametrize("is_trusted", [True, False])
def test_the_given_authorities_are_trusted_and_no_others(tmp_path: Path, is_trusted: bool) -> None:
    authority, *pair = make_certificates(tmp_path / "ours")
    other = make_certificates(tmp_path / "other")[0]
    service = Service(part, *pair)
    try:
        source = service.source(authorities=authority if is_trusted else other)
        if is_trusted:
            assert read(source) == DATA[256:768]
        else:
            with pytest.raises(errors.UntrustedError, match="--ca-bundle"):
                read(source)
    finally:
        service.close()


@pytest.mark.parametrize(
    "answer",
    [
        lambda _: (404, {}, b"nginx"),
        lambda _: (200, {}, b"<html>a login page</html>"),
        lambda _: (206, {"Content-Range": "bytes 0-1/2"}, b"xx"),
        lambda _: (200, {"Content-Length": "9"}, b""),
    ],
)
def test_errors_do_not_say_what_is_on_a_server_that_a_user_chose(
    serve: Serve, answer: Callable[[Request], ANSWER], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "must_be_elsewhere", lambda address: None)
    with pytest.raises(errors.UnavailableError) as told:
        read(serve(answer).source(refuse_local=True))
    assert str(told.value) == "s3://bucket/m/k: no usable answer of S3"


def test_objects_stored_compressed_arrive_as_stored(serve: Serve) -> None:
    def answer(request: Request) -> ANSWER:
        if "gzip" not in request.headers.get("accept-encoding", ""):
            return 200, {"ETag": '"v1"'}, DATA * 3
        status, headers, body = part(request)
        return status, headers | {"Content-Encoding": "gzip"}, body

    assert read(serve(answer).source()) == DATA[256:768]


def test_a_proxy_that_compresses_is_asked_not_to(serve: Serve) -> None:
    def answer(request: Request) -> ANSWER:
        status, headers, body = part(request, 'W/"v1"')
        if "gzip" not in request.headers["accept-encoding"]:
            return status, headers, body
        return status, headers | {"Content-Encoding": "gzip"}, gzip.compress(body)

    service = serve(answer)
    source = service.source()
    assert read(source) == read(source) == DATA[256:768]
    asked = [request.headers["accept-encoding"] for request in service.requests]
    assert asked == ["identity, gzip", "identity", "identity"]


def test_a_range_may_come_in_parts(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: Request) -> ANSWER:
        start, end = request.range
        request.headers["range"] = f"bytes={start}-{min(end, start + 199)}"
        return part(request)

    service = serve(answer)
    source = service.source()
    assert read(source) == DATA[256:768]
    assert [request.range[0] for request in service.requests] == [256, 456, 656]
    monkeypatch.setattr(range_reader, "MOST_PARTS", 2)
    with pytest.raises(errors.BadResponseError, match="2 answers gave 400 bytes"):
        read(source)


@pytest.mark.parametrize("kept", [True, False])
def test_what_came_of_an_answer_that_is_cut_off_is_not_asked_for_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    def answer(request: Request) -> ANSWER:
        status, headers, body = part(request)
        headers |= {"Content-Length": str(len(body)), "Connection": "close"}
        return status, headers, body[:200]

    monkeypatch.setattr(range_reader, "LEAST_KEPT", 200 if kept else 201)
    service = serve(answer)
    if kept:
        assert read(service.source()) == DATA[256:768]
        assert [request.range[0] for request in service.requests] == [256, 456, 656]
    else:
        with pytest.raises(errors.UnavailableError, match="312 bytes are missing"):
            read(service.source())


def test_parts_of_two_versions_are_not_put_together(serve: Serve) -> None:
    def answer(request: Request) -> ANSWER:
        start, end = request.range
        request.headers["range"] = f"bytes={start}-{min(end, start + 199)}"
        return part(request, '"v1"' if start == 256 else '"v2"')

    with pytest.raises(errors.ObjectChangedError):
        read(serve(answer).source())


@pytest.mark.parametrize("size", [18, 5000])
def test_the_page_of_a_proxy_instead_of_a_range(serve: Serve, size: int) -> None:
    body = (b"<html>sign in</html>" * 300)[:size]
    source = serve(lambda _: (200, {"Content-Type": "text/html"}, body)).source()
    with pytest.raises(errors.BadResponseError):
        read(source)


def test_a_page_of_no_length_is_no_object(serve: Serve) -> None:
    def answer(_: Request) -> ANSWER:
        body = b"x" * len(DATA) + b"more"
        chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        return 200, {"Transfer-Encoding": "chunked", "Content-Length": ""}, chunks

    with pytest.raises(errors.BadResponseError, match="more bytes"):
        read(serve(answer).source(), 0, len(DATA))


def test_a_page_of_no_length_that_is_cut_off_is_no_part_of_an_object(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only its end would have shown that it is too short."""

    def answer(request: Request) -> ANSWER:
        if len(service.requests) > 1:
            return part(request)
        return 200, {"Content-Length": "", "Connection": "close"}, b"<html>" * 50

    monkeypatch.setattr(range_reader, "LEAST_KEPT", 1)
    service = serve(answer)
    source = service.source()
    with pytest.raises(errors.UnavailableError, match="are missing"):
        read(source, 0, len(DATA))
    assert read(source, 0, len(DATA)) == DATA


def test_the_time_of_the_service_is_used_if_it_refuses_ours(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    def answer(request: Request) -> ANSWER:
        signed = datetime.strptime(request.headers["x-amz-date"], "%Y%m%dT%H%M%S%z")
        now = datetime.now(UTC) + timedelta(hours=5)
        if abs(now - signed) < timedelta(minutes=15):
            return part(request)
        body = f"<Code>RequestTimeTooSkewed</Code><ServerTime>{now.isoformat()}</ServerTime>"
        return 403, {}, body.encode()

    service = serve(answer)
    source = service.source()
    assert read(source) == read(source) == DATA[256:768]
    assert len(service.requests) == 3
    assert "set the clock" in caplog.text


def test_a_service_that_takes_no_time_at_all_is_asked_once_more(serve: Serve) -> None:
    service = serve(lambda _: refusal(403, "RequestTimeTooSkewed"))
    with pytest.raises(errors.CredentialsExpiredError):
        read(service.source())
    assert len(service.requests) == 2


def test_keys_of_any_kind_are_asked_for(serve: Serve) -> None:
    service = serve(part)
    for key in ("m/a b+c%20", "m/ä/€", "m/?x=1#y", "m/~'\"\\"):
        pin = ListedObject(key, len(DATA), '"v1"', 0, key)
        service.source().ranges.read(pin, 0, 10)
        assert unquote(service.requests[-1].path) == f"/bucket/{key}"


# Redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_another_service_is_asked_without_credentials(serve: Serve, status: int) -> None:
    cdn = serve(lambda request: part(request, '"of-the-cdn"'))
    location = f"{cdn.url.replace('127.0.0.1', 'localhost')}?sig=abc"
    gateway = serve(lambda _: (status, {"Location": location}, b""))
    assert read(gateway.source(requester_pays=True)) == DATA[256:768]
    asked = cdn.requests[0]
    assert asked.target == "/?sig=abc"
    assert asked.headers["range"] == "bytes=256-767"
    told = [name for name in asked.headers if name.startswith(("auth", "x-amz", "if-"))]
    assert not told, "credentials and tags are of the first one"


def test_any_number_of_servers_behind_redirects(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "MOST_SERVERS", 3)
    cdns = [serve(lambda request: part(request, '"c"')) for _ in range(5)]
    turns = iter(cdns * 2)
    gateway = serve(lambda _: (302, {"Location": f"{next(turns).url}/x?sig=1"}, b""))
    source = gateway.source()
    for _ in range(10):
        assert read(source) == DATA[256:768]
    assert len(source._client._servers._servers) == 3
    assert next(iter(source._client._servers._servers)) == gateway.url


def test_another_path_of_the_same_service_is_signed_anew(serve: Serve) -> None:
    def answer(request: Request) -> ANSWER:
        if request.path == "/bucket/m/k":
            return 307, {"Location": "/elsewhere/m/k?x=1"}, b""
        return part(request)

    service = serve(answer)
    assert read(service.source()) == DATA[256:768]
    first, second = (request.headers["authorization"] for request in service.requests)
    assert first != second


def test_a_location_is_escaped_and_signed_as_s3_does(serve: Serve) -> None:
    def answer(request: Request) -> ANSWER:
        if request.path == "/bucket/m/k":
            return 307, {"Location": "/v=2/\xc3\xbc k?b=/&a=%2F"}, b""
        return part(request)

    service = serve(answer)
    assert read(service.source()) == DATA[256:768]
    assert service.requests[1].path == "/v%3D2/%C3%BC%20k"
    assert service.requests[1].target.endswith("?a=%2F&b=%2F")


def test_an_object_of_another_size_behind_a_redirect(serve: Serve) -> None:
    cdn = serve(lambda request: part(request, '"c"', DATA + b"x"))
    gateway = serve(lambda _: (302, {"Location": f"{cdn.url}/?sig=1"}, b""))
    with pytest.raises(errors.ObjectChangedError):
        read(gateway.source())


@pytest.mark.parametrize(
    "location",
    ["ftp://x/", "http://u:p@x/", "http:///", "http://[::1/", "http://169.254.169.254/latest"],
)
def test_redirects_that_are_not_followed(
    serve: Serve, location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "CONNECT_TIMEOUT_S", 0.2)
    gateway = serve(lambda _: (302, {"Location": location}, b""))
    with pytest.raises(SourceError):
        read(gateway.source())


def test_redirects_that_go_in_a_circle(serve: Serve) -> None:
    service = serve(lambda _: (302, {"Location": "/bucket/m/k"}, b""))
    with pytest.raises(BadRequestError, match="redirected more than"):
        read(service.source())


def test_the_301_of_s3_is_about_the_region(serve: Serve) -> None:
    def answer(_: Request) -> ANSWER:
        return refusal(301, "PermanentRedirect", Location="/x", x_amz_bucket_region="eu-west-1")

    with pytest.raises(errors.WrongRegionError):
        read(serve(answer).source())


# The begin of a mount


def begin(service: Service, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Page:
    monkeypatch.setattr(sources, "FIRST_PAUSE_S", 0.0)
    return service.source(**options).begin()


def listed(answer: Callable[[Request], ANSWER]) -> Callable[[Request], ANSWER]:
    """One object is listed, and its ranges are answered so."""

    def either(request: Request) -> ANSWER:
        if request.path == "/bucket":
            item = entry("m/k", ETag='"v1"', Size=str(len(DATA)))
            return 200, {}, page(item)
        return answer(request)

    return either


def test_a_readable_range_is_enough_to_mount(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    service = serve(listed(part))
    assert len(begin(service, monkeypatch).objects) == 1
    assert [request.path for request in service.requests] == ["/bucket", "/bucket/m/k"]


def test_ranges_may_show_the_region_that_listings_do_not(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(request: Request) -> ANSWER:
        if "/eu-north-1/" in request.headers["authorization"]:
            return part(request)
        told = "the region 'us-east-1' is wrong; expecting 'eu-north-1'"
        body = f"<Code>AuthorizationHeaderMalformed</Code><Message>{told}</Message>"
        return 400, {}, body.encode()

    service = serve(listed(answer))
    monkeypatch.setenv("AWS_ENDPOINT_URL", service.url)
    source = service.source()
    source.begin()
    assert source.region == "eu-north-1"
    assert read(source) == DATA[256:768]


@pytest.mark.parametrize(
    ("status", "code"),
    [(403, "AccessDenied"), (403, "InvalidObjectState"), (400, "KMS.DisabledException"),
     (404, "NoSuchKey"), (503, "SlowDown"), (500, "InternalError"), (403, "")],
)  # fmt: skip
def test_errors_of_one_object_do_not_refuse_the_mount(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    status: int, code: str,
) -> None:  # fmt: skip
    begin(serve(listed(lambda _: refusal(status, code))), monkeypatch)
    assert code in caplog.text
    assert "m/k" in caplog.text


@pytest.mark.parametrize(
    "answer",
    [
        (302, {"Location": "http://127.0.0.1:9/x?sig=1"}, b""),
        refusal(301, "PermanentRedirect"),
        (206, {}, b"x"),
        (500, {}, b""),
    ],
)
def test_an_endpoint_without_s3_refuses_the_mount(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, answer: ANSWER
) -> None:
    with pytest.raises(SourceError):
        begin(serve(listed(lambda _: answer)), monkeypatch)


def test_transient_errors_do_not_refuse_the_mount(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    troubles = [refusal(503, "SlowDown"), (200, {}, b"")]

    def answer(request: Request) -> ANSWER:
        return troubles.pop() if troubles else listed(part)(request)

    assert begin(serve(answer), monkeypatch).objects


@pytest.mark.parametrize(
    ("told_s", "pauses_s"),
    [(0, [0.3, 0.6]), (2, [2, 2]), (60, [5, 5])],
)
def test_the_first_requests_are_tried_a_few_times(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, told_s: int, pauses_s: list[float]
) -> None:
    slept_s: list[float] = []
    monkeypatch.setattr(sources.time, "sleep", slept_s.append)
    service = serve(lambda _: refusal(503, "SlowDown", Retry_After=str(told_s)))
    with pytest.raises(errors.ThrottledError):
        service.source().begin()
    assert len(service.requests) == 3
    assert slept_s == pytest.approx(pauses_s)


def test_what_waiting_does_not_help_refuses_the_mount_at_once(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources.time, "sleep", pytest.fail)
    service = serve(lambda _: refusal(403, "AccessDenied"))
    with pytest.raises(errors.AccessDeniedError):
        service.source().begin()
    assert len(service.requests) == 1


@pytest.mark.parametrize("region", [None, "us-east-1"])
def test_a_bucket_in_another_region_than_the_option_says(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, region: str | None
) -> None:
    def answer(request: Request) -> ANSWER:
        if "/eu-north-1/" in request.headers["authorization"]:
            return listed(part)(request)
        return refusal(301, "PermanentRedirect", x_amz_bucket_region="eu-north-1")

    service = serve(answer)
    monkeypatch.setenv("AWS_ENDPOINT_URL", service.url)
    source = service.source(region=region)
    if region is None:
        assert len(source.begin().objects) == 1
        assert source.region == "eu-north-1"
    else:
        words = r"s3://bucket/m: the bucket is in eu-north-1, not in us-east-1: use --region eu-no"
        with pytest.raises(errors.WrongRegionError, match=words):
            source.begin()


def test_objects_without_bytes_are_not_read_first(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    items = [entry("m/", ETag=None, Size="0"), entry("m/k", ETag='"v1"', Size=str(len(DATA)))]
    for shown in (items[:1], items):
        service = serve(
            lambda request, shown=shown: (  # type: ignore[misc]
                (200, {}, page(*shown)) if request.path == "/bucket" else part(request)
            )
        )
        begin(service, monkeypatch)
        paths = [request.path for request in service.requests]
        assert paths == ["/bucket", "/bucket/m/k"][: len(shown)]
    assert service.requests[1].range == (0, 0)
    assert not caplog.records


def test_objects_without_etags_are_logged(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def answer(request: Request) -> ANSWER:
        if request.path == "/bucket":
            return 200, {}, page(entry("m/k", ETag=None, Size=str(len(DATA))))
        return part(request)

    begin(serve(answer), monkeypatch)
    assert "no ETag" in caplog.text


# Checksums


def test_a_checksum_is_that_of_the_listed_version(serve: Serve) -> None:
    headers = {
        "ETag": '"v1"',
        "Content-Length": str(len(DATA)),
        "x-amz-checksum-crc32c": "AAAAAA==",
    }
    service = serve(lambda _: (200, headers, b""))
    found = service.source().checksum(PIN)
    assert found is not None
    assert found.kind == "CRC32C"
    asked = service.requests[0]
    assert (asked.method, asked.headers["x-amz-checksum-mode"]) == ("HEAD", "ENABLED")
    headers["ETag"] = '"v2"'
    with pytest.raises(errors.ObjectChangedError):
        service.source().checksum(PIN)


def test_a_checksum_is_asked_for_again_with_the_time_of_the_service(serve: Serve) -> None:
    head = 200, {"ETag": '"v1"', "Content-Length": str(len(DATA))}, b""
    answers = iter([refusal(403, "RequestTimeTooSkewed", x_amz_error_code="RequestTimeTooSkewed")])
    service = serve(lambda _: next(answers, head))
    assert service.source().checksum(PIN) is None
    assert [request.headers["x-amz-checksum-mode"] for request in service.requests] == (
        ["ENABLED"] * 2
    )


def test_a_service_that_keeps_no_checksums(serve: Serve) -> None:
    def answer(request: Request) -> ANSWER:
        if "x-amz-checksum-mode" in request.headers:
            return 501, {}, b""
        return 200, {"ETag": '"v1"', "Content-Length": str(len(DATA))}, b""

    assert serve(answer).source().checksum(PIN) is None


@pytest.mark.parametrize(
    ("status", "kind"), [(403, errors.AccessDeniedError), (404, errors.ObjectGoneError)]
)
def test_a_head_that_is_refused(serve: Serve, status: int, kind: type[SourceError]) -> None:
    with pytest.raises(kind):
        serve(lambda _: (status, {}, b"")).source().checksum(PIN)


@pytest.mark.parametrize("ahead_s", [3600, 0, -90, None])
def test_the_clock_of_the_service_is_compared(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, ahead_s: int | None
) -> None:
    def date(*_: object) -> str:
        return "" if ahead_s is None else formatdate(time.time() + ahead_s, usegmt=True)

    monkeypatch.setattr(http.server.BaseHTTPRequestHandler, "date_time_string", date)
    service = serve(lambda _: (200, {}, b""))
    skew_s = service.source().clock_skew_s()
    assert skew_s == (None if ahead_s is None else pytest.approx(ahead_s, abs=30))
    (request,) = service.requests
    assert (request.method, request.path) == ("GET", "/bucket")
    assert request.query == {"list-type": "2", "max-keys": "1", "prefix": "m/"}
