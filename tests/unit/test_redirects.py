"""Where redirects lead, and who is given a signature there."""

from __future__ import annotations

import ssl
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import certifi
import pytest

from lazyfs.store import servers
from lazyfs.store.addresses import BadAddressError, BadRedirectError, is_same_service
from lazyfs.store.http import Proxy, tls_context
from lazyfs.store.http_answer import Answer, Body
from lazyfs.store.refusals import MOST_TEXT
from lazyfs.store.request import (
    Asked,
    RedirectedError,
    RefusedError,
    Request,
    redirected,
    refuse,
    unless_redirected,
)
from lazyfs.store.resolved_source import Endpoint
from lazyfs.store.servers import MOST_SERVERS, Servers
from lazyfs.store.signing import SigningCredentials

SERVICE = "https://s3.example"
CONDITION = {"If-Match": '"v1"', "Range": "bytes=0-1"}


@pytest.mark.parametrize(
    ("ours", "other", "same"),
    [
        ("https://s3.example", "https://s3.example", True),
        ("https://s3.example", "https://bucket.s3.example", True),
        ("https://bucket.s3.example:8443", "https://s3.example:8443", True),
        ("https://s3.example", "https://cdn.example", False),
        ("https://s3.example", "https://evils3.example", False),
        ("http://s3.example:9000", "http://other.example:9000", False),
        ("https://s3.example", "https://bucket.s3.example:8443", False),
        ("https://b.s3.amazonaws.com", "https://s3.eu-west-1.amazonaws.com", True),
        ("https://b.s3.amazonaws.com", "https://s3.cn-north-1.amazonaws.com.cn", True),
        ("https://b.s3.amazonaws.com", "https://amazonaws.com.evil.example", False),
        ("https://s3.example", "https://b.s3.amazonaws.com", False),
        ("https://b.s3.amazonaws.com", "https://s3.example", False),
    ],
)
def test_only_servers_of_the_same_service_get_its_signatures(
    ours: str, other: str, same: bool
) -> None:
    assert is_same_service(ours, other) is same


def follow(
    location: str, *, server: str = SERVICE, elsewhere: bool = False, query: str = ""
) -> tuple[str, Request, bool]:
    request = Request("GET", "/bucket/k", query, CONDITION, asked=Asked(None, None))
    return redirected(SERVICE, server, request, location, elsewhere)


@pytest.mark.parametrize(
    ("location", "to", "target", "elsewhere"),
    [
        ("https://bucket.s3.example/k", "https://bucket.s3.example", "/k", False),
        ("/other", SERVICE, "/other", False),
        ("other?b=2&a=1", SERVICE, "/bucket/other?a=1&b=2", False),
        ("other?b=&a=1", SERVICE, "/bucket/other?a=1&b=", False),
        ("https://s3.example", SERVICE, "/", False),
        ("https://s3.example/a%2Fb", SERVICE, "/a/b", False),
        ("https://cdn.example/k?b=2&a=1", "https://cdn.example", "/k?b=2&a=1", True),
        ("https://s3.example/k?X-Amz-Signature=1", SERVICE, "/k?X-Amz-Signature=1", True),
        ("https://s3.example/k?a=1&sig=2", SERVICE, "/k?a=1&sig=2", True),
        ("https://s3.example/é".encode().decode("latin-1"), SERVICE, "/%C3%A9", False),
    ],
)
def test_a_redirect_is_followed(location: str, to: str, target: str, elsewhere: bool) -> None:
    found_to, request, found_elsewhere = follow(location)
    assert (found_to, request.target, found_elsewhere) == (to, target, elsewhere)
    # Another service has its own tags; and what a mover asked for is another request.
    expected = {"Range": "bytes=0-1"} if elsewhere else CONDITION
    assert (request.headers, request.asked) == (expected, None)


