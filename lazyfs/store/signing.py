"""Signatures of requests to S3, version 4. Pure.

As in https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html, for requests
without a body. botocore signs as well, but takes ten times as long for it, in a load hundreds of
times a second, and a tenth of a second to load.

What is signed is what has to be: the host and the `x-amz-*` headers. `Range` and `If-Match` are
not, so that a cache on the way can ask in pieces of its own, and one signature serves all ranges of
an object for `LASTS_S`.
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
# S3 takes a signature for 15 minutes, of which clocks that differ need most.
LASTS_S = 60.0
# Signatures that are kept, one an object.
MOST_KEPT = 512


class SigningCredentials(NamedTuple):
    """What requests are signed with; not to be shown."""

    access_key_id: str
    secret_access_key: str
    session_token: str | None = None

    def __repr__(self) -> str:
        return "SigningCredentials(...)"

    @classmethod
    def of(cls, access_key_id: str, secret: str, session_token: str | None) -> SigningCredentials:
        """As somebody wrote them: without the line break that files and Secrets often end in.

        Raises:
            ValueError: they cannot be sent; the message has no part of them.
        """
        made = cls(access_key_id.strip(), secret.strip(), (session_token or "").strip() or None)
        for name, text in (("access key id", made[0]), ("session token", made[2] or "-")):
            if not _SENDABLE.fullmatch(text):
                raise ValueError(f"the {name} is empty or has blanks or control characters in it")
        return made


class Signer:
    """Signs requests to one server.

    Args:
        server: `https://HOST[:PORT]`, or of http.
        region: that it belongs to.
        service: such as `s3`.

    Attributes:
        host: that is signed.
    """

    def __init__(self, server: str, region: str, service: str = "s3") -> None:
        url = urlsplit(server)
        usual = {"http": 80, "https": 443}.get(url.scheme)
        # As clients send it: without a port that goes without saying.
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
        """As `sign`, now; what was signed for the same a moment ago is used again."""
        now_s = time.time() + self.ahead_s
        about = (method, path, query, tuple(headers.items()), credentials)
        kept = self._kept.get(about)
        if kept is None or not 0 <= now_s - kept[0] < LASTS_S:
            kept = now_s, self.sign(method, path, query, headers, credentials, now_s)
            self._kept[about] = kept
            while len(self._kept) > MOST_KEPT:
                try:
                    self._kept.popitem(last=False)
                except KeyError:  # another thread was faster
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
        """The headers that a request needs beside those it has.

        Args:
            path: encoded, as it goes over the wire.
            query: as of `canonical_query`.
            headers: that are to be signed, beside `Host`, which is not among them.
            now_s: since the epoch.
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
        """What is derived of a secret for a day; kept, because it is the same every time."""
        derived = self._derived  # of this moment: other threads may replace it
        if derived is None or derived[0] != (secret, date):
            key = f"AWS4{secret}".encode()
            for part in (date, *self._scope):
                key = hmac.digest(key, part.encode(), "sha256")
            self._derived = derived = ((secret, date), key)
        return derived[1]


def canonical_query(parameters: Mapping[str, str]) -> str:
    """A query as it is sent and signed: sorted, and each byte escaped that may be."""
    escaped = (
        (quote(name, safe="~"), quote(value, safe="~")) for name, value in parameters.items()
    )
    return "&".join(f"{name}={value}" for name, value in sorted(escaped))
