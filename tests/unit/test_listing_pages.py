"""What is asked for a page of a listing, and for the one after it."""

from __future__ import annotations

import gzip
import logging
from collections.abc import Callable
from typing import Any

import pytest
from test_listing_page import entry, page, prefix
from test_source import ANSWER, URL, Request, Serve, refusal, serve

from lazyfs.errors import (
    AccessDeniedError,
    BadRequestError,
    BadResponseError,
    NotSupportedError,
    SourceError,
    ThrottledError,
    UnavailableError,
)
from lazyfs.listed_object import ListedObject
from lazyfs.options.mount_options import MountOptions
from lazyfs.store import listing, servers
from lazyfs.store.listing_page import Page
from lazyfs.store.resolved_source import Endpoint, ResolvedSource
from lazyfs.store.s3_source import S3Source

__all__ = ["serve"]
USUAL = {"prefix": "m/", "list-type": "2", "encoding-type": "url"}
MORE = {"IsTruncated": "true"}


def asked(serve: Serve, body: bytes, *listings: Any, **given: Any) -> list[dict[str, str]]:
    """The queries of listings that are all answered with the same page."""
    service = serve(lambda _: (200, {}, body))
    source = service.source()
    for arguments in listings:
        source.list_page(*arguments, **given)
    return [request.query for request in service.requests]


def test_the_first_page_is_asked_for_by_its_prefix(serve: Serve) -> None:
    assert asked(serve, page(), ["m/"]) == [USUAL]
    assert asked(serve, page(), [""]) == [{"list-type": "2", "encoding-type": "url"}]
    assert asked(serve, page(), ["m/"], delimiter="/") == [USUAL | {"delimiter": "/"}]
    assert asked(serve, page(), ["m/"], after="m/k") == [USUAL | {"start-after": "m/k"}]


@pytest.mark.parametrize("path", ["/", "/bucket/", "/org/team%3Abucket/"])
def test_a_listing_is_asked_of_the_bucket(serve: Serve, path: str) -> None:
    service = serve(lambda _: (200, {}, page()))
    endpoint = Endpoint("us-east-1", "s3", service.url, path, "/none", None)
    resolved = ResolvedSource(endpoint, None, None)
    S3Source(URL, MountOptions(no_sign_request=True), None, resolved).list_page("m/")
    (request,) = service.requests
    assert (request.method, request.path) == ("GET", path.removesuffix("/") or "/")
    assert request.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    ("items", "about", "following"),
    [
        ([entry("m/a")], {"NextContinuationToken": "t+/= é"}, {"continuation-token": "t+/= é"}),
        ([entry("m/a"), entry("m/b")], {}, {"start-after": "m/b", "marker": "m/b"}),
        ([entry("m/a")], {"NextMarker": "m/z"}, {"start-after": "m/z", "marker": "m/z"}),
        # In an encoded page, so is the marker.
        ([entry("m/a%2Bb")], {"EncodingType": "url", "NextMarker": "m/c+d%2B"},
         {"start-after": "m/c d+", "marker": "m/c d+"}),
        ([entry("m/a%20b")], {"EncodingType": "url", "NextMarker": "m/c+d%2B"},
         {"start-after": "m/c+d+", "marker": "m/c+d+"}),
        ([entry("m/a"), entry("m/b%41")], {}, {"start-after": "m/b%41", "marker": "m/b%41"}),
        # After all that begins so.
        ([prefix("m/d/")], {}, {"start-after": "m/d/\U0010ffff", "marker": "m/d/\U0010ffff"}),
        ([prefix("m/d/")], {"NextMarker": "m/d/"},
         {"start-after": "m/d/\U0010ffff", "marker": "m/d/\U0010ffff"}),
        ([], {"NextContinuationToken": "t", "NextMarker": "m/z"}, {"continuation-token": "t"}),
    ],
)  # fmt: skip
def test_the_next_page_is_asked_for_as_the_page_says(
    serve: Serve, items: list[str], about: dict[str, str], following: dict[str, str]
) -> None:
    pages = iter([page(*items, **MORE, **about), page()])
    service = serve(lambda _: (200, {}, next(pages)))
    source = service.source()
    token = source.list_page("m/").next_token
    assert source.list_page("m/", token).next_token is None
    assert service.requests[1].query == USUAL | following


