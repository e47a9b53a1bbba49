"""Requests and checks the pages of a listing, and finds the next one, for all kinds of services."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping

from lazyfs.errors import BadRequestError, BadResponseError, NotSupportedError, SourceError
from lazyfs.store import listing
from lazyfs.store.cancel import Cancel
from lazyfs.store.http_answer import Answer
from lazyfs.store.listing_page import Page
from lazyfs.store.refusals import MOST_TEXT, Refusal
from lazyfs.store.request import Request, refuse
from lazyfs.store.signed_client import Client
from lazyfs.store.signing import canonical_query
from lazyfs.store.url import SourceUrl

log = logging.getLogger(__name__)

# Prefixes of page tokens: a token from S3, or a key after which the listing continues.
_TOKEN, _AFTER = "t", "k"
# PREFIX + _LAST sorts after all keys that begin with PREFIX.
_LAST = "\U0010ffff"


class Lister:
    """Lists one bucket.

    Args:
        url: of the source, for messages.
        client: sends requests to the service.
    """

    def __init__(self, url: SourceUrl, client: Client) -> None:
        self._url = url
        self._client = client
        # What was learned about this service.
        self._lists_by_version_1 = False
        self._plus_is_space: bool | None = None

    def page(self, prefix: str, token: str | None, delimiter: str, after: str) -> Page:
        """As `Store.list_page`."""
        what = f"listing of {self._url.name(prefix)}"
        parameters = {"prefix": prefix, "delimiter": delimiter}
        kind, value = (token[:1], token[1:]) if token else (_AFTER, after)
        if kind == _TOKEN:
            parameters["continuation-token"] = value
        elif value:
            # Parameters of both versions: a service that knows only one ignores the other's.
            parameters |= {"start-after": value}
            if token:
                parameters |= {"marker": value}
        page = self._list(parameters, what)
        encoded = page.is_encoded
        plus = encoded and self._means_space(page, parameters, what)
        found = listing.entries(page, prefix, delimiter, encoded=encoded, plus=plus)
        following = self._next_token(page, found, encoded=encoded, plus=plus, what=what)
        if following is not None and following == token:
            raise BadRequestError(f"{what}: the listing does not advance: a page would repeat")
        return Page(found.objects, found.prefixes, following, found.hidden)

    def _list(
        self, parameters: Mapping[str, str], what: str, *, encoded: bool = True
    ) -> listing.RawPage:
        def handle(answer: Answer, _: bool) -> bytes:
            if answer.status != 200:
                refuse(answer)
            body = answer.body.read_all(listing.MOST_BYTES + 1)
            if answer.headers.get("content-encoding", "").lower() == "gzip":
                body = zlib.decompressobj(31).decompress(body, listing.MOST_BYTES + 1)
            if len(body) > listing.MOST_BYTES:
                raise BadRequestError(
                    f"{what}: the answer has over {listing.MOST_BYTES >> 20} MiB, "
                    "which no listing has"
                )
            return body

        given = {name: value for name, value in parameters.items() if value}
        if encoded:
            given["encoding-type"] = "url"
        if self._lists_by_version_1:
            if after := given.pop("start-after", None):
                given["marker"] = after
        else:
            given["list-type"] = "2"
        request = Request(
            "GET", self._client.bucket_path, canonical_query(given), {"Accept-Encoding": "identity"}
        )
        try:
            body = self._client.ask(request, handle, what, Cancel())
        except NotSupportedError:
            if self._lists_by_version_1:
                raise
            self._client.note("does not know version 2 of listings: version 1 is used")
            self._lists_by_version_1 = True
            return self._list(parameters, what, encoded=encoded)
        except zlib.error as error:
            self._client.be_vague(what, error)
            raise BadResponseError(f"{what}: the answer is not gzip: {error}") from error
        try:
            return listing.parse(body)
        except listing.NotAListingError as error:
            refusal = Refusal.of(200, {}, body[:MOST_TEXT])
            if refusal.code:  # S3 sent the status before it found the error
                raise refusal.error(what) from error
            self._client.be_vague(what, error)
            raise BadResponseError(f"{what}: this is not a listing of S3: {error}") from error

    def _means_space(self, page: listing.RawPage, parameters: Mapping[str, str], what: str) -> bool:
        """Whether `+` in the keys of a page stands for a space."""
        shown = listing.plus_is_space(page)
        if shown is not None:
            self._plus_is_space = shown
        elif self._plus_is_space is None and listing.has_plus(page):
            try:
                plain = self._list(parameters, what, encoded=False)
            except SourceError as error:
                log.info("%s: what + means in its keys could not be found out: %s", what, error)
                return True
            keys = set(plain.texts())
            self._plus_is_space = not any("+" in text and text in keys for text in page.texts())
            if not self._plus_is_space:
                self._client.note("leaves + in keys as it is")
        return self._plus_is_space is not False

    def _next_token(
        self, page: listing.RawPage, found: listing.Entries, *, encoded: bool, plus: bool, what: str
    ) -> str | None:
        """The token for the next page."""
        try:
            if not page.is_truncated:
                return None
        except listing.NotAListingError as error:
            raise BadResponseError(f"{what}: this is not a listing of S3: {error}") from error
        if page.token and not self._lists_by_version_1:
            return _TOKEN + page.token
        last = page.marker and listing.decode(page.marker, encoded=encoded, plus=plus)
        last = last or found.last
        if not last:
            raise BadResponseError(
                f"{what}: more follows, but the answer does not say how to ask for it"
            )
        self._client.note(
            "gives no token for the next page of a listing: it continues after the last key"
        )
        return _AFTER + (last + _LAST if last in found.prefixes else last)
