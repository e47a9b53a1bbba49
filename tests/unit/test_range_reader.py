"""Ranges that a fleet's cache or movers bring, and what of that is left to others."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import trio
from test_source import ANSWER, DATA, PIN, URL, Request, Serve, Service, part, refusal, serve

from lazyfs.errors import (
    BadRequestError,
    SourceError,
)
from lazyfs.listed_object import ListedObject
from lazyfs.movers.call import MoverFaultError, MoverLostError, Nudge
from lazyfs.movers.pool import Movers
from lazyfs.options.mount_options import MountOptions
from lazyfs.store import range_reader
from lazyfs.store.cancel import Cancel
from lazyfs.store.fleet_cache import FleetCache, FleetCacheError, Trouble
from lazyfs.store.http import Proxy
from lazyfs.store.range_reader import AskedRange
from lazyfs.store.resolved_source import Endpoint, ResolvedSource, TimedCredentials
from lazyfs.store.s3_source import S3Source
from lazyfs.store.signing import SigningCredentials

__all__ = ["serve"]
EXPIRED = TimedCredentials(SigningCredentials("id", "secret"), 1.0)


def source_of(
    service: Service, *, credentials: TimedCredentials | None = None, proxy: Proxy | None = None,
    **options: Any,
) -> S3Source:  # fmt: skip
    endpoint = Endpoint("us-east-1", "s3", service.url, "/bucket/", "/none", proxy)
    return S3Source(URL, MountOptions(**options), None,
                    ResolvedSource(endpoint, credentials, None))  # fmt: skip


# The cache of a fleet


def from_cache(source: S3Source, cache: Service, pin: ListedObject = PIN, **given: Any) -> Any:
    return source.ranges.read_cached(FleetCache(cache.url), pin, 256, 512, Cancel(), **given)


def test_the_cache_is_asked_as_s3_is(serve: Serve) -> None:
    service, cache = serve(part), serve(part)
    source = service.source(requester_pays=True)
    assert bytes(from_cache(source, cache)) == source.ranges.read(PIN, 256, 512) == DATA[256:768]
    (of_cache,), (of_s3,) = cache.requests, service.requests
    assert of_cache.target == of_s3.target == "/bucket/m/k"
    assert of_cache.headers == of_s3.headers, "with S3's host and the signature for it"


def test_an_unsigned_request_is_not_signed_for_the_cache(serve: Serve) -> None:
    cache = serve(part)
    source = source_of(serve(part), no_sign_request=True)
    assert bytes(from_cache(source, cache)) == DATA[256:768]
    assert "authorization" not in cache.requests[0].headers


@pytest.mark.parametrize("fresh", [False, True])
def test_shelves_may_be_told_to_ask_s3_again(serve: Serve, fresh: bool) -> None:
    cache = serve(part)
    from_cache(serve(part).source(), cache, fresh=fresh)
    from_cache(serve(part).source(), cache)
    told = [request.headers.get("x-lazyfs-refresh") for request in cache.requests]
    assert told == ["1" if fresh else None, None]


@pytest.mark.parametrize("etag", ['W/"v1"', ""])
def test_the_cache_is_not_asked_for_an_object_without_a_strong_tag(serve: Serve, etag: str) -> None:
    cache = serve(part)
    assert from_cache(serve(part).source(), cache, replace(PIN, etag=etag)) is None
    assert cache.requests == []


def beginning(request: Request) -> ANSWER:
    start, end = request.range
    request.headers["range"] = f"bytes={start}-{end - 1}"
    return part(request)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (beginning, "got a part of what was asked for"),
        (lambda request: part(request, '"v2"'), "now has"),
        (lambda request: (206, {"ETag": '"v1"'}, DATA[256:768]), "206 without Content-Range"),
        (lambda request: (200, {}, b"<html/>"), "status 200 without ETag"),
    ],
)
def test_the_cache_must_answer_with_the_whole_range_of_that_version(
    serve: Serve, answer: Callable[[Request], ANSWER], said: str
) -> None:
    with pytest.raises(FleetCacheError, match=said) as told:
        from_cache(serve(part).source(), serve(answer))
    assert told.value.trouble is Trouble.WRONG


def test_a_refusal_by_the_cache_changes_nothing_for_s3(serve: Serve) -> None:
    source = serve(part).source()
    with pytest.raises(FleetCacheError, match="412 PreconditionFailed"):
        from_cache(source, serve(lambda _: refusal(412, "PreconditionFailed")))
    assert bytes(from_cache(source, serve(part))) == DATA[256:768]


# Movers


class InTheirPlace:
    """In the place of movers, which end each call so."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.calls: list[str] = []
        self.arguments: tuple[object, ...] = ()
        self.given: dict[str, object] = {}

    async def wait_for_first(self, has_time: Callable[[], bool]) -> None:
        self.calls.append("wait")

    async def run(self, *arguments: object, ended: Callable[[], None], **given: object) -> Any:
        self.calls.append("run")
        self.arguments, self.given = arguments, given
        ended()
        if self.error is not None:
            raise self.error
        return []