def version_1(request: Request) -> ANSWER:
    """A service that knows no other, and gives tokens that it does not take."""
    if "list-type" in request.query:
        return refusal(501, "NotImplemented")
    if "marker" in request.query:
        return 200, {}, page(entry("m/z"))
    return 200, {}, page(entry("m/a"), NextContinuationToken="t", **MORE)


def test_version_1_is_asked_in_its_own_words(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    service = serve(version_1)
    source = service.source()
    token = source.list_page("m/", after="").next_token
    source.list_page("m/", token)
    source.list_page("m/", after="m/k")
    plain = {"prefix": "m/", "encoding-type": "url"}
    assert [request.query for request in service.requests] == [
        USUAL, plain, plain | {"marker": "m/a"}, plain | {"marker": "m/k"},
    ]  # fmt: skip
    assert [record.getMessage() for record in caplog.records] == [
        "s3://bucket/m: the service does not know version 2 of listings: version 1 is used",
        "s3://bucket/m: the service gives no token for the next page of a listing: "
        "it continues after the last key",
    ]


def test_a_service_that_knows_no_listings_at_all(serve: Serve) -> None:
    service = serve(lambda _: refusal(501, "NotImplemented"))
    with pytest.raises(NotSupportedError, match=r"^listing of s3://bucket/m/: 501"):
        service.source().list_page("m/")
    assert ["list-type" in request.query for request in service.requests] == [True, False]


@pytest.mark.parametrize("encode", [str, lambda key: key.replace("+", "%2B")])
def test_without_a_second_listing_a_plus_is_a_space(
    serve: Serve, caplog: pytest.LogCaptureFixture, encode: Callable[[str], str]
) -> None:
    """As AWS writes it."""
    caplog.set_level(logging.INFO)

    def answer(request: Request) -> ANSWER:
        if "encoding-type" not in request.query:
            return refusal(403, "AccessDenied")
        return 200, {}, page(entry(encode("m/a+b")), EncodingType="url")

    service = serve(answer)
    found = service.source().list_page("m/").objects
    shown = encode("+") == "%2B"
    assert [each.key for each in found] == ["m/a+b" if shown else "m/a b"]
    assert [request.query for request in service.requests][1:] == (
        [] if shown else [{"prefix": "m/", "list-type": "2"}]
    )
    assert ("what + means in its keys could not be found out" in caplog.text) == (not shown)


def test_a_plus_that_stays_one_is_logged_and_remembered(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def answer(request: Request) -> ANSWER:
        encoding = {"EncodingType": "url"} if "encoding-type" in request.query else {}
        return 200, {}, page(entry("m/a+b"), **encoding)

    service = serve(answer)
    source = service.source()
    for _ in range(2):
        assert [each.key for each in source.list_page("m/").objects] == ["m/a+b"]
    assert len(service.requests) == 3
    assert "s3://bucket/m: the service leaves + in keys as it is" in caplog.text


def test_a_page_that_shows_what_a_plus_means_is_believed(serve: Serve) -> None:
    shown = [("m/%20b", "m/ b"), ("m/a+b", "m/a+b"), ("m/%2Bb", "m/+b"), ("m/a+b", "m/a b")]
    pages = iter(shown)
    service = serve(lambda _: (200, {}, page(entry(next(pages)[0]), EncodingType="url")))
    source = service.source()
    for _, key in shown:
        assert [each.key for each in source.list_page("m/").objects] == [key]
    assert len(service.requests) == len(shown)


@pytest.mark.parametrize("refuse_local", [False, True])
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((200, {"Content-Encoding": "GZIP"}, b"no"), "the answer is not gzip: "),
        ((200, {}, b"<html/>"), "this is not a listing of S3: the answer is XML, but"),
        ((200, {}, b""), "this is not a listing of S3: the answer is empty"),
    ],
)
def test_what_is_no_listing_is_shown_to_whoever_chose_the_server(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, answer: ANSWER, words: str, refuse_local: bool
) -> None:
    monkeypatch.setattr(servers, "must_be_elsewhere", lambda address: None)
    with pytest.raises(SourceError) as told:
        serve(lambda _: answer).source(refuse_local=refuse_local).list_page("m/")
    what = "listing of s3://bucket/m/"
    if refuse_local:
        assert type(told.value) is UnavailableError
        assert str(told.value) == f"{what}: no usable answer of S3"
    else:
        assert type(told.value) is BadResponseError
        assert str(told.value).startswith(f"{what}: {words}")


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        ((200, {}, page(IsTruncated="maybe")), BadResponseError, "IsTruncated is 'maybe'"),
        ((200, {}, page(**MORE)), BadResponseError, "more follows, but the answer does not say"),
        ((204, {}, b""), UnavailableError, "204, without an error code of S3"),
        (refusal(403, "AccessDenied"), AccessDeniedError, "403 AccessDenied: as told"),
        (refusal(200, "SlowDown"), ThrottledError, "200 SlowDown: as told"),
    ],
)
def test_errors_name_the_listing(
    serve: Serve, answer: ANSWER, kind: type[SourceError], words: str
) -> None:
    with pytest.raises(kind, match=rf"^listing of s3://bucket/m/sub/: .*{words}"):
        serve(lambda _: answer).source().list_page("m/sub/")


