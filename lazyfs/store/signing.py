"""Signatures of requests to S3, version 4. Pure.

Implements https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html for
requests without a body. botocore can sign too, but takes ten times as long, for hundreds of
requests a second during a load, and its import takes a tenth of a second.

Signatures cover only what they must: the host and the `x-amz-*` headers. They do not cover `Range`
and `If-Match`, so that a caching proxy may request other ranges, and one signature serves all
ranges of an object for `LASTS_S`.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import quote, urlsplit

_ALGORITHM = "AWS4-HMAC-SHA256"
_NO_BODY = hashlib.sha256(b"").hexdigest()
_SENDABLE = re.compile(r"[!-~]+")
# S3 accepts a signature for 15 minutes; most of that is left for clocks that differ.
LASTS_S = 60.0
# How many signatures are kept, one for each object.
MOST_KEPT = 512


class SigningCredentials(NamedTuple):
    """The keys that sign requests; secret."""

    access_key_id: str
    secret_access_key: str
    session_token: str | None = None

    def __repr__(self) -> str:
        return "SigningCredentials(...)"

    @classmethod
    def of(cls, access_key_id: str, secret: str, session_token: str | None) -> SigningCredentials:
        """Credentials as the user wrote them, without the line break that ends many files.

        Raises:
            ValueError: they cannot be sent; the message contains no part of them.
        """
        made = cls(access_key_id.strip(), secret.strip(), (session_token or "").strip() or None)
        for name, text in (("access key id", made[0]), ("session token", made[2] or "-")):
            if not _SENDABLE.fullmatch(text):
                raise ValueError(f"the {name} is empty or has blanks or control characters in it")
        return made


class Signer:
    """Signs requests to one server.

    Args:
        server: `https://HOST[:PORT]`, or the same with http.
        region: the region of the server.
        service: the service's name in signatures, such as `s3`.

    Attributes:
        host: the signed `Host` header.
    """

    def __init__(self, server: str, region: str, service: str = "s3") -> None:
        url = urlsplit(server)
        usual = {"http": 80, "https": 443}.get(url.scheme)
        # As clients send it: without the default port.
        host = url.hostname or ""
        host = f"[{host}]" if ":" in host else host
        self.host = host if url.port in (None, usual) else f"{host}:{url.port}"
        self._scope = (region, service, "aws4_request")
        self._derived: tuple[tuple[str, str], bytes] | None = None
        self._kept: OrderedDict[tuple[object, ...], tuple[float, dict[str, str]]] = OrderedDict()
        # How far the clock of the server is ahead of ours.
        self.ahead_s = 0.0

    def headers(
        self,
        method: str,
        path: str,
        query: str,
        headers: Mapping[str, str],
        credentials: SigningCredentials,
    ) -> dict[str, str]:
        """Like `sign`, with the present time; reuses a recent signature of the same request."""
        now_s = time.time() + self.ahead_s
        about = (method, path, query, tuple(headers.items()), credentials)
        kept = self._kept.get(about)
        if kept is None or not 0 <= now_s - kept[0] < LASTS_S:
            kept = now_s, self.sign(method, path, query, headers, credentials, now_s)
            self._kept[about] = kept
            while len(self._kept) > MOST_KEPT:
                try:
                    self._kept.popitem(last=False)
                except KeyError:  # another thread has signed it meanwhile
                    break
        return kept[1]

    def sign(
        self,
        method: str,
        path: str,
        query: str,
        headers: Mapping[str, str],
        credentials: SigningCredentials,
        now_s: float,
    ) -> dict[str, str]:
        """The headers to add to a request.

        Args:
            path: the path, encoded for the wire.
            query: the output of `canonical_query`.
            headers: the headers to sign besides `Host`; they do not include it.
            now_s: seconds since the epoch.
        """
        time_stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now_s))
        added = {"X-Amz-Date": time_stamp, "X-Amz-Content-SHA256": _NO_BODY}
        if credentials.session_token:
            added["X-Amz-Security-Token"] = credentials.session_token
        signed = {"host": self.host} | {
            name.lower(): " ".join(value.split())
            for name, value in (*headers.items(), *added.items())
        }
        names = ";".join(sorted(signed))
        lines = "".join(f"{name}:{signed[name]}\n" for name in sorted(signed))
        request = f"{method}\n{path}\n{query}\n{lines}\n{names}\n{_NO_BODY}"

        date = time_stamp[:8]
        scope = "/".join((date, *self._scope))
        digest = hashlib.sha256(request.encode()).hexdigest()
        text = f"{_ALGORITHM}\n{time_stamp}\n{scope}\n{digest}"
        key = self._key(credentials.secret_access_key, date)
        signature = hmac.digest(key, text.encode(), "sha256").hex()
        added["Authorization"] = (
            f"{_ALGORITHM} Credential={credentials.access_key_id}/{scope}, "
            f"SignedHeaders={names}, Signature={signature}"
        )
        return added

    def _key(self, secret: str, date: str) -> bytes:
        """The signing key, derived from the secret for a day; cached, because it stays the same."""
        derived = self._derived  # one read: other threads may replace it
        if derived is None or derived[0] != (secret, date):
            key = f"AWS4{secret}".encode()
            for part in (date, *self._scope):
                key = hmac.digest(key, part.encode(), "sha256")
            self._derived = derived = ((secret, date), key)
        return derived[1]


def canonical_query(parameters: Mapping[str, str]) -> str:
    """A query as it is sent and signed: sorted, with everything escaped that may be."""
    escaped = (
        (quote(name, safe="~"), quote(value, safe="~")) for name, value in parameters.items()
    )
    return "&".join(f"{name}={value}" for name, value in sorted(escaped))
