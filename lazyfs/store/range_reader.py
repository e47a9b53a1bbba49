"""Reads ranges of objects, of the version that was listed, and learns what a service refuses.

A request names the version (`If-Match`) and accepts gzip, so that stored gzip files come unchanged.
Where a service or a proxy does not support one of them, requests leave it out from then on.
`ranges.py` checks every answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple
from urllib.parse import quote

from lazyfs.blocks.buffers import LEAST_SHARED, take_buffer
from lazyfs.errors import BadRequestError, BadResponseError, ObjectChangedError, SourceError
from lazyfs.movers.call import Nudge
from lazyfs.store import entity_tag, ranges
from lazyfs.store.cancel import Cancel
from lazyfs.store.fleet_cache import REFRESH, FleetCache
from lazyfs.store.http_answer import Answer, CutOffError
from lazyfs.store.listing_page import Pinned
from lazyfs.store.moved_requests import MovedRequests
from lazyfs.store.request import Asked, RefusedError, Request, refuse
from lazyfs.store.signed_client import Client
from lazyfs.store.url import SourceUrl

log = logging.getLogger(__name__)

# A stored gzip file is sent unchanged only to clients that accept gzip
# (cloud.google.com/storage/docs/transcoding).
AS_STORED = "identity, gzip"
# For a proxy that compresses everything that the client accepts compressed.
_UNPACKED = "identity"
# Of an answer that is cut off, at least this much is kept, and the rest is asked for. A proxy may
# cut each answer off after the same time or size: then asking for it all again never ends.
LEAST_KEPT = 256 << 10
# The most answers for one range.
MOST_PARTS = 128


class AskedRange(NamedTuple):
    """A range that a mover has requested, and that is not simply there."""

    into: memoryview
    asked: Asked


class RangeReader:
    """Reads ranges of the objects of one source.

    Args:
        url: the source.
        client: sends the requests.
    """

    def __init__(self, url: SourceUrl, client: Client) -> None:
        self._url = url
        self._client = client
        self._moved = MovedRequests(client)
        self._sends_if_match = True
        self._coding = AS_STORED

    def read(
        self,
        pin: Pinned,
        start: int,
        length: int,
        cancel: Cancel | None = None,
        asked: AskedRange | None = None,
    ) -> memoryview:
        """See `Ranges`."""
        into, already = asked or (take_buffer(length), None)
        cancel = cancel or Cancel()
        done = 0
        for _ in range(MOST_PARTS):
            done += self._ask_for_range(pin, start + done, into[done:], cancel, already)
            already = None
            if done == length:
                return into
            self._client.note("answers a range with a part of it")
        raise BadResponseError(f"{self._url.name(pin.key)}: {MOST_PARTS} answers gave {done} bytes")

    async def read_by_mover(
        self,
        pin: Pinned,
        start: int,
        length: int,
        cancel: Cancel,
        has_time: Callable[[], bool],
        ended: Callable[[], None],
    ) -> memoryview | AskedRange | None:
        """See `Ranges`."""
        movers = self._client.movers
        if length < LEAST_SHARED or movers is None:
            ended()
            return None
        try:
            await movers.wait_for_first(has_time)
            into = take_buffer(length)
            tag = pin.etag if self._matches(pin) else ""
            request = replace(self._request(pin, start, length, tag), into=into)
        except BaseException:
            ended()
            raise

        def handle(answer: Answer, elsewhere: bool) -> int:
            return self._receive(answer, elsewhere, request, pin, start, into)

        return self._found(await self._moved.ask(request, handle, cancel, ended), into)

    def _found(
        self, answer: int | Asked | None, into: memoryview
    ) -> memoryview | AskedRange | None:
        """What a request to a mover returns, which received so many bytes into a buffer."""
        if isinstance(answer, Asked):
            return AskedRange(into, answer)
        return into if answer == len(into) else None

    async def read_each(
        self,
        pin: Pinned,
        parts: Sequence[tuple[int, int]],
        came: Callable[[Sequence[tuple[int, memoryview | AskedRange | None]]], None],
        nudge: Nudge,
        patience_s: float,
        ended: Callable[[], None],
    ) -> None:
        """See `Ranges`."""
        try:
            tag = pin.etag if self._matches(pin) else ""
            buffers = [take_buffer(length) for _, length in parts]
            requests = [self._request(pin, start, length, tag) for start, length in parts]
        except BaseException:
            ended()
            raise

        def handle(which: int, into: memoryview, answer: Answer) -> int:
            start, _ = parts[which]
            return self._receive(answer, False, requests[which], pin, start, into)

        def tell(found: Sequence[tuple[int, memoryview, int | Asked]]) -> None:
            came([(which, self._found(answer, into)) for which, into, answer in found])

        await self._moved.ask_each(requests, buffers, handle, tell, nudge, patience_s, ended)

    @property
    def may_move(self) -> bool:
        """See `Ranges`."""
        return self._moved.may_be_made

    def read_cached(
        self,
        cache: FleetCache,
        pin: Pinned,
        start: int,
        length: int,
        cancel: Cancel,
        *,
        fresh: bool = False,
    ) -> memoryview | None:
        """See `Ranges`."""
        if not self._matches(pin):
            return None
        into = take_buffer(length)

        request = replace(self._request(pin, start, length, pin.etag), into=into)
        if fresh:
            request = replace(request, headers={**request.headers, **REFRESH})

        def handle(answer: Answer, elsewhere: bool) -> memoryview:
            if self._receive(answer, elsewhere, request, pin, start, into) < length:
                raise ranges.OtherRangeError("got a part of what was asked for")
            return into

        return self._client.ask_cache(cache, request, handle, cancel)

    def _matches(self, pin: Pinned) -> bool:
        """Whether a request can say which version of an object is wanted."""
        return self._sends_if_match and entity_tag.is_strong(pin.etag)

    def _request(self, pin: Pinned, start: int, length: int, tag: str) -> Request:
        """The request for `length` bytes from `start`, of the version of a tag."""
        headers = {
            "Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": self._coding,
        }  # fmt: skip
        if tag:
            headers["If-Match"] = tag
        path = self._client.endpoint.path + quote(pin.key)
        return Request("GET", path, "", headers)

    def _ask_for_range(
        self, pin: Pinned, start: int, into: memoryview, cancel: Cancel, asked: Asked | None
    ) -> int:
        """Request the range that fills a buffer; returns how many bytes of it came.

        If the service refuses a header of the request, the request is repeated without it. An
        answer that is cut off counts as one of a part.
        """
        what = self._url.name(pin.key)
        tag = pin.etag if self._matches(pin) else ""

        def ask(tag: str, asked: Asked | None = None) -> int:
            request = replace(self._request(pin, start, len(into), tag), into=into, asked=asked)

            def handle(answer: Answer, elsewhere: bool) -> int:
                return self._receive(answer, elsewhere, request, pin, start, into)

            return self._client.ask(request, handle, what, cancel)

        try:
            return ask(tag, asked)
        except SourceError as error:
            cause = error.__cause__
            if isinstance(cause, CutOffError) and cause.came >= LEAST_KEPT:
                return cause.came
            if isinstance(cause, ranges.PackedError) and self._coding != _UNPACKED:
                self._coding = _UNPACKED
                self._client.note("or a proxy compresses answers: requests no longer allow that")
                return ask(tag)
            refused = isinstance(error, ObjectChangedError | BadRequestError)
            if not (tag and refused and isinstance(cause, RefusedError)):
                raise
            # Either the object changed, or the service does not know `If-Match`.
            count = ask("")
            self._sends_if_match = False
            log.warning(
                "%s: the service does not support If-Match (%s); its answers are compared",
                what,
                error,
            )
            return count

    def _receive(
        self,
        answer: Answer,
        elsewhere: bool,
        request: Request,
        pin: Pinned,
        start: int,
        into: memoryview,
    ) -> int:
        """Receive an answer into a buffer; returns the size. Raises like `ranges.check`."""
        if answer.status not in (200, 206):
            refuse(answer)
        before, count = ranges.check(
            answer.status, answer.headers, answer.length, pin, start, len(into),
            elsewhere=elsewhere, may_be_packed=request.headers["Accept-Encoding"] == AS_STORED,
        )  # fmt: skip
        if answer.status == 200:
            self._client.note("answers a range with 200 instead of 206")
        answer.body.skip(before)
        try:
            answer.body.read_into(into[:count])
        except CutOffError as error:
            if answer.status == 206:
                raise
            # Only its length would have shown that it is the object and not a page of a proxy.
            raise CutOffError(str(error)) from error
        ends = answer.status == 206 or start + count == pin.size_bytes
        if ends and not answer.body.is_at_end:
            raise ranges.OtherRangeError("got more bytes than were asked for")
        return count