def moved(source: S3Source, length: int = 512) -> tuple[Any, int]:
    """What movers brought of a range, and how often the end was told of."""
    ends: list[int] = []

    async def ask() -> Any:
        return await source.ranges.read_by_mover(
            PIN, 256, length, Cancel(), lambda: True, lambda: ends.append(1)
        )

    return trio.run(ask), len(ends)


def each_moved(source: S3Source) -> tuple[list[Any], int]:
    """The same for ranges that are requested at once."""
    ends: list[int] = []
    came: list[Any] = []

    async def ask() -> None:
        await source.ranges.read_each(
            PIN, [(0, 64), (64, 64)], came.extend, Nudge(), 5.0, lambda: ends.append(1)
        )

    trio.run(ask)
    return came, len(ends)


@pytest.fixture
def any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(range_reader, "LEAST_SHARED", 512)


def test_without_movers_none_is_asked(serve: Serve) -> None:
    source = serve(part).source()
    assert not source.ranges.may_move
    assert moved(source, 1 << 20) == (None, 1)
    assert each_moved(source) == ([], 1)


@pytest.mark.usefixtures("any_length")
@pytest.mark.parametrize(
    ("given", "may_move"),
    [
        ({"credentials": TimedCredentials(SigningCredentials("id", "secret"))}, True),
        ({"no_sign_request": True}, True),
        ({"no_sign_request": True, "proxy": Proxy("127.0.0.1", 9, {})}, False),
        ({}, False),
        ({"credentials": EXPIRED}, False),
    ],
)
def test_movers_are_asked_if_that_needs_neither_a_proxy_nor_new_credentials(
    serve: Serve, given: dict[str, Any], may_move: bool
) -> None:
    source = source_of(serve(part), **given)
    movers = InTheirPlace(MoverLostError("it ended"))
    source.use(cast(Movers, movers))
    assert source.ranges.may_move is may_move
    assert moved(source) == (None, 1)
    assert each_moved(source) == ([], 1)
    assert movers.calls == (["wait", "run", "run"] if may_move else ["wait"])


@pytest.mark.usefixtures("any_length")
@pytest.mark.parametrize("refuse_local", [False, True])
def test_a_mover_knows_what_it_may_contact_and_can_be_ended(
    serve: Serve, refuse_local: bool
) -> None:
    service = serve(part)
    source = service.source(refuse_local=refuse_local)
    movers = InTheirPlace(MoverLostError("it ended"))
    source.use(cast(Movers, movers))
    cancel, nudge = Cancel(), Nudge()

    async def main() -> None:
        ranges = source.ranges
        await ranges.read_by_mover(PIN, 256, 512, cancel, lambda: True, lambda: None)
        assert movers.arguments[1:6] == (service.url, "/none", refuse_local, "GET", "/bucket/m/k")
        assert movers.given["wire"] is cancel
        await ranges.read_each(PIN, [(0, 64), (64, 64)], lambda _: None, nudge, 5.0, lambda: None)
        assert movers.arguments[1:5] == (service.url, "/none", refuse_local, "/bucket/m/k")
        assert movers.arguments[6:] == (["bytes=0-63", "bytes=64-127"], 5.0)
        assert (movers.given["nudge"], movers.given["parts"]) == (nudge, 2)

    trio.run(main)


