"""Requests to a service: what is sent, and what becomes of each failure."""

from __future__ import annotations

import http.client
import logging
import re
import ssl
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import certifi
import pytest
from certificates import make_certificates
from test_source import ANSWER, DATA, PIN, URL, Request, Serve, Service, part, refusal, serve

from lazyfs import __version__
from lazyfs.errors import (
    AccessDeniedError,
    BadRequestError,
    BadResponseError,
    CredentialsExpiredError,
    ObjectChangedError,
    SourceError,
    UnavailableError,
    UntrustedError,
)
from lazyfs.options.mount_options import MountOptions
from lazyfs.store import ranges, servers, signed_client
from lazyfs.store.addresses import BadAddressError
from lazyfs.store.cancel import Cancel, CancelledError
from lazyfs.store.http import Proxy, Transport
from lazyfs.store.http_answer import Answer
from lazyfs.store.live_credentials import LiveCredentials
from lazyfs.store.request import Request as Unsigned
from lazyfs.store.request import refuse
from lazyfs.store.resolved_source import Endpoint, ResolvedSource, TimedCredentials
from lazyfs.store.s3_source import S3Source
from lazyfs.store.signed_client import MOST_NOTED, MOST_REDIRECTS, Client
from lazyfs.store.signing import SigningCredentials

__all__ = ["serve"]
KEYS = SigningCredentials("id", "secret", "token")
ASKED = Unsigned("GET", "/bucket/k", "", {"Range": "bytes=0-9"})


def client_of(server: str, credentials: LiveCredentials | None = None, **given: Any) -> Client:
    endpoint = Endpoint("us-east-1", "s3", server, "/bucket/", certifi.where(), None)
    return Client("s3://bucket/m", endpoint, credentials, **given)


def status_of(client: Client, signed: dict[str, str] | None = None) -> int:
    def handle(answer: Answer, _: bool) -> int:
        return answer.status if answer.status == 200 else refuse(answer)

    return client.ask(ASKED, handle, "the object", Cancel(), signed)


def live(fetch: Callable[[bool], TimedCredentials] | None = None) -> LiveCredentials:
    return LiveCredentials(fetch or pytest.fail, TimedCredentials(KEYS))


@pytest.mark.parametrize("pays", [False, True])
@pytest.mark.parametrize("signed", [None, {"x-amz-checksum-mode": "ENABLED"}])
def test_all_that_is_sent(serve: Serve, pays: bool, signed: dict[str, str] | None) -> None:
    service = serve(lambda _: (200, {}, b""))
    status_of(client_of(service.url, live(), requester_pays=pays), signed)
    headers = service.requests[0].headers
    names = headers["authorization"].split("SignedHeaders=")[1].split(",")[0].split(";")
    more = (["x-amz-request-payer"] if pays else []) + list(signed or [])
    always = ["host", "x-amz-content-sha256", "x-amz-date", "x-amz-security-token"]
    assert sorted(names) == sorted(always + more)
    assert sorted(headers) == sorted(
        [*names, "authorization", "user-agent", "range", "accept-encoding"]
    )
    assert headers["user-agent"] == f"lazyfs/{__version__}"
    assert headers["x-amz-security-token"] == "token"
    assert headers.get("x-amz-request-payer") == ("requester" if pays else None)
    assert headers.get("x-amz-checksum-mode") == ("ENABLED" if signed else None)


def test_requests_of_nobody_are_not_signed(serve: Serve) -> None:
    service = serve(lambda _: (200, {}, b""))
    status_of(client_of(service.url))
    assert "authorization" not in service.requests[0].headers


def test_another_service_is_told_who_asks_and_no_more(serve: Serve) -> None:
    cdn = serve(lambda _: (200, {}, b""))
    ours = serve(lambda _: (302, {"Location": f"{cdn.url}/x?sig=1"}, b""))
    status_of(client_of(ours.url, live(), requester_pays=True))
    headers = cdn.requests[0].headers
    assert sorted(headers) == ["accept-encoding", "host", "range", "user-agent"]
    assert headers["user-agent"] == f"lazyfs/{__version__}"


@pytest.mark.parametrize("over", [0, 1])
def test_redirects_are_few(serve: Serve, over: int) -> None:
    def answer(request: Request) -> ANSWER:
        if len(service.requests) <= MOST_REDIRECTS + over:
            return 307, {"Location": f"/bucket/{len(service.requests)}"}, b""
        return 200, {}, b""

    service = serve(answer)
    if over:
        with pytest.raises(BadRequestError, match=r"^the object: redirected more than 5 times$"):
            status_of(client_of(service.url))
    else:
        assert status_of(client_of(service.url)) == 200
    assert len(service.requests) == MOST_REDIRECTS + 1


def test_a_redirect_is_logged_once(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cdn = serve(lambda _: (200, {}, b""))
    client = client_of(serve(lambda _: (302, {"Location": f"{cdn.url}/x"}, b"")).url)
    for _ in range(2):
        status_of(client)
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"s3://bucket/m: the service redirects to {cdn.url}"]