def test_from_another_service_no_redirect_leads_back_to_ours() -> None:
    """It would choose what is signed."""
    to, request, elsewhere = follow(
        "https://s3.example/secret", server="https://cdn.example", elsewhere=True
    )
    assert (to, elsewhere) == (SERVICE, True)
    assert "If-Match" not in request.headers


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("http://s3.example/k", "from https to http"),
        ("ftp://s3.example/k", "redirected to 'ftp://s3.example/k'"),
        ("https://user:password@s3.example/k", "redirected to"),
        ("https://user@s3.example/k", "redirected to"),
        ("https://s3.example:port/k", "redirected to"),
        ("https://[::1/k", "redirected to"),
    ],
)
def test_a_redirect_is_not_followed(location: str, words: str) -> None:
    with pytest.raises(BadRedirectError, match=words):
        follow(location)


def test_a_long_location_is_shown_in_part() -> None:
    with pytest.raises(BadRedirectError) as told:
        follow("ftp://" + "x" * 5000)
    assert str(told.value) == f"redirected to 'ftp://{'x' * 94}'"


def answered(status: int, headers: dict[str, str], body: bytes = b"") -> Answer:
    text = SimpleNamespace(read_all=lambda most: body[:most])
    return Answer(status, headers, len(body), cast(Body, text))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_an_answer_with_a_location_is_a_redirect(status: int) -> None:
    with pytest.raises(RedirectedError) as told:
        unless_redirected(answered(status, {"location": "/other"}), pytest.fail)
    assert told.value.location == "/other"


@pytest.mark.parametrize(
    ("status", "headers"),
    [(200, {"location": "/other"}), (300, {"location": "/other"}), (304, {"location": "/other"}),
     (302, {}), (302, {"location": ""})],
)  # fmt: skip
def test_any_other_answer_is_handled(status: int, headers: dict[str, str]) -> None:
    answer = answered(status, headers)
    assert unless_redirected(answer, lambda given: given is answer)


@pytest.mark.parametrize(
    ("headers", "body", "region"),
    [
        ({"x-amz-bucket-region": "eu-west-1"}, b"", "eu-west-1"),
        ({}, b"<Code>PermanentRedirect</Code>", ""),
        ({}, b"<Region>eu-west-1</Region>", "eu-west-1"),
    ],
)
def test_a_301_of_s3_is_no_redirect(headers: dict[str, str], body: bytes, region: str) -> None:
    with pytest.raises(RefusedError) as told:
        unless_redirected(answered(301, {"location": "/x"} | headers, body), pytest.fail)
    assert (told.value.refusal.status, told.value.refusal.region) == (301, region)
    with pytest.raises(RedirectedError):
        unless_redirected(answered(302, {"location": "/x"} | headers, body), pytest.fail)


def test_a_refusal_has_the_text_of_the_answer_up_to_a_bound() -> None:
    code = b"<Code>SlowDown</Code>"
    for before, known in ((b"", "SlowDown"), (b"x" * MOST_TEXT, "")):
        with pytest.raises(RefusedError) as told:
            refuse(answered(503, {"retry-after": "7"}, before + code))
        found = told.value.refusal
        assert (found.status, found.code, found.retry_after_s) == (503, known, 7)


def test_a_redirect_from_http_may_lead_to_https() -> None:
    to, _, _ = follow("https://s3.example/k", server="http://s3.example")
    assert to == SERVICE


def test_the_servers_behind_redirects_are_few_and_the_endpoint_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed: list[str] = []
    monkeypatch.setattr(
        servers.Transport, "close_idle", lambda transport, _: closed.append(transport._url.netloc)
    )
    endpoint = Endpoint("eu-west-1", "s3", "http://s3.example", "/bucket/", "", None)
    known = Servers(endpoint, refuse_local=False)
    first = known.get("http://s3.example")
    made = [known.get(f"http://cdn{number}.example") for number in range(MOST_SERVERS)]
    assert known.get("http://s3.example") is first
    assert [known.get(f"http://cdn{number}.example") for number in (2, 5)] == [made[2], made[5]]
    assert closed == ["cdn0.example"]
    assert known.get("http://cdn0.example") is not made[0]


