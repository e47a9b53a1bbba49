"""One request to a service: how it is described, redirected and refused. No I/O of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn, TypeVar
from urllib.parse import parse_qsl, quote, unquote_to_bytes, urljoin, urlsplit

from lazyfs.store import mover_requests
from lazyfs.store.addresses import BadRedirectError, is_same_service
from lazyfs.store.http_answer import Answer
from lazyfs.store.refusals import MOST_TEXT, Refusal
from lazyfs.store.signing import SigningCredentials, canonical_query

T = TypeVar("T")

# Characters that stay unchanged in a URL that is already escaped (RFC 3986, 2.2 and 2.3).
_OF_URLS = "%:/?#[]@!$&'()*+,;=-._~"
_SIGNED_URL = re.compile(r"[?&](X-Amz-Signature|X-Goog-Signature|Signature|sig)=", re.IGNORECASE)


class RefusedError(Exception):
    """An error answer."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.status)
        self.refusal = refusal


class RedirectedError(Exception):
    """The answer is a redirect."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.location = location


@dataclass(frozen=True, slots=True)
class Asked:
    """What a mover told of a request that was made already.

    Attributes:
        credentials: with which it was signed.
    """

    told: mover_requests.Told
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


def redirected(
    service: str, server: str, request: Request, location: str, elsewhere: bool
) -> tuple[str, Request, bool]:
    """Where a redirect leads, the request to make there, and whether it is another service.

    Args:
        service: the endpoint.
        server: the server that redirects.
        elsewhere: whether that is another service already.

    Raises:
        BadRedirectError: it is not followed.
    """
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
    ours = is_same_service(service, to) and not _SIGNED_URL.search(f"?{url.query}")
    elsewhere = elsewhere or not ours
    path, query = url.path or "/", url.query
    if not elsewhere:  # it is signed, so it is sent as S3 escapes it
        path = quote(unquote_to_bytes(path))
        query = canonical_query(dict(parse_qsl(query, keep_blank_values=True)))
    headers = request.headers
    if elsewhere:  # another service has its own entity tags
        headers = {name: value for name, value in headers.items() if name != "If-Match"}
    request = replace(request, path=path, query=query, headers=headers, asked=None)
    return to, request, elsewhere


def unless_redirected(answer: Answer, handle: Callable[[Answer], T]) -> T:
    """Handle an answer, or raise RedirectedError."""
    location = answer.headers.get("location")
    if location and answer.status in (301, 302, 303, 307, 308):
        refusal = Refusal.of(answer.status, answer.headers, answer.body.read_all(MOST_TEXT))
        # A 301 of S3 itself reports the region of the bucket.
        if answer.status != 301 or not (refusal.code or refusal.region):
            raise RedirectedError(location)
        raise RefusedError(refusal)
    return handle(answer)


def refuse(answer: Answer) -> NoReturn:
    """Raise RefusedError."""
    raise RefusedError(Refusal.of(answer.status, answer.headers, answer.body.read_all(MOST_TEXT)))
