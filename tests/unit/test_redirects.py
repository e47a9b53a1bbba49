"""Where redirects lead, and who is given a signature there."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazyfs.store import servers
from lazyfs.store.addresses import BadRedirectError, is_same_service
from lazyfs.store.request import Asked, Request, redirected
from lazyfs.store.resolved_source import Endpoint
from lazyfs.store.servers import MOST_SERVERS, Servers

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