def test_a_new_server_knows_the_time_of_the_service(tmp_path: Path) -> None:
    endpoint = Endpoint("eu-west-1", "s3", "http://s3.example", "/bucket/", str(tmp_path), None)
    known = Servers(endpoint, refuse_local=False)
    known.set_clock(77.0)
    for server in ("http://s3.example", "http://bucket.s3.example"):
        assert known.get(server)[1].ahead_s == 77


def made_by(server: str, *, endpoint: str = "http://s3.example", refuse_local: bool = False,
            reached: str | None = None, proxy: Proxy | None = None) -> Any:  # fmt: skip
    """The connections to a server, of a service that was reached at an address before."""
    about = Endpoint("eu-west-1", "s3", endpoint, "/bucket/", certifi.where(), proxy)
    known = Servers(about, refuse_local=refuse_local)
    known.get(endpoint)[0].address = reached
    return known.get(server)[0]


@pytest.mark.parametrize(
    ("server", "refuse_local", "reached", "address", "allowed"),
    [
        # The endpoint is where the options say.
        ("http://s3.example", False, None, "127.0.0.1", True),
        ("http://s3.example", False, None, "169.254.169.254", True),
        ("http://s3.example", True, None, "127.0.0.1", False),
        # Where it redirects to is its choice.
        ("http://cdn.example", False, "10.0.0.1", "127.0.0.1", False),
        ("http://cdn.example", False, "127.0.0.1", "127.0.0.1", True),
        ("http://cdn.example", False, "127.0.0.1", "169.254.169.254", False),
        ("http://cdn.example", True, "127.0.0.1", "127.0.0.1", False),
        ("http://cdn.example", True, "10.0.0.1", "192.0.2.1", True),
    ],
)
def test_which_addresses_a_server_may_have(
    server: str, refuse_local: bool, reached: str | None, address: str, allowed: bool
) -> None:
    transport = made_by(server, refuse_local=refuse_local, reached=reached)
    if allowed:
        transport._may_connect(address)
    else:
        with pytest.raises(BadAddressError):
            transport._may_connect(address)


def test_all_servers_are_reached_through_the_proxy() -> None:
    proxy = Proxy("proxy.test", 3128, {})
    for server in ("http://s3.example", "http://cdn.example"):
        assert made_by(server, proxy=proxy)._proxy == proxy


def test_authorities_are_loaded_once_and_only_for_https(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def loading(authorities: str) -> ssl.SSLContext:
        asked.append(authorities)
        return tls_context(authorities)

    monkeypatch.setattr(servers, "tls_context", loading)
    endpoint = Endpoint("eu-west-1", "s3", "http://s3.example", "/b/", certifi.where(), None)
    known = Servers(endpoint, refuse_local=False)
    assert asked == []
    first, second = (known.get(f"https://cdn{number}.example")[0]._tls for number in (1, 2))
    assert first is second is not None
    assert asked == [certifi.where()]


def test_requests_are_signed_for_the_region_and_service_of_the_endpoint() -> None:
    endpoint = Endpoint("eu-west-1", "s3-outposts", "http://s3.example", "/b/", "", None)
    known = Servers(endpoint, refuse_local=False)
    for server, host in (("http://s3.example", "s3.example"), ("http://a.test:9", "a.test:9")):
        signer = known.get(server)[1]
        signed = signer.headers("GET", "/", "", {}, SigningCredentials("id", "secret"))
        assert "/eu-west-1/s3-outposts/aws4_request, " in signed["Authorization"]
        assert signer.host == host


def test_idle_connections_to_all_servers_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[tuple[str, float]] = []
    monkeypatch.setattr(
        servers.Transport, "close_idle",
        lambda transport, longer_than_s: closed.append((transport._url.netloc, longer_than_s)),
    )  # fmt: skip
    known = Servers(
        Endpoint("eu-west-1", "s3", "http://s3.example", "/b/", "", None), refuse_local=False
    )
    known.get("http://cdn.example")
    known.close_idle(30.0)
    assert closed == [("s3.example", 30.0), ("cdn.example", 30.0)]
