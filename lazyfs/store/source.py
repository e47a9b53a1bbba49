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
import re
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, NoReturn, TypeVar
from urllib.parse import quote, urljoin, urlsplit

from lazyfs import __version__
from lazyfs.errors import (
    AccessDeniedError,
    BadRequestError,
    BadResponseError,
    CredentialsExpiredError,
    NotSupportedError,
    ObjectChangedError,
    SourceError,
    ThrottledError,
    UnavailableError,
    UntrustedError,
    WrongRegionError,
)
from lazyfs.options.mount_options import MountOptions
from lazyfs.store import entity_tag, listing, ranges
from lazyfs.store.cancel import Cancel
from lazyfs.store.credentials import Credentials, StaticCredentials, WebIdentity
from lazyfs.store.http import (
    SILENCE_TIMEOUT_S,
    Answer,
    BadAddressError,
    BadRedirectError,
    Transport,
    may_be_redirected_to,
    must_be_elsewhere,
    tls_context,
)
from lazyfs.store.live_credentials import LiveCredentials
from lazyfs.store.objects import Page, Pinned
from lazyfs.store.refusals import Refusal, printable
from lazyfs.store.resolved import Place, ResolvedSource, TimedCredentials
from lazyfs.store.signing import Signer, SigningCredentials, canonical_query
from lazyfs.store.url import SourceUrl

if TYPE_CHECKING:
    from lazyfs.store.boto.resolver import Resolver
    from lazyfs.store.checksum import ObjectSum

T = TypeVar("T")
log = logging.getLogger(__name__)

# Of the text that comes with a refusal, how much is read.
MOST_TEXT = 64 << 10
MOST_REDIRECTS = 5
# Servers that redirects led to, whose connections are kept.
MOST_SERVERS = 16
# Peculiarities of a service that are told.
MOST_NOTED = 50
# How often the first requests of a mount are made before it is refused, and the pause between.
FIRST_ATTEMPTS = 3
FIRST_PAUSE_S = 0.3
# How long a mount that goes on waits for credentials before it serves what needs none.
CREDENTIALS_SOON_S = 2.0
_AGENT = f"lazyfs/{__version__}"
# A stored gzip file comes as it is stored only to who says that he takes it
# (cloud.google.com/storage/docs/transcoding).
_AS_STORED = "identity, gzip"
_SIGNED_URL = re.compile(r"[?&](X-Amz-Signature|X-Goog-Signature|Signature|sig)=", re.IGNORECASE)
# Prefixes of the tokens of pages: as S3 gave it, or a key after which the listing goes on.
_TOKEN, _AFTER = "t", "k"
# Follows all keys that begin with what stands before it.
_LAST = "\U0010ffff"


