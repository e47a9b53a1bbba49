"""S3 as a store: what lies below one prefix of a bucket, and ranges of its objects.

botocore decides where the bucket is and finds credentials (`boto/`); requests are signed by
`signing.py` and made by `http.py`. What S3 answers is checked where it comes in: listings in
`listing.py`, ranges in `ranges.py`, refusals in `refusals.py`. A source whose `ResolvedSource`
another process has brought loads botocore only when its credentials run out. All calls block: they
are made from worker threads.
"""

from __future__ import annotations

import contextlib
import email.utils
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

from lazyfs.blocks.buffers import take_buffer
from lazyfs.errors import (
    BadRequestError,
    BadResponseError,
    NotSupportedError,
    ObjectChangedError,
    SourceError,
    ThrottledError,
    WrongRegionError,
)
from lazyfs.movers.pool import Movers
from lazyfs.options.mount_options import MountOptions
from lazyfs.store import entity_tag, ranges
from lazyfs.store.cancel import Cancel
from lazyfs.store.credentials import Credentials, StaticCredentials, WebIdentity
from lazyfs.store.fleet_cache import FleetCache
from lazyfs.store.http import (
    Answer,
)
from lazyfs.store.live_credentials import LiveCredentials
from lazyfs.store.objects import Page, Pinned
from lazyfs.store.pages import Lister
from lazyfs.store.refusals import Refusal
from lazyfs.store.resolved_source import Place, ResolvedSource, TimedCredentials
from lazyfs.store.signed_client import Client, RefusedError, Request, refuse
from lazyfs.store.signing import SigningCredentials, canonical_query
from lazyfs.store.url import SourceUrl

if TYPE_CHECKING:
    from lazyfs.store.boto.resolver import Resolver
    from lazyfs.store.checksum import ObjectSum

T = TypeVar("T")
log = logging.getLogger(__name__)

# How often the first requests of a mount are made before it is refused, and the pause between.
FIRST_ATTEMPTS = 3
FIRST_PAUSE_S = 0.3
# The longest pause that S3 may ask for there.
FIRST_LONGEST_PAUSE_S = 5.0
# How long a mount that goes on waits for credentials before it serves what needs none.
CREDENTIALS_SOON_S = 2.0
# A stored gzip file comes as it is stored only to who says that he takes it
# (cloud.google.com/storage/docs/transcoding).
_AS_STORED = "identity, gzip"
# To a proxy that compresses whatever the client takes.
_UNPACKED = "identity"
# Answers that may make up one range.
MOST_PARTS = 128


def resolve(
    url: SourceUrl,
    options: MountOptions,
    credentials: Credentials | None = None,
    region: str | None = None,
) -> ResolvedSource:
    """Find out what a source needs, its first page included, and whether it can be read.

    Args:
        region: of the bucket, if it is known from before: then nothing is asked of S3.

    Raises:
        SourceError, OptionError: as of `Source`; or it cannot be listed or read.
    """
    source = Source(url, options, credentials, region=region)
    if region is None:
        return source.resolved(source.begin())
    source.prepare()
    return source.resolved(None)


