"""Requests to one service: signs and sends them, follows redirects, and turns refusals into errors.

The result is a value, or a `SourceError` whose message names what was requested.
"""

from __future__ import annotations

import contextlib
import logging
import re
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn, TypeVar
from urllib.parse import parse_qsl, quote, unquote_to_bytes, urljoin, urlsplit

from lazyfs import __version__
from lazyfs.errors import (
    AccessDeniedError,
    BadRequestError,
    BadResponseError,
    CredentialsExpiredError,
    ObjectChangedError,
    UnavailableError,
    UntrustedError,
)
from lazyfs.movers.pool import MoverFaultError, MoverLostError, Movers
from lazyfs.store import moved, ranges
from lazyfs.store.addresses import (
    BadAddressError,
    BadRedirectError,
    anywhere,
    is_same_service,
    may_be_redirected_to,
    must_be_elsewhere,
)
from lazyfs.store.cancel import Cancel
from lazyfs.store.fleet_cache import FleetCache
from lazyfs.store.http import (
    SILENCE_TIMEOUT_S,
    Answer,
    Transport,
    tls_context,
)
from lazyfs.store.live_credentials import LiveCredentials
from lazyfs.store.moved import NotMovedError
from lazyfs.store.refusals import MOST_TEXT, Refusal, printable
from lazyfs.store.resolved_source import Place
from lazyfs.store.signing import Signer, SigningCredentials, canonical_query

T = TypeVar("T")
log = logging.getLogger(__name__)

MOST_REDIRECTS = 5
# How many servers that redirects led to are kept with their connections.
MOST_SERVERS = 16
# How many peculiarities of a service are logged.
MOST_NOTED = 50
_AGENT = f"lazyfs/{__version__}"
# Characters that stay unchanged in a URL that is already escaped (RFC 3986, 2.2 and 2.3).
_OF_URLS = "%:/?#[]@!$&'()*+,;=-._~"
_SIGNED_URL = re.compile(r"[?&](X-Amz-Signature|X-Goog-Signature|Signature|sig)=", re.IGNORECASE)