class _RefusedError(Exception):
    """An answer that is not what was asked for."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.status)
        self.refusal = refusal


class _RedirectedError(Exception):
    """What was asked for is elsewhere."""

    def __init__(self, location: str, refusal: Refusal) -> None:
        super().__init__(location)
        self.location = location
        self.refusal = refusal


@dataclass(frozen=True, slots=True)
class _Request:
    """A request before it is signed.

    Attributes:
        path: encoded.
        headers: that are not signed.
    """

    method: str
    path: str
    query: str
    headers: Mapping[str, str]

    @property
    def target(self) -> str:
        return f"{self.path}?{self.query}" if self.query else self.path


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
        if resolved is None:
            resolver = self._loaded(region)
            # Where a mount goes on, they are had as soon as they are needed.
            first = None if region else resolver.credentials()
            resolved = ResolvedSource(resolver.place(region), first, None)
        self._ahead = resolved.page
        self._credentials = LiveCredentials(
            self._fetch_credentials, resolved.credentials, had=region is not None
        )
        self._servers: dict[str, tuple[Transport, Signer]] = {}
        self._tls: ssl.SSLContext | None = None
        # What this service was seen to do.
        self._lists_by_version_1 = False
        self._plus_is_space: bool | None = None
        self._sends_if_match = True
        self._noted: set[str] = set()
        self._set_place(resolved.place)

    @property
    def region(self) -> str:
        """That the bucket is in."""
        return self._place.region

    @property
    def endpoint(self) -> str:
        """What makes cached content of equal buckets and keys distinct: where it was asked for."""
        return self._place.identity

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
            self._try_to_read(readable[0])
        if readable and not any(each.etag for each in readable):
            log.warning(
                "%s: objects have no ETag, so that only their sizes and times show when one is "
                "replaced while it is mounted", self.url,
            )  # fmt: skip
        return page

    def resolved(self, page: Page | None) -> ResolvedSource:
        """What another process needs to know. Raises SourceError."""
        timed = None if self._options.no_sign_request else self._credentials.timed()
        return ResolvedSource(self._place, timed, page)

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
            self._credentials.replace(TimedCredentials(SigningCredentials(**asdict(credentials))))
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
        what = f"listing of {self.url.name(prefix)}"
        parameters = {"prefix": prefix, "delimiter": delimiter}
        kind, value = (token[:1], token[1:]) if token else (_AFTER, after)
        if kind == _TOKEN:
            parameters["continuation-token"] = value
        elif value:
            # The same of both versions: a service that knows one only does not look at the other.
            parameters |= {"start-after": value}
            if token:
                parameters |= {"marker": value}
        page = self._list(parameters, what)
        encoded = page.is_encoded
        plus = encoded and self._means_space(page, parameters, what)
        found = listing.entries(page, prefix, delimiter, encoded=encoded, plus=plus)
        following = self._next_token(page, found, encoded=encoded, plus=plus, what=what)
        if following is not None and following == token:
            raise BadRequestError(f"{what}: it does not go on: the same page would follow")
        return Page(found.objects, found.prefixes, following, found.hidden)

    def clock_skew_s(self) -> float | None:
        """How far S3's clock is ahead of ours, by the Date of an answer; None if it has none.

        Raises:
            SourceError: S3 did not answer.
        """
        query = canonical_query({"list-type": "2", "max-keys": "1", "prefix": self.url.prefix})
        request = _Request("GET", self._bucket_path, query, {})
        told = self._ask(
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
        what = self.url.name(pin.key)
        headers = {"Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": _AS_STORED}
        path = self._place.path + quote(pin.key, safe="/~")
        matched = self._sends_if_match and entity_tag.is_strong(pin.etag)

        def handle(answer: Answer, elsewhere: bool) -> memoryview:
            if answer.status not in (200, 206):
                _refuse(answer)
            before = ranges.check(
                answer.status, answer.headers, answer.length, pin, start, length,
                elsewhere=elsewhere,
            )  # fmt: skip
            if answer.status == 200:
                self._note("answers a range with 200 in the place of 206")
            answer.body.skip(before)
            data = answer.body.read(length)
            if answer.status == 206 and not answer.body.is_at_end:
                raise ranges.OtherRangeError("got more bytes than were asked for")
            return data

        cancel = cancel or Cancel()
        if not matched:
            return self._ask(_Request("GET", path, "", headers), handle, what, cancel)
        request = _Request("GET", path, "", {**headers, "If-Match": pin.etag})
        try:
            return self._ask(request, handle, what, cancel)
        except (ObjectChangedError, BadRequestError) as error:
            if not isinstance(error.__cause__, _RefusedError):
                raise
            # Was it refused for the object, or for the condition, which not every service knows?
            answer = self._ask(_Request("GET", path, "", headers), handle, what, cancel)
            self._sends_if_match = False
            log.warning(
                "%s: the service takes no If-Match (%s); its answers are compared", what, error
            )
            return answer

    def checksum(self, pin: Pinned) -> ObjectSum | None:
        """The checksum of a whole object, to be compared; None if S3 keeps none that can be.

        Raises:
            SourceError: the object is gone or was replaced, or S3 did not answer.
        """
        from lazyfs.store.checksum import ObjectSum  # for `lazyfs warm`

        def handle(answer: Answer, elsewhere: bool) -> ObjectSum | None:
            if answer.status != 200:
                raise _RefusedError(Refusal.of(answer.status, answer.headers, b"", headed=True))
            ranges.check_whole(answer.headers, pin, elsewhere=elsewhere)
            return ObjectSum.of(answer.headers)

        path = self._place.path + quote(pin.key, safe="/~")
        request = _Request("HEAD", path, "", {"Accept-Encoding": _AS_STORED})
        signed, what = {"x-amz-checksum-mode": "ENABLED"}, self.url.name(pin.key)
        try:
            return self._ask(request, handle, what, Cancel(), signed)
        except NotSupportedError:  # S3Proxy
            return self._ask(request, handle, what, Cancel())

    def close_idle(self) -> None:
        """Close connections that nobody has used for a while."""
        for transport, _ in list(self._servers.values()):
            transport.close_idle()

    # Listings

    @property
    def _bucket_path(self) -> str:
        return self._place.path.removesuffix("/") or "/"

    def _list(
        self, parameters: Mapping[str, str], what: str, *, encoded: bool = True
    ) -> listing.RawPage:
        def handle(answer: Answer, _: bool) -> bytes:
            if answer.status != 200:
                _refuse(answer)
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
            given.pop("continuation-token", None)
            if after := given.pop("start-after", None):
                given["marker"] = after
        else:
            given["list-type"] = "2"
        request = _Request(
            "GET", self._bucket_path, canonical_query(given), {"Accept-Encoding": "identity"}
        )
        try:
            body = self._ask(request, handle, what, Cancel())
        except NotSupportedError:
            if self._lists_by_version_1:
                raise
            self._note("does not know version 2 of listings: version 1 is used")
            self._lists_by_version_1 = True
            return self._list(parameters, what, encoded=encoded)
        except zlib.error as error:
            self._be_vague(what, error)
            raise BadResponseError(f"{what}: the answer is no gzip: {error}") from error
        try:
            return listing.parse(body)
        except listing.NotAListingError as error:
            refusal = Refusal.of(200, {}, body[:MOST_TEXT])
            if refusal.code:  # S3 began to answer before it knew
                raise refusal.error(what) from error
            self._be_vague(what, error)
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
                self._note("leaves + in keys as it is")
        return self._plus_is_space is not False

    def _next_token(
        self, page: listing.RawPage, found: listing.Entries, *, encoded: bool, plus: bool, what: str
    ) -> str | None:
        """What the next page is asked for with."""
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
        self._note("gives no token for the next page of a listing: it goes on after the last key")
        return _AFTER + (last + _LAST if last in found.prefixes else last)

    def _note(self, words: str) -> None:
        """Tell once what a service does differently."""
        if words not in self._noted and len(self._noted) < MOST_NOTED:
            self._noted.add(words)
            log.info("%s: the service %s", self.url, words)

    # The begin

    def _first(self, action: Callable[[], T]) -> T:
        """Try a few times: nobody waits patiently for a mount that cannot be made."""
        for attempt in range(1, FIRST_ATTEMPTS + 1):
            try:
                return action()
            except SourceError as error:
                if not error.transient or attempt == FIRST_ATTEMPTS:
                    raise
            time.sleep(FIRST_PAUSE_S * attempt)
        raise AssertionError

    def _try_to_read(self, pin: Pinned) -> None:
        """A range of one object: what S3 says of that object is its own affair, and is told."""
        try:
            self._first(lambda: self.read_range(pin, 0, 1))
        except ThrottledError as error:
            log.warning("%s", error)
        except SourceError as error:
            refused = error.__cause__
            about_the_object = isinstance(error, ObjectChangedError) or (
                isinstance(refused, _RefusedError) and refused.refusal.status < 500
            )
            if not about_the_object or isinstance(error, WrongRegionError | NotSupportedError):
                raise
            log.warning("listed, but not readable: %s", error)

    def _in_its_region(self, action: Callable[[], T]) -> T:
        """Go to the region that S3 says the bucket is in, unless another was asked for."""
        try:
            return action()
        except SourceError as error:
            refused = error.__cause__
            told = refused.refusal.region if isinstance(refused, _RefusedError) else ""
            if not told or told == self.region:
                raise
            if self._options.region:
                raise WrongRegionError(
                    f"{self.url}: the bucket is in {told}, not in {self._options.region}: "
                    f"use --region {told}, or leave the option out"
                ) from error
        self._set_place(self._loaded(told).place(told))
        return action()

    # Requests

    def _ask(
        self,
        request: _Request,
        handle: Callable[[Answer, bool], T],
        what: str,
        cancel: Cancel,
        signed: Mapping[str, str] | None = None,
    ) -> T:
        """Make a request, and follow it to where it is redirected.

        Args:
            handle: is told whether another service than ours answers.
            signed: headers that are signed.

        Raises:
            SourceError: it was refused, or not answered.
        """
        credentials = None
        try:
            credentials = None if self._options.no_sign_request else self._credentials.current()
            answer = self._follow(request, handle, cancel, credentials, signed or {})
        except _RefusedError as error:
            if not error.refusal.code:
                self._be_vague(what, error)
            self._raise_refused(what, error, credentials)
        except ranges.ChangedError as error:
            raise ObjectChangedError(f"{what}: {error}") from error
        except ranges.OtherRangeError as error:
            self._be_vague(what, error)
            raise BadResponseError(f"{what}: {error}") from error
        except BadAddressError as error:
            raise BadRequestError(f"{what}: {error}") from error
        except ranges.IgnoresRangeError as error:
            self._be_vague(what, error)
            raise BadRequestError(f"{what}: {error}") from error
        except ssl.SSLCertVerificationError as error:
            self._be_vague(what, error)
            cause = f"certificate refused: {error.verify_message}; see --ca-bundle"
            raise UntrustedError(f"{what}: {cause}") from error
        except OSError as error:
            self._be_vague(what, error)
            raise UnavailableError(
                f"{what}: no usable answer from {self._place.server} ({_cause(error)})"
            ) from error
        if credentials is not None:
            self._credentials.worked(credentials)
        return answer

    def _be_vague(self, what: str, error: Exception) -> None:
        """Where somebody else than the administrator chose the server, do not say what is there.

        Raises:
            UnavailableError: the same for a closed port, for silence and for what is no S3.
        """
        if self._options.refuse_local:
            log.info("%s: %s: %s", what, type(error).__name__, printable(str(error)))
            raise UnavailableError(f"{what}: no usable answer of S3") from error

    def _follow(
        self,
        request: _Request,
        handle: Callable[[Answer, bool], T],
        cancel: Cancel,
        credentials: SigningCredentials | None,
        signed: Mapping[str, str],
    ) -> T:
        server, elsewhere = self._place.server, False
        if self._options.requester_pays:
            signed = {**signed, "x-amz-request-payer": "requester"}
        refusal: Refusal | None = None
        for _ in range(MOST_REDIRECTS + 1):
            transport, signer = self._server(server)
            headers = {**request.headers, "User-Agent": _AGENT}
            if not elsewhere:
                headers |= signed
                if credentials is not None:
                    headers |= signer.headers(
                        request.method, request.path, request.query, signed, credentials
                    )
            try:
                return transport.exchange(
                    request.method, request.target, headers,
                    lambda answer, elsewhere=elsewhere: _unless_redirected(  # type: ignore[misc]
                        answer, lambda answer: handle(answer, elsewhere)
                    ),
                    cancel,
                )  # fmt: skip
            except _RedirectedError as error:
                refusal = error.refusal
                server, request, elsewhere = self._redirected(
                    server, request, error.location, elsewhere
                )
        assert refusal is not None
        raise BadRedirectError(f"redirected more than {MOST_REDIRECTS} times")

    def _redirected(
        self, server: str, request: _Request, location: str, elsewhere: bool
    ) -> tuple[str, _Request, bool]:
        """Where a redirect leads, what to ask there, and whether that is another service."""
        try:
            url = urlsplit(urljoin(f"{server}{request.target}", location))
            host, _ = url.hostname, url.port
        except ValueError:
            host = None
        if not host or url.scheme not in ("http", "https") or url.username is not None:
            raise BadRedirectError(f"redirected to {location[:100]!r}")
        if server.startswith("https:") and url.scheme != "https":
            raise BadRedirectError("redirected from https to http")
        to = f"{url.scheme}://{url.netloc}"
        ours = _is_same_service(self._place.server, to) and not _SIGNED_URL.search(f"?{url.query}")
        elsewhere = elsewhere or not ours
        headers = request.headers
        if elsewhere:  # the entity tags of another service are its own
            headers = {name: value for name, value in headers.items() if name != "If-Match"}
        self._note(f"redirects to {printable(to)}")
        return (
            to,
            replace(request, path=url.path or "/", query=url.query, headers=headers),
            elsewhere,
        )

    def _server(self, server: str) -> tuple[Transport, Signer]:
        """Connections to a server, and what signs requests for it."""
        found = self._servers.get(server)
        if found is None:
            if server.startswith("https:") and self._tls is None:
                self._tls = tls_context(self._place.authorities)
            proxy = self._place.proxy
            may_connect = must_be_elsewhere if self._options.refuse_local else _anywhere
            if self._servers:
                first = next(iter(self._servers.values()))[0]
                if not self._options.refuse_local:
                    may_connect = lambda address: may_be_redirected_to(address, first.address)  # noqa: E731
                self._forget_servers()
            transport = Transport(server, self._tls, proxy, may_connect)
            found = transport, Signer(server, self._place.region, self._place.service)
            self._servers[server] = found
        return found

    def _forget_servers(self) -> None:
        """Make room for one more, beside the endpoint, which is the first."""
        for server in list(self._servers)[1:]:
            if len(self._servers) < MOST_SERVERS:
                return
            if dropped := self._servers.pop(server, None):
                dropped[0].close_idle(0.0)

    def _raise_refused(
        self, what: str, error: _RefusedError, credentials: SigningCredentials | None
    ) -> NoReturn:
        refused = error.refusal.error(what)
        if isinstance(refused, CredentialsExpiredError) and credentials is not None:
            self._credentials.refused(credentials)
            if error.refusal.code == "SignatureDoesNotMatch":
                self._credentials.current()  # looks for others
                if not self._credentials.may_be_replaced(credentials):
                    raise AccessDeniedError(str(refused)) from error
        raise refused from error

    def _set_place(self, place: Place) -> None:
        self._place = place
        self._servers.clear()
        self._server(place.server)

    # botocore

    def _fetch_credentials(self, anew: bool) -> TimedCredentials:
        timed = self._loaded(self._place.region).credentials(anew)
        assert timed is not None
        return timed

    def _loaded(self, region: str | None) -> Resolver:
        """What botocore is needed for. Raises OptionError."""
        from lazyfs.store.boto.resolver import Resolver  # a tenth of a second

        with self._loading:
            if self._resolver is None:
                self._resolver = Resolver(self.url, self._options, self._given, region)
            return self._resolver


def _anywhere(address: str) -> None:
    """The endpoint is where the options say that it is."""


def _unless_redirected(answer: Answer, handle: Callable[[Answer], T]) -> T:
    """Handle an answer, or raise _RedirectedError."""
    location = answer.headers.get("location")
    if location and answer.status in (301, 302, 303, 307, 308):
        refusal = Refusal.of(answer.status, answer.headers, answer.body.read_all(MOST_TEXT))
        # 301 of S3 itself is about the region of the bucket.
        if answer.status != 301 or not (refusal.code or refusal.region):
            raise _RedirectedError(location, refusal)
        raise _RefusedError(refusal)
    return handle(answer)


def _refuse(answer: Answer) -> NoReturn:
    raise _RefusedError(Refusal.of(answer.status, answer.headers, answer.body.read_all(MOST_TEXT)))


def _is_same_service(ours: str, other: str) -> bool:
    """Whether two servers belong to one service, which may see what is signed for it."""
    one, two = urlsplit(ours), urlsplit(other)
    if one.netloc == two.netloc:
        return True
    a, b = one.hostname or "", two.hostname or ""
    of_aws = (".amazonaws.com", ".amazonaws.com.cn")
    if a.endswith(of_aws) and b.endswith(of_aws):
        return True
    # BUCKET.HOST and HOST, on the same port.
    return one.port == two.port and (a.endswith(f".{b}") or b.endswith(f".{a}"))


def _cause(error: OSError) -> str:
    """What is wrong with a connection, in a few words."""
    if isinstance(error, TimeoutError):
        return f"no answer for {SILENCE_TIMEOUT_S:g} s"
    return error.strerror or str(error) or type(error).__name__
