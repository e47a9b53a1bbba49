"""Requests to one service: signs and sends them, follows redirects, and turns refusals into errors.

The result is a value, or a `SourceError` whose message names what was requested.
"""

from __future__ import annotations

import contextlib
import logging
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, NoReturn, TypeVar

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
from lazyfs.movers.call import MoverFaultError, MoverLostError
from lazyfs.store import mover_requests, ranges
from lazyfs.store.addresses import (
    BadAddressError,
    BadRedirectError,
)
from lazyfs.store.cancel import Cancel
from lazyfs.store.fleet_cache import FleetCache
from lazyfs.store.http import SILENCE_TIMEOUT_S, Transport
from lazyfs.store.http_answer import Answer
from lazyfs.store.live_credentials import LiveCredentials
from lazyfs.store.mover_requests import NotMovedError
from lazyfs.store.refusals import Refusal, printable
from lazyfs.store.request import (
    RedirectedError,
    RefusedError,
    Request,
    redirected,
    unless_redirected,
)
from lazyfs.store.resolved_source import Endpoint
from lazyfs.store.servers import Servers
from lazyfs.store.signing import SigningCredentials

if TYPE_CHECKING:
    from lazyfs.movers.pool import Movers

T = TypeVar("T")
log = logging.getLogger(__name__)

MOST_REDIRECTS = 5
# How many peculiarities of a service are logged.
MOST_NOTED = 50
_AGENT = f"lazyfs/{__version__}"


class Client:
    """Sends requests to one service.

    Args:
        what: the source, for the log.
        endpoint: where the bucket is.
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
        endpoint: Endpoint,
        credentials: LiveCredentials | None,
        *,
        requester_pays: bool = False,
        refuse_local: bool = False,
        movers: Movers | None = None,
    ) -> None:
        self.movers = movers
        self._what = what
        self.endpoint = endpoint
        self._credentials = credentials
        self._requester_pays = requester_pays
        self.refuse_local = refuse_local
        self._servers = Servers(endpoint, refuse_local=refuse_local)
        self._noted: set[str] = set()

    @property
    def bucket_path(self) -> str:
        """The path of the bucket itself."""
        return self.endpoint.path.removesuffix("/") or "/"

    def close_idle(self, longer_than_s: float) -> None:
        """Close connections that have been idle for this long."""
        self._servers.close_idle(longer_than_s)

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
                f"{what}: no usable answer from {self.endpoint.server} ({_cause(error)})"
            ) from error
        self.worked(credentials)
        return answer

    @property
    def present_credentials(self) -> SigningCredentials | None:
        """The credentials that are here, without waiting for new ones."""
        return self._credentials.present() if self._credentials else None

    def can_sign_with(self, credentials: SigningCredentials | None) -> bool:
        """Whether requests can be made with these credentials, or without any."""
        return self._credentials is None or credentials is not None

    @property
    def transport(self) -> Transport:
        """The connections to our own service."""
        return self._servers.get(self.endpoint.server)[0]

    def worked(self, credentials: SigningCredentials | None) -> None:
        """The service accepted a request that was signed with these credentials."""
        if self._credentials and credentials:
            self._credentials.worked(credentials)

    def headers(
        self,
        request: Request,
        credentials: SigningCredentials | None,
        signed: Mapping[str, str] = MappingProxyType({}),
        server: str | None = None,
    ) -> dict[str, str]:
        """The headers of a request to our own service.

        Args:
            signed: further headers, which are signed.
            server: of the service; None: the endpoint.
        """
        if self._requester_pays:
            signed = {**signed, "x-amz-request-payer": "requester"}
        headers = {**request.headers, "User-Agent": _AGENT, **signed}
        if credentials is not None:
            _, signer = self._servers.get(server or self.endpoint.server)
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
        _, signer = self._servers.get(self.endpoint.server)
        headers = {"Host": signer.host, **self.headers(request, credentials)}
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
        self._servers.set_clock(ahead_s)
        return True

    def be_vague(self, what: str, error: Exception) -> None:
        """Hide what is on the server if the administrator did not choose it.

        Raises:
            UnavailableError: the same error for a closed port, for silence and for other servers.
        """
        if self.refuse_local:
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
        server, elsewhere = self.endpoint.server, False
        for _ in range(MOST_REDIRECTS + 1):
            transport, _ = self._servers.get(server)
            if elsewhere:
                headers = {**request.headers, "User-Agent": _AGENT}
            else:
                headers = self.headers(request, credentials, signed, server)
            handle_here = lambda answer, elsewhere=elsewhere: unless_redirected(  # noqa: E731
                answer, lambda answer: handle(answer, elsewhere)
            )
            try:
                if self.movers and request.into is not None and self.is_moved(server):
                    with contextlib.suppress(NotMovedError, MoverLostError, MoverFaultError):
                        if request.asked is not None:
                            return mover_requests.understand(
                                request.asked.told, transport, handle_here, cancel, request.into
                            )
                        return mover_requests.exchange(
                            self.movers, transport, server, self.endpoint.authorities,
                            self.refuse_local, request.method, request.target, headers,
                            handle_here, cancel, request.into,
                        )  # fmt: skip
                return transport.exchange(
                    request.method, request.target, headers, handle_here, cancel
                )
            except RedirectedError as error:
                server, request, elsewhere = redirected(
                    self.endpoint.server, server, request, error.location, elsewhere
                )
                self.note(f"redirects to {printable(server)}")
        raise BadRedirectError(f"redirected more than {MOST_REDIRECTS} times")

    def is_moved(self, server: str) -> bool:
        """Whether a mover may contact that server: only the endpoint, and only without a proxy."""
        return server == self.endpoint.server and not self.endpoint.proxy

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


def _cause(error: OSError) -> str:
    """Why a connection failed, in a few words."""
    if isinstance(error, TimeoutError):
        return f"no answer for {SILENCE_TIMEOUT_S:g} s"
    return error.strerror or str(error) or type(error).__name__
