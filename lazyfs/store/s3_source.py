"""S3 as a store: the listing of one prefix of a bucket, and ranges of its objects.

botocore decides where the bucket is and finds credentials (`boto/`); `signing.py` signs requests
and `http.py` sends them. Answers of S3 are checked on arrival: listings in `listing.py`, ranges in
`ranges.py`, errors in `refusals.py`. If another process provides the `ResolvedSource`, botocore is
loaded only when the credentials expire. All calls block: they are made from worker threads.
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

from lazyfs.errors import (
    BadRequestError,
    NotSupportedError,
    ObjectChangedError,
    SourceError,
    ThrottledError,
    UnavailableError,
    WrongRegionError,
)
from lazyfs.options.mount_options import MountOptions
from lazyfs.store import ranges
from lazyfs.store.cancel import Cancel
from lazyfs.store.credentials import Credentials, StaticCredentials, WebIdentity
from lazyfs.store.http_answer import Answer
from lazyfs.store.listing_page import Page, Pinned
from lazyfs.store.live_credentials import LiveCredentials
from lazyfs.store.pages import Lister
from lazyfs.store.range_reader import AS_STORED, RangeReader
from lazyfs.store.refusals import Refusal
from lazyfs.store.request import RefusedError, Request
from lazyfs.store.resolved_source import Endpoint, ResolvedSource, TimedCredentials
from lazyfs.store.signed_client import Client
from lazyfs.store.signing import SigningCredentials, canonical_query
from lazyfs.store.url import SourceUrl

if TYPE_CHECKING:
    from lazyfs.movers.pool import Movers
    from lazyfs.store.boto.resolver import Resolver
    from lazyfs.store.checksum import ObjectSum

T = TypeVar("T")
log = logging.getLogger(__name__)

# How often the first requests of a mount are tried before it is refused, and the pause between.
FIRST_ATTEMPTS = 3
FIRST_PAUSE_S = 0.3
# The longest `Retry-After` that is obeyed meanwhile.
FIRST_LONGEST_PAUSE_S = 5.0
# How long a resumed mount waits for credentials before it serves reads that need none.
CREDENTIALS_SOON_S = 2.0


class S3Source:
    """One prefix of one bucket.

    Args:
        url: the bucket and prefix.
        options: how to reach it.
        credentials: the credentials for this source; None: botocore finds them.
        resolved: what is known about the source; None: botocore finds it out now.
        region: the bucket's region, if it is already known because the mount is resumed.

    Raises:
        SourceError: there are no credentials.
        OptionError: the options or the AWS configuration cannot be used.
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
            # A resumed mount fetches them when they are needed.
            first = None if region else resolver.credentials()
            resolved = ResolvedSource(resolver.endpoint(region), first, None)
        self._ahead = resolved.page
        self._credentials = LiveCredentials(
            self._fetch_credentials, resolved.credentials, had=goes_on
        )
        self._movers: Movers | None = None
        self._set_endpoint(resolved.endpoint)

    @classmethod
    def resolve(
        cls,
        url: SourceUrl,
        options: MountOptions,
        credentials: Credentials | None = None,
        region: str | None = None,
    ) -> ResolvedSource:
        """See `Source`."""
        source = cls(url, options, credentials, region=region)
        if region is None:
            return source.resolved(source.begin())
        source.prepare()
        return source.resolved(None)

    def use(self, movers: Movers) -> None:
        """Have movers receive ranges from now on."""
        self._movers = self._client.movers = movers

    @property
    def region(self) -> str:
        """The region of the bucket."""
        return self._client.endpoint.region

    @property
    def endpoint(self) -> str:
        """The identity of the service, which keeps cached content of two services apart."""
        return self._client.endpoint.identity

    def name(self, key: str) -> str:
        """The name of an object of this source, for messages."""
        return self.url.name(key)

    def begin(self) -> Page:
        """The first page of a listing of the prefix, after a check that an object can be read.

        Raises:
            SourceError: the source cannot be listed, or its objects cannot be read.
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
        """What another process needs to know about this source."""
        return ResolvedSource(self._client.endpoint, self._credentials.timed(), page)

    def prepare(self) -> None:
        """Get credentials if they are available soon; a resumed mount needs none for data on this
        machine."""
        ready = threading.Thread(target=self._have_credentials, daemon=True)
        ready.start()
        ready.join(CREDENTIALS_SOON_S)

    def _have_credentials(self) -> None:
        if not self._options.no_sign_request:
            with contextlib.suppress(SourceError):
                self._credentials.current()

    def set_credentials(self, credentials: Credentials) -> None:
        """Use other credentials from now on, instead of those given at first.

        Raises:
            BadRequestError: none were given at first: botocore renews its own.
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
            self._credentials.replace(None)  # otherwise the next credentials need the new token

    def list_page(
        self, prefix: str, token: str | None = None, *, delimiter: str = "", after: str = ""
    ) -> Page:
        """Up to 1,000 objects below a prefix, in key order, from `token` on.

        Args:
            after: without a token, only keys that follow this one.

        Raises:
            SourceError: S3 did not answer, or its answer is invalid.
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

    def checksum(self, pin: Pinned) -> ObjectSum | None:
        """The checksum of a whole object, to be compared; None if S3 keeps no comparable one.

        Raises:
            SourceError: the object is gone or was replaced, or S3 did not answer.
        """
        from lazyfs.store.checksum import ObjectSum  # for `lazyfs warm`

        def handle(answer: Answer, elsewhere: bool) -> ObjectSum | None:
            if answer.status != 200:
                raise RefusedError(Refusal.of(answer.status, answer.headers, b"", headed=True))
            ranges.check_whole(answer.headers, pin, elsewhere=elsewhere)
            return ObjectSum.of(answer.headers)

        path = self._client.endpoint.path + quote(pin.key)
        request = Request("HEAD", path, "", {"Accept-Encoding": AS_STORED})
        signed, what = {"x-amz-checksum-mode": "ENABLED"}, self.url.name(pin.key)
        try:
            return self._client.ask(request, handle, what, Cancel(), signed)
        except NotSupportedError:  # S3Proxy
            return self._client.ask(request, handle, what, Cancel())

    def close_idle(self, longer_than_s: float) -> None:
        """Close connections that have been idle for this long."""
        self._client.close_idle(longer_than_s)

    # The begin

    def _first(self, action: Callable[[], T]) -> T:
        """Try a few times: a mount that cannot be made should fail soon."""
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
        """Read a range of one object. Errors of that object, and of S3 itself, are only logged.

        So is silence, and it is not waited out twice: some services fetch an object from a slower
        place when it is first read, and listing has worked.
        """

        def read() -> None:
            try:
                self.ranges.read(pin, 0, 1)
            except UnavailableError as error:
                if not isinstance(error.__cause__, TimeoutError):
                    raise
                log.warning("listed, but not read yet: %s", error)

        try:
            self._first(read)
        except ThrottledError as error:
            log.warning("%s", error)
        except SourceError as error:
            refused = error.__cause__
            # An error code in the body shows that S3 answered: the endpoint is right.
            said_by_s3 = isinstance(error, ObjectChangedError) or (
                isinstance(refused, RefusedError)
                and (refused.refusal.status < 500 or bool(refused.refusal.code))
            )
            if not said_by_s3 or isinstance(error, WrongRegionError | NotSupportedError):
                raise
            log.warning("listed, but not readable: %s", error)

    def _in_its_region(self, action: Callable[[], T]) -> T:
        """Switch to the bucket's region according to S3, unless --region names another one."""
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
        self._set_endpoint(self._loaded(told).endpoint(told))
        return action()

    def _set_endpoint(self, endpoint: Endpoint) -> None:
        credentials = None if self._options.no_sign_request else self._credentials
        self._client = Client(
            str(self.url),
            endpoint,
            credentials,
            requester_pays=self._options.requester_pays,
            refuse_local=self._options.refuse_local,
            movers=self._movers,
        )
        self._lister = Lister(self.url, self._client)
        self.ranges = RangeReader(self.url, self._client)

    # botocore

    def _fetch_credentials(self, anew: bool) -> TimedCredentials:
        timed = self._loaded(self.region).credentials(anew)
        assert timed is not None
        return timed

    def _loaded(self, region: str | None) -> Resolver:
        """The parts that need botocore. Raises OptionError."""
        from lazyfs.store.boto.resolver import Resolver  # its import takes a tenth of a second

        with self._loading:
            if self._resolver is None:
                self._resolver = Resolver(self.url, self._options, self._given, region)
            return self._resolver