class RefusedError(Exception):
    """An error answer."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.status)
        self.refusal = refusal


class _RedirectedError(Exception):
    """The answer is a redirect."""

    def __init__(self, location: str, refusal: Refusal) -> None:
        super().__init__(location)
        self.location = location
        self.refusal = refusal


@dataclass(frozen=True, slots=True)
class Asked:
    """What a mover told of a request that was made already.

    Attributes:
        credentials: with which it was signed.
    """

    told: moved.Told
    credentials: SigningCredentials | None


@dataclass(frozen=True, slots=True)
class Request:
    """A request before it is signed.

    Attributes:
        path: the encoded path.
        headers: headers that are not signed.
        into: for the body, if it has exactly this length: then a mover may receive it.
        asked: it was made already.
    """

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    into: memoryview | None = None
    asked: Asked | None = None

    @property
    def target(self) -> str:
        return f"{self.path}?{self.query}" if self.query else self.path


class Client:
    """Sends requests to one service.

    Args:
        what: the source, for the log.
        place: where the bucket is.
        credentials: None: requests are not signed.
        requester_pays: requests accept that the requester pays.
        refuse_local: the administrator did not choose the server: addresses of this machine are
            not contacted, and errors do not say what is there.

    Attributes:
        movers: the processes that receive bodies, if there are any.
    """

    def __init__(
        self,
        what: str,
        place: Place,
        credentials: LiveCredentials | None,
        *,
        requester_pays: bool = False,
        refuse_local: bool = False,
        movers: Movers | None = None,
    ) -> None:
        self.movers = movers
        self._what = what
        self.place = place
        self._credentials = credentials
        self._requester_pays = requester_pays
        self._refuse_local = refuse_local
        self._servers: dict[str, tuple[Transport, Signer]] = {}
        self._tls: ssl.SSLContext | None = None
        self._noted: set[str] = set()
        # How far the clock of the service is ahead of ours, if the service has refused our time.
        self._ahead_s = 0.0
        self._server(place.server)

    @property
    def bucket_path(self) -> str:
        """The path of the bucket itself."""
        return self.place.path.removesuffix("/") or "/"

    def close_idle(self) -> None:
        """Close connections that have been idle for a while."""
        for transport, _ in list(self._servers.values()):
            transport.close_idle()

    def note(self, words: str) -> None:
        """Log once what the service does differently."""
        if words not in self._noted and len(self._noted) < MOST_NOTED:
            self._noted.add(words)
            log.info("%s: the service %s", self._what, words)

    def ask(
        self,
        request: Request,
        handle: Callable[[Answer, bool], T],
        what: str,
        cancel: Cancel,
        signed: Mapping[str, str] | None = None,
        *,
        trusts_clock: bool = True,
    ) -> T:
        """Make a request, and follow redirects.

        Args:
            handle: also gets whether another service than ours answers.
            signed: headers that are signed.
            trusts_clock: sign with the time of the service if it refuses ours.

        Raises:
            SourceError: the request was refused, or not answered.
        """
        credentials = None
        try:
            if request.asked is not None:
                credentials = request.asked.credentials
            elif self._credentials:
                credentials = self._credentials.current()
            answer = self._follow(request, handle, cancel, credentials, signed or {})
        except RefusedError as error:
            if not error.refusal.code:
                self.be_vague(what, error)
            if trusts_clock and self._takes_clock_of(error.refusal):
                again = replace(request, asked=None)
                return self.ask(again, handle, what, cancel, signed, trusts_clock=False)
            self._raise_refused(what, error, credentials)
        except ranges.ChangedError as error:
            raise ObjectChangedError(f"{what}: {error}") from error
        except ranges.OtherRangeError as error:
            self.be_vague(what, error)
            raise BadResponseError(f"{what}: {error}") from error
        except BadAddressError as error:
            raise BadRequestError(f"{what}: {error}") from error
        except ranges.IgnoresRangeError as error:
            self.be_vague(what, error)
            raise BadRequestError(f"{what}: {error}") from error
        except ssl.SSLCertVerificationError as error:
            self.be_vague(what, error)
            cause = f"certificate refused: {error.verify_message}; see --ca-bundle"
            raise UntrustedError(f"{what}: {cause}") from error
        except OSError as error:
            self.be_vague(what, error)
            raise UnavailableError(
                f"{what}: no usable answer from {self.place.server} ({_cause(error)})"
            ) from error
        if self._credentials and credentials:
            self._credentials.worked(credentials)
        return answer

    async def ask_mover(
        self,
        request: Request,
        handle: Callable[[Answer, bool], T],
        cancel: Cancel,
        ended: Callable[[], None],
    ) -> T | Asked | None:
        """Make a request without a thread of this process, if a mover can make it.

        Args:
            ended: called when the mover is done, see `Movers.run`.

        Returns:
            What `handle` returns for an ordinary answer. Any other answer is for `ask`, which may
            have to wait. None: the request was not made.
        """
        credentials = self._credentials.present() if self._credentials else None
        server = self.place.server
        if (
            self.movers is None
            or request.into is None
            or not self._is_moved(server)
            or (self._credentials and credentials is None)
        ):
            ended()
            return None
        transport, signer = self._server(server)
        headers = self._headers(request, signer, credentials, {})
        told: moved.Told
        try:
            told = await self.movers.run(
                moved.receive, server, self.place.authorities, self._refuse_local,
                request.method, request.target, headers,
                buffer=request.into, wire=cancel, ended=ended,
            )  # fmt: skip
        except OSError as error:
            return Asked(error, credentials)
        except (MoverLostError, MoverFaultError):
            return None
        if isinstance(told, dict) and told["filled"]:
            with contextlib.suppress(
                NotMovedError, _RedirectedError, ranges.ChangedError, ranges.OtherRangeError,
                ranges.IgnoresRangeError, OSError,
            ):  # fmt: skip
                answer = moved.understand(
                    told, transport, lambda answer: handle(answer, False), cancel, request.into
                )
                if self._credentials and credentials:
                    self._credentials.worked(credentials)
                return answer
        return Asked(told, credentials)

    def _headers(
        self,
        request: Request,
        signer: Signer,
        credentials: SigningCredentials | None,
        signed: Mapping[str, str],
    ) -> dict[str, str]:
        """The headers of a request to our own service."""
        if self._requester_pays:
            signed = {**signed, "x-amz-request-payer": "requester"}
        headers = {**request.headers, "User-Agent": _AGENT, **signed}
        if credentials is not None:
            headers |= signer.headers(
                request.method, request.path, request.query, signed, credentials
            )
        return headers

    def ask_cache(
        self,
        cache: FleetCache,
        request: Request,
        handle: Callable[[Answer, bool], T],
        cancel: Cancel,
    ) -> T:
        """Send a request for S3 to a cache in front of it.

        Raises:
            FleetCacheError: the cache did not deliver what was requested.
            SourceError: there are no credentials.
        """
        credentials = self._credentials.current() if self._credentials else None
        _, signer = self._server(self.place.server)
        headers = {**request.headers, "User-Agent": _AGENT, "Host": signer.host}
        signed = {"x-amz-request-payer": "requester"} if self._requester_pays else {}
        headers |= signed
        if credentials is not None:
            headers |= signer.headers(
                request.method, request.path, request.query, signed, credentials
            )
        return cache.ask(request.target, headers, lambda answer: handle(answer, False), cancel)

    def _takes_clock_of(self, refusal: Refusal) -> bool:
        """Whether a request failed only because two clocks differ; the difference is then known.

        Signatures hold for 15 minutes. The SDKs of AWS correct the difference in the same way.
        """
        if refusal.code != "RequestTimeTooSkewed" or not refusal.date_s:
            return False
        ahead_s = refusal.date_s - time.time()
        log.warning(
            "%s: the clock of this machine differs by %.0f s from that of the service, whose time "
            "is used to sign requests: set the clock", self._what, ahead_s,
        )  # fmt: skip
        self._ahead_s = ahead_s
        for _, signer in list(self._servers.values()):
            signer.ahead_s = ahead_s
        return True

    def be_vague(self, what: str, error: Exception) -> None:
        """Hide what is on the server if the administrator did not choose it.

        Raises:
            UnavailableError: the same error for a closed port, for silence and for other servers.
        """
        if self._refuse_local:
            log.info("%s: %s: %s", what, type(error).__name__, printable(str(error)))
            raise UnavailableError(f"{what}: no usable answer of S3") from error

    def _follow(
        self,
        request: Request,
        handle: Callable[[Answer, bool], T],
        cancel: Cancel,
        credentials: SigningCredentials | None,
        signed: Mapping[str, str],
    ) -> T:
        server, elsewhere = self.place.server, False
        refusal: Refusal | None = None
        for _ in range(MOST_REDIRECTS + 1):
            transport, signer = self._server(server)
            if elsewhere:
                headers = {**request.headers, "User-Agent": _AGENT}
            else:
                headers = self._headers(request, signer, credentials, signed)
            handle_here = lambda answer, elsewhere=elsewhere: _unless_redirected(  # noqa: E731
                answer, lambda answer: handle(answer, elsewhere)
            )
            try:
                if self.movers and request.into is not None and self._is_moved(server):
                    with contextlib.suppress(NotMovedError, MoverLostError, MoverFaultError):
                        if request.asked is not None:
                            return moved.understand(
                                request.asked.told, transport, handle_here, cancel, request.into
                            )
                        return moved.exchange(
                            self.movers, transport, server, self.place.authorities,
                            self._refuse_local, request.method, request.target, headers,
                            handle_here, cancel, request.into,
                        )  # fmt: skip
                return transport.exchange(
                    request.method, request.target, headers, handle_here, cancel
                )
            except _RedirectedError as error:
                refusal = error.refusal
                server, request, elsewhere = self._redirected(
                    server, request, error.location, elsewhere
                )
        assert refusal is not None
        raise BadRedirectError(f"redirected more than {MOST_REDIRECTS} times")

    def _is_moved(self, server: str) -> bool:
        """Whether a mover may contact that server: only the endpoint, and only without a proxy."""
        return server == self.place.server and not self.place.proxy

    def _redirected(
        self, server: str, request: Request, location: str, elsewhere: bool
    ) -> tuple[str, Request, bool]:
        """Where a redirect leads, the request to make there, and whether it is another service."""
        # Headers are decoded as Latin-1; characters beyond ASCII must be escaped.
        location = quote(location.encode("latin-1"), safe=_OF_URLS)
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
        ours = is_same_service(self.place.server, to) and not _SIGNED_URL.search(f"?{url.query}")
        elsewhere = elsewhere or not ours
        path, query = url.path or "/", url.query
        if not elsewhere:  # it is signed, so it is sent as S3 escapes it
            path = quote(unquote_to_bytes(path), safe="/~")
            query = canonical_query(dict(parse_qsl(query, keep_blank_values=True)))
        headers = request.headers
        if elsewhere:  # another service has its own entity tags
            headers = {name: value for name, value in headers.items() if name != "If-Match"}
        self.note(f"redirects to {printable(to)}")
        request = replace(request, path=path, query=query, headers=headers, asked=None)
        return to, request, elsewhere

    def _server(self, server: str) -> tuple[Transport, Signer]:
        """Connections to a server, and the signer of requests for it."""
        found = self._servers.get(server)
        if found is None:
            if server.startswith("https:") and self._tls is None:
                self._tls = tls_context(self.place.authorities)
            may_connect = must_be_elsewhere if self._refuse_local else anywhere
            if self._servers:
                first = next(iter(self._servers.values()))[0]
                if not self._refuse_local:
                    may_connect = lambda address: may_be_redirected_to(address, first.address)  # noqa: E731
                self._forget_servers()
            transport = Transport(server, self._tls, self.place.proxy, may_connect)
            found = transport, Signer(server, self.place.region, self.place.service)
            found[1].ahead_s = self._ahead_s
            self._servers[server] = found
        return found

    def _forget_servers(self) -> None:
        """Drop a server if there are too many. The first one is the endpoint, which stays."""
        for server in list(self._servers)[1:]:
            if len(self._servers) < MOST_SERVERS:
                return
            if dropped := self._servers.pop(server, None):
                dropped[0].close_idle(0.0)

    def _raise_refused(
        self, what: str, error: RefusedError, credentials: SigningCredentials | None
    ) -> NoReturn:
        refused = error.refusal.error(what)
        if isinstance(refused, CredentialsExpiredError) and self._credentials and credentials:
            self._credentials.refused(credentials)
            if error.refusal.code == "SignatureDoesNotMatch":
                self._credentials.current()  # this fetches new credentials
                if not self._credentials.may_be_replaced(credentials):
                    raise AccessDeniedError(str(refused)) from error
        raise refused from error


def _unless_redirected(answer: Answer, handle: Callable[[Answer], T]) -> T:
    """Handle an answer, or raise _RedirectedError."""
    location = answer.headers.get("location")
    if location and answer.status in (301, 302, 303, 307, 308):
        refusal = Refusal.of(answer.status, answer.headers, answer.body.read_all(MOST_TEXT))
        # A 301 of S3 itself reports the region of the bucket.
        if answer.status != 301 or not (refusal.code or refusal.region):
            raise _RedirectedError(location, refusal)
        raise RefusedError(refusal)
    return handle(answer)


def refuse(answer: Answer) -> NoReturn:
    raise RefusedError(Refusal.of(answer.status, answer.headers, answer.body.read_all(MOST_TEXT)))


def _cause(error: OSError) -> str:
    """Why a connection failed, in a few words."""
    if isinstance(error, TimeoutError):
        return f"no answer for {SILENCE_TIMEOUT_S:g} s"
    if isinstance(error, ssl.SSLError) and error.reason == "WRONG_VERSION_NUMBER":
        return "it does not answer in TLS; is it http://?"
    return error.strerror or str(error) or type(error).__name__