@pytest.mark.parametrize("over", [0, 1])
@pytest.mark.parametrize("packed", [False, True])
def test_a_listing_has_a_longest_length(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, packed: bool, over: int
) -> None:
    whole = page(entry("m/a"))
    monkeypatch.setattr(listing, "MOST_BYTES", len(whole) - over)
    body = gzip.compress(whole) if packed else whole
    source = serve(lambda _: (200, {"Content-Encoding": "gzip"} if packed else {}, body)).source()
    if over:
        with pytest.raises(BadRequestError, match="the answer has over 0 MiB, which no listing"):
            source.list_page("m/")
    else:
        assert [each.key for each in source.list_page("m/").objects] == ["m/a"]


def test_a_page_is_not_followed_to_itself(serve: Serve) -> None:
    source = serve(lambda _: (200, {}, page(NextContinuationToken="t", **MORE))).source()
    token = source.list_page("m/").next_token
    with pytest.raises(BadRequestError, match="does not advance: a page would repeat"):
        source.list_page("m/", token)


def test_invalid_entries_are_told_of(serve: Serve) -> None:
    source: S3Source = serve(lambda _: (200, {}, page(entry("x/y"), prefix("m/d/")))).source()
    found = source.list_page("m/", delimiter="/")
    assert (found.objects, found.prefixes) == ([], ["m/d/"])
    assert [hidden.key for hidden in found.hidden] == ["x/y"]


@pytest.mark.parametrize(
    ("arguments", "given"),
    [(["m/other/"], {}), (["m/", "tx"], {}), (["m/"], {"delimiter": "/"}),
     (["m/"], {"after": "m/k"})],
)  # fmt: skip
def test_a_page_that_is_there_already_is_for_its_own_listing_only(
    serve: Serve, arguments: list[str], given: dict[str, str]
) -> None:
    service = serve(lambda _: (200, {}, page()))
    endpoint = Endpoint("us-east-1", "s3", service.url, "/bucket/", "/none", None)
    ahead = ResolvedSource(endpoint, None, Page([ListedObject("m/a", 1, "", 0, "m/a")], [], None))
    source = S3Source(URL, MountOptions(no_sign_request=True), None, ahead)
    assert source.list_page(*arguments, **given).objects == []
    assert source.list_page("m/").objects == []
    assert [request.query["prefix"] for request in service.requests] == [arguments[0], "m/"]
