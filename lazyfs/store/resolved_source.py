"""What must be known about a source before it can be read. Pure.

botocore finds it out (`boto/resolver.py`), in this process or in another one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lazyfs.listed_object import ListedObject
from lazyfs.store.http import Proxy
from lazyfs.store.listing_page import Hidden, Page
from lazyfs.store.signing import SigningCredentials

# Hosts of AWS itself: docs.aws.amazon.com/general/latest/gr/s3.html
_OF_AWS = re.compile(
    r"https://([^/]+\.)?s3(-[a-z0-9-]+)?(\.dualstack)?(\.[a-z]{2,3}(-[a-z]+)+-\d)?\.amazonaws\.com(\.cn)?"
)


def is_of_aws(server: str) -> bool:
    """Whether a `https://HOST` is S3's own."""
    return _OF_AWS.fullmatch(server) is not None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the objects of a bucket are, how to reach them, and what signatures must name.

    Attributes:
        region, service: the names in signatures.
        server: `https://HOST[:PORT]`, or the same with http.
        path: the path before a key; begins and ends in `/`.
        authorities: a file with trusted certificates.
    """

    region: str
    service: str
    server: str
    path: str
    authorities: str
    proxy: Proxy | None

    @property
    def is_of_aws(self) -> bool:
        """Whether the server belongs to AWS."""
        return is_of_aws(self.server)

    @property
    def identity(self) -> str:
        """The identity of the service, which keeps cached content of two services apart.

        A bucket of AWS has one identity, whichever of its AWS host names is used.
        """
        if self.is_of_aws:
            return f"aws:{self.region}"
        return f"{self.server}{self.path}"


@dataclass(frozen=True, slots=True)
class TimedCredentials:
    """Credentials, and when to renew them (in seconds since the epoch; None: never)."""

    credentials: SigningCredentials
    until_s: float | None = None


@dataclass(frozen=True, slots=True)
class ResolvedSource:
    """What was found out about a source, for a process that does not load botocore.

    Attributes:
        credentials: None: requests are not signed.
        page: the first page of a listing of the prefix, if it was requested.
    """

    endpoint: Endpoint
    credentials: TimedCredentials | None
    page: Page | None

    def as_json(self) -> dict[str, Any]:
        """JSON for `of_json`. It contains secrets."""
        return asdict(self)

    @classmethod
    def of_json(cls, fields: Mapping[str, Any]) -> ResolvedSource:
        """Parse the output of `as_json`."""
        endpoint, timed, page = (fields[name] for name in ("endpoint", "credentials", "page"))
        proxy = endpoint["proxy"] and Proxy(**endpoint["proxy"])
        if timed:
            timed = TimedCredentials(SigningCredentials(*timed["credentials"]), timed["until_s"])
        if page:
            objects = [ListedObject(**each) for each in page["objects"]]
            hidden = [Hidden(**each) for each in page["hidden"]]
            page = Page(objects, page["prefixes"], page["next_token"], hidden)
        return cls(Endpoint(**{**endpoint, "proxy": proxy}), timed, page)