class Source:
    """One prefix of one bucket.

    Args:
        url: what to read.
        options: how to reach it.
        credentials: given for this source; None: botocore finds them.
        resolved: what is known of it; else botocore finds it out now.
        region: of the bucket, if it is known from before, of a mount that goes on.

    Raises:
        SourceError: no credentials.
        OptionError: options or AWS configuration are not usable.
    """

    def __init__(
        self,
        url: SourceUrl,
        options: MountOptions,
        credentials: Credentials | None = None,
        resolved: ResolvedSource | None = None,
        *,
        region: str | None = None,
    ) -> None:
        self.url = url
        self._options = options
        self._given = credentials
        self._resolver: Resolver | None = None
        self._loading = threading.Lock()
        goes_on = resolved is not None or region is not None
        if resolved is None:
            resolver = self._loaded(region)
            # Where a mount goes on, they are had as soon as they are needed.
            first = None if region else resolver.credentials()
            resolved = ResolvedSource(resolver.place(region), first, None)
        self._ahead = resolved.page
        self._credentials = LiveCredentials(
            self._fetch_credentials, resolved.credentials, had=goes_on
        )
        # What this service was seen not to take.
        self._sends_if_match = True
        self._coding = _AS_STORED
        self._movers: Movers | None = None
        self._set_place(resolved.place)

    def use(self, movers: Movers) -> None:
        """Have movers receive ranges from now on."""
        self._movers = self._client.movers = movers

    @property
    def region(self) -> str:
        """That the bucket is in."""
        return self._client.place.region

    @property
    def endpoint(self) -> str:
        """What makes cached content of equal buckets and keys distinct: where it was asked for."""
        return self._client.place.identity

    def name(self, key: str) -> str:
        """An object of this source, for messages."""
        return self.url.name(key)

    def begin(self) -> Page:
        """The first page of all below the prefix; it and a range of an object show the way.

        Raises:
            SourceError: it cannot be listed, or its objects cannot be read.
        """
        page = self._first(lambda: self._in_its_region(lambda: self.list_page(self.url.prefix)))
        readable = [each for each in page.objects if each.size_bytes]
        if readable:
            self._in_its_region(lambda: self._try_to_read(readable[0]))
        if readable and not any(each.etag for each in readable):
            log.warning(
                "%s: objects have no ETag, so that only their sizes and times show when one is "
                "replaced while it is mounted", self.url,
            )  # fmt: skip
        return page

    def resolved(self, page: Page | None) -> ResolvedSource:
        """What another process needs to know. Raises SourceError."""
        timed = None if self._options.no_sign_request else self._credentials.timed()
        return ResolvedSource(self._client.place, timed, page)

    def prepare(self) -> None:
        """Have credentials ready, if they can be had soon: a mount that goes on needs none for what
        is on this machine."""
        ready = threading.Thread(target=self._have_credentials, daemon=True)
        ready.start()
        ready.join(CREDENTIALS_SOON_S)

    def _have_credentials(self) -> None:
        if not self._options.no_sign_request:
            with contextlib.suppress(SourceError):
                self._credentials.current()

    def set_credentials(self, credentials: Credentials) -> None:
        """Use other credentials from now on, in the place of those given at first.

        Raises:
            BadRequestError: none were given at first; botocore keeps its own fresh.
        """
        former = self._given
        if former is None:
            raise BadRequestError(f"{self.url}: was mounted without credentials of its own")
        self._given = credentials
        with self._loading:
            if self._resolver is not None:
                self._resolver.replace_credentials(credentials)
        if isinstance(credentials, StaticCredentials):
            try:
                signing = SigningCredentials.of(*asdict(credentials).values())
            except ValueError as error:
                raise BadRequestError(f"{self.url}: {error}") from error
            self._credentials.replace(TimedCredentials(signing))
        elif not (isinstance(former, WebIdentity) and credentials.role_arn == former.role_arn):
            self._credentials.replace(None)  # else a new token is for the next credentials

    def list_page(
        self, prefix: str, token: str | None = None, *, delimiter: str = "", after: str = ""
    ) -> Page:
        """Up to 1,000 objects below a prefix, in key order, from where `token` says.

        Args:
            after: without a token, only keys that follow this one.

        Raises:
            SourceError: S3 did not answer, or not as it must.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and (prefix, token, delimiter, after) == (
            self.url.prefix, None, "", "",
        ):  # fmt: skip
            return ahead
        return self._lister.page(prefix, token, delimiter, after)

    def clock_skew_s(self) -> float | None:
        """How far S3's clock is ahead of ours, by the Date of an answer; None if it has none.

        Raises:
            SourceError: S3 did not answer.
        """
        query = canonical_query({"list-type": "2", "max-keys": "1", "prefix": self.url.prefix})
        request = Request("GET", self._client.bucket_path, query, {})
        told = self._client.ask(
            request, lambda answer, _: answer.headers.get("date"), str(self.url), Cancel()
        )
        return email.utils.parsedate_to_datetime(told).timestamp() - time.time() if told else None

    def read_range(
        self, pin: Pinned, start: int, length: int, cancel: Cancel | None = None
    ) -> memoryview:
        """Exactly `length` bytes of an object from `start`, of the version that was listed.

        Args:
            cancel: lets another thread end it.

        Raises:
            CancelledError: by `cancel`.
            ObjectChangedError, ObjectGoneError: the object is no longer what was listed.
            SourceError: any other failure.
        """
        into = take_buffer(length)
        done = 0
        for _ in range(MOST_PARTS):
            done += self._ask_for_range(pin, start + done, into[done:], cancel or Cancel())
            if done == length:
                return into
            self._client.note("answers a range with a part of it")
        raise BadResponseError(f"{self.url.name(pin.key)}: {MOST_PARTS} answers gave {done} bytes")

    def read_cached(
        self, cache: FleetCache, pin: Pinned, start: int, length: int, cancel: Cancel
    ) -> memoryview | None:
        """As `read_range`, of the cache of a fleet.

        None: it is not to be asked, because nothing tells it which version is wanted.

        Raises:
            CancelledError: by `cancel`.
            FleetCacheError: it did not give the range of that version.
            SourceError: no credentials.
        """
        if not self._matches(pin):
            return None
        into = take_buffer(length)

        request = self._request(pin, start, into, pin.etag)

        def handle(answer: Answer, elsewhere: bool) -> memoryview:
            if self._receive(answer, elsewhere, request, pin, start, into) < length:
                raise ranges.OtherRangeError("got a part of what was asked for")
            return into

        return self._client.ask_cache(cache, request, handle, cancel)

    def _matches(self, pin: Pinned) -> bool:
        """Whether a request says which version of an object is wanted."""
        return self._sends_if_match and entity_tag.is_strong(pin.etag)

    def _request(self, pin: Pinned, start: int, into: memoryview, tag: str) -> Request:
        """For the range from `start` that fills a buffer, of the version that a tag names."""
        headers = {
            "Range": f"bytes={start}-{start + len(into) - 1}", "Accept-Encoding": self._coding,
        }  # fmt: skip
        if tag:
            headers["If-Match"] = tag
        path = self._client.place.path + quote(pin.key, safe="/~")
        return Request("GET", path, "", headers, into)

    def _ask_for_range(self, pin: Pinned, start: int, into: memoryview, cancel: Cancel) -> int:
        """Ask for the range that fills a buffer; how many bytes of it came.

        A service that cannot take a header of the request is asked once more without it.
        """
        what = self.url.name(pin.key)
        tag = pin.etag if self._matches(pin) else ""

        def ask(tag: str) -> int:
            request = self._request(pin, start, into, tag)

            def handle(answer: Answer, elsewhere: bool) -> int:
                return self._receive(answer, elsewhere, request, pin, start, into)

            return self._client.ask(request, handle, what, cancel)

        try:
            return ask(tag)
        except SourceError as error:
            cause = error.__cause__
            if isinstance(cause, ranges.PackedError) and self._coding != _UNPACKED:
                self._coding = _UNPACKED
                self._client.note("or a proxy compresses what it sends: it is asked not to")
                return ask(tag)
            refused = isinstance(error, ObjectChangedError | BadRequestError)
            if not (tag and refused and isinstance(cause, RefusedError)):
                raise
            # Was it refused for the object, or for the condition, which not every service knows?
            count = ask("")
            self._sends_if_match = False
            log.warning(
                "%s: the service takes no If-Match (%s); its answers are compared", what, error
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
        """Take an answer into a buffer; how many bytes came. Raises as `ranges.check` does."""
        if answer.status not in (200, 206):
            refuse(answer)
        before, count = ranges.check(
            answer.status, answer.headers, answer.length, pin, start, len(into),
            elsewhere=elsewhere, may_be_packed=request.headers["Accept-Encoding"] == _AS_STORED,
        )  # fmt: skip
        if answer.status == 200:
            self._client.note("answers a range with 200 in the place of 206")
        answer.body.skip(before)
        answer.body.read_into(into[:count])
        ends = answer.status == 206 or start + count == pin.size_bytes
        if ends and not answer.body.is_at_end:
            raise ranges.OtherRangeError("got more bytes than were asked for")
        return count

    def checksum(self, pin: Pinned) -> ObjectSum | None:
        """The checksum of a whole object, to be compared; None if S3 keeps none that can be.

        Raises:
            SourceError: the object is gone or was replaced, or S3 did not answer.
        """
        from lazyfs.store.checksum import ObjectSum  # for `lazyfs warm`

        def handle(answer: Answer, elsewhere: bool) -> ObjectSum | None:
            if answer.status != 200:
                raise RefusedError(Refusal.of(answer.status, answer.headers, b"", headed=True))
            ranges.check_whole(answer.headers, pin, elsewhere=elsewhere)
            return ObjectSum.of(answer.headers)

        path = self._client.place.path + quote(pin.key, safe="/~")
        request = Request("HEAD", path, "", {"Accept-Encoding": _AS_STORED})
        signed, what = {"x-amz-checksum-mode": "ENABLED"}, self.url.name(pin.key)
        try:
            return self._client.ask(request, handle, what, Cancel(), signed)
        except NotSupportedError:  # S3Proxy
            return self._client.ask(request, handle, what, Cancel())

    def close_idle(self) -> None:
        """Close connections that nobody has used for a while."""
        self._client.close_idle()

    # The begin

    def _first(self, action: Callable[[], T]) -> T:
        """Try a few times: nobody waits patiently for a mount that cannot be made."""
        for attempt in range(1, FIRST_ATTEMPTS + 1):
            try:
                return action()
            except SourceError as error:
                if not error.transient or attempt == FIRST_ATTEMPTS:
                    raise
                told_s = min(error.retry_after_s, FIRST_LONGEST_PAUSE_S)
            time.sleep(max(FIRST_PAUSE_S * attempt, told_s))
        raise AssertionError

    def _try_to_read(self, pin: Pinned) -> None:
        """Read a range of one object. What S3 says of that object, or of itself, is only logged."""
        try:
            self._first(lambda: self.read_range(pin, 0, 1))
        except ThrottledError as error:
            log.warning("%s", error)
        except SourceError as error:
            refused = error.__cause__
            # A code in the body shows that S3 answered: the way to it is right.
            said_by_s3 = isinstance(error, ObjectChangedError) or (
                isinstance(refused, RefusedError)
                and (refused.refusal.status < 500 or bool(refused.refusal.code))
            )
            if not said_by_s3 or isinstance(error, WrongRegionError | NotSupportedError):
                raise
            log.warning("listed, but not readable: %s", error)

    def _in_its_region(self, action: Callable[[], T]) -> T:
        """Go to the region that S3 says the bucket is in, unless another was asked for."""
        try:
            return action()
        except SourceError as error:
            refused = error.__cause__
            told = refused.refusal.region if isinstance(refused, RefusedError) else ""
            if not told or told == self.region:
                raise
            if self._options.region:
                raise WrongRegionError(
                    f"{self.url}: the bucket is in {told}, not in {self._options.region}: "
                    f"use --region {told}, or leave the option out"
                ) from error
        self._set_place(self._loaded(told).place(told))
        return action()

    def _set_place(self, place: Place) -> None:
        credentials = None if self._options.no_sign_request else self._credentials
        self._client = Client(
            str(self.url),
            place,
            credentials,
            requester_pays=self._options.requester_pays,
            refuse_local=self._options.refuse_local,
            movers=self._movers,
        )
        self._lister = Lister(self.url, self._client)

    # botocore

    def _fetch_credentials(self, anew: bool) -> TimedCredentials:
        timed = self._loaded(self.region).credentials(anew)
        assert timed is not None
        return timed

    def _loaded(self, region: str | None) -> Resolver:
        """What botocore is needed for. Raises OptionError."""
        from lazyfs.store.boto.resolver import Resolver  # a tenth of a second

        with self._loading:
            if self._resolver is None:
                self._resolver = Resolver(self.url, self._options, self._given, region)
            return self._resolver