def test_a_service_of_many_peculiarities_does_not_fill_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    client = client_of("http://127.0.0.1:9")
    for number in range(2 * MOST_NOTED):
        client.note(f"does this {number}")
    assert len(caplog.records) == MOST_NOTED


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception, **given: Any) -> SourceError:
    """What a reader gets if a request ends so."""

    def never(*_: object) -> None:
        raise error

    monkeypatch.setattr(Transport, "exchange", never)
    with pytest.raises(SourceError) as told:
        status_of(client_of("http://127.0.0.1:9", live(), **given))
    assert told.value.__cause__ is error
    return told.value


def refused_certificate() -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError()
    error.verify_message = "certificate has expired"
    return error


def of_tls(reason: str) -> ssl.SSLError:
    error = ssl.SSLError(1, f"[SSL] {reason}")
    error.reason = reason
    return error


NOTHING_USABLE = "no usable answer from http://127.0.0.1:9"
FAILURES = [
    (ranges.ChangedError("now has 3"), ObjectChangedError, "now has 3"),
    (ranges.OtherRangeError("got all"), BadResponseError, "got all"),
    (BadAddressError("not there"), BadRequestError, "not there"),
    (ranges.IgnoresRangeError("ignores Range"), BadRequestError, "ignores Range"),
    (refused_certificate(), UntrustedError,
     "certificate refused: certificate has expired; see --ca-bundle"),
    (TimeoutError("timed out"), UnavailableError, f"{NOTHING_USABLE} (no answer for 20 s)"),
    (of_tls("DECODE_ERROR"), UnavailableError, f"{NOTHING_USABLE} ([SSL] DECODE_ERROR)"),
    (OSError(113, "No route to host"), UnavailableError, f"{NOTHING_USABLE} (No route to host)"),
    (ConnectionError("cut off"), UnavailableError, f"{NOTHING_USABLE} (cut off)"),
    (ConnectionResetError(), UnavailableError, f"{NOTHING_USABLE} (ConnectionResetError)"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "kind", "words"), FAILURES)
def test_each_failure_is_told_in_its_words(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[SourceError], words: str
) -> None:
    told = failing(monkeypatch, error)
    assert (type(told), str(told)) == (kind, f"the object: {words}")


@pytest.mark.parametrize("error", [error for error, _, _ in FAILURES])
def test_what_is_on_a_server_is_hidden_from_whoever_may_not_know(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    caplog.set_level(logging.INFO)
    told = failing(monkeypatch, error, refuse_local=True)
    if isinstance(error, ranges.ChangedError | BadAddressError):
        return  # S3 has answered, or nothing was asked
    assert (type(told), str(told)) == (UnavailableError, "the object: no usable answer of S3")
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith(f"the object: {type(error).__name__}: ")


def test_a_request_that_was_cancelled_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise CancelledError

    monkeypatch.setattr(Transport, "exchange", never)
    with pytest.raises(CancelledError):
        status_of(client_of("http://127.0.0.1:9"))


@pytest.mark.parametrize(("code", "hidden"), [("AccessDenied", False), ("", True)])
def test_a_refusal_by_s3_is_shown_to_everybody(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, code: str, hidden: bool
) -> None:
    monkeypatch.setattr(servers, "must_be_elsewhere", lambda address: None)
    service = serve(lambda _: refusal(403, code) if code else (403, {}, b"Login"))
    with pytest.raises(SourceError) as told:
        service.source(refuse_local=True).ranges.read(PIN, 0, 10)
    assert isinstance(told.value, UnavailableError if hidden else AccessDeniedError)
    assert ("403" in str(told.value)) is not hidden


def test_an_endpoint_that_speaks_no_tls_is_told_from_one_that_is_away(serve: Serve) -> None:
    url = serve(part).url.replace("http:", "https:")
    with pytest.raises(UnavailableError, match=r"does not answer in TLS; is it http://\?"):
        status_of(client_of(url))


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("WRONG_VERSION_NUMBER", "it does not answer in TLS; is it http://?"),
        ("RECORD_LAYER_FAILURE", "it does not answer in TLS; is it http://?"),
        ("DECODE_ERROR", "[SSL] DECODE_ERROR"),
    ],
)
def test_what_openssl_says_of_bytes_that_are_no_tls_is_explained(
    monkeypatch: pytest.MonkeyPatch, reason: str, told: str
) -> None:
    def connect(_: object) -> None:
        raise of_tls(reason)

    monkeypatch.setattr(http.client.HTTPSConnection, "connect", connect)
    with pytest.raises(UnavailableError, match=re.escape(f"({told})")):
        status_of(client_of("https://127.0.0.1:9"))


def test_an_endpoint_of_another_authority_is_not_trusted(tmp_path: Path) -> None:
    _, *pair = make_certificates(tmp_path / "theirs")
    service = Service(part, *pair)
    try:
        with pytest.raises(UntrustedError, match=r"certificate refused: .*; see --ca-bundle"):
            service.source(authorities=Path(certifi.where())).ranges.read(PIN, 0, 10)
        assert service.requests == []
    finally:
        service.close()


