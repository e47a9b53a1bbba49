"""Signatures of requests to S3, version 4. Pure.

As in https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html, for requests
without a body and without a query. botocore signs as well, but takes ten times as long for it, in a
load hundreds of times a second, and a tenth of a second to load.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

_ALGORITHM = "AWS4-HMAC-SHA256"
_NO_BODY = hashlib.sha256(b"").hexdigest()
# Proxies and clients may change it on the way.
_UNSIGNED = {"user-agent"}


class Signer:
    """Signs requests to one server.

    Args:
        server: `https://HOST[:PORT]`, or of http.
        region: that it belongs to.
    """

    def __init__(self, server: str, region: str) -> None:
        url = urlsplit(server)
        usual = {"http": 80, "https": 443}.get(url.scheme)
        # As clients send it: without a port that goes without saying.
        host = url.hostname or ""
        host = f"[{host}]" if ":" in host else host
        self._host = host if url.port in (None, usual) else f"{host}:{url.port}"
        self._region = region
        self._derived: tuple[tuple[str, str], bytes] | None = None

    def sign(
        self,
        path: str,
        headers: Mapping[str, str],
        access_key_id: str,
        secret_access_key: str,
        session_token: str | None,
        now_s: float | None = None,
    ) -> dict[str, str]:
        """The headers that a GET needs beside those it has.

        Args:
            path: encoded, as it goes over the wire.
            headers: `Host` is not among them.
            now_s: since the epoch; None: now.
        """
        time_stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now_s))
        added = {"X-Amz-Date": time_stamp, "X-Amz-Content-SHA256": _NO_BODY}
        if session_token:
            added["X-Amz-Security-Token"] = session_token
        signed = {"host": self._host} | {
            name.lower(): " ".join(value.split())
            for name, value in (*headers.items(), *added.items())
            if name.lower() not in _UNSIGNED
        }
        names = ";".join(sorted(signed))
        lines = "".join(f"{name}:{signed[name]}\n" for name in sorted(signed))
        request = f"GET\n{path}\n\n{lines}\n{names}\n{_NO_BODY}"

        date = time_stamp[:8]
        scope = f"{date}/{self._region}/s3/aws4_request"
        digest = hashlib.sha256(request.encode()).hexdigest()
        text = f"{_ALGORITHM}\n{time_stamp}\n{scope}\n{digest}"
        signature = hmac.digest(self._key(secret_access_key, date), text.encode(), "sha256").hex()
        added["Authorization"] = (
            f"{_ALGORITHM} Credential={access_key_id}/{scope}, "
            f"SignedHeaders={names}, Signature={signature}"
        )
        return added

    def _key(self, secret: str, date: str) -> bytes:
        """What is derived of a secret for a day; kept, because it is the same every time."""
        derived = self._derived  # of this moment: other threads may replace it
        if derived is None or derived[0] != (secret, date):
            key = f"AWS4{secret}".encode()
            for part in (date, self._region, "s3", "aws4_request"):
                key = hmac.digest(key, part.encode(), "sha256")
            self._derived = derived = ((secret, date), key)
        return derived[1]