@pytest.mark.usefixtures("any_length")
def test_short_ranges_are_not_worth_a_mover(serve: Serve) -> None:
    source = serve(part).source()
    movers = InTheirPlace(MoverLostError("it ended"))
    source.use(cast(Movers, movers))
    assert moved(source, 511) == (None, 1)
    assert movers.calls == []
    assert moved(source, 512) == (None, 1)
    assert movers.calls == ["wait", "run"]


@pytest.mark.usefixtures("any_length")
@pytest.mark.parametrize("error", [MoverLostError("it ended"), MoverFaultError("a traceback")])
def test_a_mover_that_fails_has_made_no_request(serve: Serve, error: Exception) -> None:
    source = serve(part).source()
    source.use(cast(Movers, InTheirPlace(error)))
    assert moved(source) == (None, 1)
    assert each_moved(source) == ([], 1)


@pytest.mark.usefixtures("any_length")
def test_an_error_that_a_mover_met_is_judged_with_the_credentials_that_were_used(
    serve: Serve,
) -> None:
    source = serve(part).source()
    source.use(cast(Movers, InTheirPlace(ConnectionResetError("cut off"))))
    found, ends = moved(source)
    assert isinstance(found, AskedRange)
    assert (len(found.into), str(found.asked.told), ends) == (512, "cut off", 1)
    assert found.asked.credentials == SigningCredentials("id", "secret")
    assert each_moved(source) == ([], 1)


@pytest.mark.usefixtures("any_length")
@pytest.mark.parametrize("act", [moved, each_moved])
def test_the_end_is_told_whatever_fails(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, act: Callable[[S3Source], Any]
) -> None:
    ends: list[int] = []

    def failing(*_: object) -> None:
        ends.append(1)
        raise ZeroDivisionError

    source = serve(part).source()
    source.use(cast(Movers, InTheirPlace()))
    for owner, name in ((range_reader, "take_buffer"), (source._client, "headers")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            told: list[int] = []
            with pytest.raises(ZeroDivisionError):
                trio.run(asking, source, act is moved, lambda told=told: told.append(1))
            assert told == [1]
    assert len(ends) == 2


async def asking(source: S3Source, one: bool, ended: Callable[[], None]) -> None:
    if one:
        await source.ranges.read_by_mover(PIN, 256, 512, Cancel(), lambda: True, ended)
    else:
        await source.ranges.read_each(PIN, [(0, 64)], lambda _: None, Nudge(), 5.0, ended)


# What a service does differently


def test_what_a_service_does_differently_is_logged_once(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    source = serve(lambda _: (200, {"ETag": '"v1"'}, DATA)).source()
    for _ in range(2):
        assert bytes(source.ranges.read(PIN, 256, 512)) == DATA[256:768]
    said = [record.getMessage() for record in caplog.records]
    assert said == ["s3://bucket/m: the service answers a range with 200 instead of 206"]


@pytest.mark.parametrize(("etag", "asked"), [('"v1"', 2), ("", 1)])
def test_a_refusal_that_has_nothing_to_do_with_the_condition_is_one(
    serve: Serve, etag: str, asked: int
) -> None:
    service = serve(lambda _: refusal(400, "InvalidArgument"))
    source = service.source()
    for turn in (1, 2):
        with pytest.raises(BadRequestError, match="400 InvalidArgument"):
            source.ranges.read(replace(PIN, etag=etag), 256, 512)
        assert len(service.requests) == turn * asked


def test_errors_that_waiting_helps_against_leave_the_condition(serve: Serve) -> None:
    answers = iter([refusal(503, "SlowDown"), refusal(403, "AccessDenied")])
    service = serve(lambda request: next(answers, None) or part(request))
    source = service.source()
    for _ in range(2):
        with pytest.raises(SourceError):
            source.ranges.read(PIN, 256, 512)
    assert bytes(source.ranges.read(PIN, 256, 512)) == DATA[256:768]
    assert all("if-match" in request.headers for request in service.requests)
    assert len(service.requests) == 3