def test_a_source_is_read_through_its_proxy() -> None:
    service = Service(part)
    try:
        port = int(service.url.rpartition(":")[2])
        proxy = Proxy("127.0.0.1", port, {"Proxy-Authorization": "Basic abc"})
        endpoint = Endpoint("us-east-1", "s3", "http://s3.test", "/bucket/", "/none", proxy)
        source = S3Source(
            URL, MountOptions(no_sign_request=True), None, ResolvedSource(endpoint, None, None)
        )
        assert bytes(source.ranges.read(PIN, 0, 10)) == DATA[:10]
        (request,) = service.requests
        assert request.target == "http://s3.test/bucket/m/k"
        assert request.headers["proxy-authorization"] == "Basic abc"
    finally:
        service.close()


# Credentials


def refusing(code: str) -> Callable[[Request], ANSWER]:
    def answer(request: Request) -> ANSWER:
        key = request.headers["authorization"].split("Credential=")[1].split("/")[0]
        return refusal(403, code) if key == "id" else (200, {}, b"")

    return answer


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch"])
def test_refused_credentials_are_replaced_for_the_next_request(serve: Serve, code: str) -> None:
    anew: list[bool] = []

    def fetch(refused: bool) -> TimedCredentials:
        anew.append(refused)
        return TimedCredentials(SigningCredentials("other", "secret"))

    client = client_of(serve(refusing(code)).url, live(fetch))
    with pytest.raises(CredentialsExpiredError, match=code):
        status_of(client)
    assert status_of(client) == 200
    assert anew == [True]


def test_a_wrong_secret_is_no_matter_of_waiting(serve: Serve) -> None:
    client = client_of(
        serve(refusing("SignatureDoesNotMatch")).url, live(lambda _: TimedCredentials(KEYS))
    )
    with pytest.raises(AccessDeniedError, match=r"SignatureDoesNotMatch.*secretAccessKey"):
        status_of(client)


@pytest.mark.parametrize("code", ["AccessDenied", "NoSuchKey", "SlowDown"])
def test_other_refusals_say_nothing_about_credentials(serve: Serve, code: str) -> None:
    client = client_of(serve(refusing(code)).url, live())
    for _ in range(2):
        with pytest.raises(SourceError, match=code):
            status_of(client)


def test_credentials_that_worked_are_good_again(serve: Serve) -> None:
    answers = iter([refusal(403, "InvalidAccessKeyId")])
    client = client_of(
        serve(lambda _: next(answers, (200, {}, b""))).url,
        live(lambda _: TimedCredentials(KEYS)),
    )
    with pytest.raises(CredentialsExpiredError):
        status_of(client)
    assert client.present_credentials is None
    assert status_of(client) == 200
    assert client.present_credentials == KEYS


def test_whether_a_request_can_be_signed() -> None:
    assert client_of("http://127.0.0.1:9").can_sign_with(None)
    client = client_of("http://127.0.0.1:9", live())
    assert client.can_sign_with(KEYS)
    assert not client.can_sign_with(None)
    assert client_of("http://127.0.0.1:9").present_credentials is None
    assert client.present_credentials == KEYS


# The clock


@pytest.mark.parametrize("ahead_s", [7200.0, -7200.0])
def test_the_time_of_the_service_is_used_from_then_on(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ahead_s: float
) -> None:
    now_s = 1_800_000_000.0
    monkeypatch.setattr(signed_client.time, "time", lambda: now_s)
    date = formatdate(now_s + ahead_s, usegmt=True)
    body = f"<Code>RequestTimeTooSkewed</Code><ServerTime>{date}</ServerTime>".encode()

    def answer(request: Request) -> ANSWER:
        is_wrong = request.headers["x-amz-date"] == stamp_of(now_s)
        return (403, {}, body) if is_wrong else (200, {}, b"")

    service = serve(answer)
    client = client_of(service.url, live())
    assert [status_of(client) for _ in range(2)] == [200, 200]
    stamps = [request.headers["x-amz-date"] for request in service.requests]
    assert stamps == [stamp_of(now_s), *[stamp_of(now_s + ahead_s)] * 2]
    (line,) = (record.getMessage() for record in caplog.records)
    assert f"differs by {ahead_s:.0f} s from that of the service" in line


def stamp_of(seconds: float) -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(seconds))


def test_answers_are_handled_with_where_they_come_from(serve: Serve) -> None:
    cdn = serve(lambda _: (200, {}, b""))
    ours = serve(lambda _: (302, {"Location": f"{cdn.url}/x"}, b""))

    def elsewhere(answer: Answer, elsewhere: bool) -> bool:
        return elsewhere

    assert client_of(cdn.url).ask(ASKED, elsewhere, "x", Cancel()) is False
    assert client_of(ours.url).ask(ASKED, elsewhere, "x", Cancel()) is True
