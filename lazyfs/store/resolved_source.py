"""What has to be known of a source before it can be read. Pure.

botocore finds it out (`boto/resolver.py`), in this process or in another one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lazyfs.objects import ListedObject
from lazyfs.store.http import Proxy
from lazyfs.store.objects import Hidden, Page
from lazyfs.store.signing import SigningCredentials

# Hosts of S3 itself, on which nobody else can answer: docs.aws.amazon.com/general/latest/gr/s3.html
_OF_AWS = re.compile(
    r"https://([^/]+\.)?s3(-[a-z0-9-]+)?(\.dualstack)?(\.[a-z]{2,3}(-[a-z]+)+-\d)?\.amazonaws\.com(\.cn)?"
)


def is_of_aws(server: str) -> bool:
    """Whether a `https://HOST` is S3's own."""
    return _OF_AWS.fullmatch(server) is not None


@dataclass(frozen=True, slots=True)
class Place:
    """Where the objects of a bucket are, how to get there, and what signatures are made for.

    Attributes:
        region, service: that signatures name.
        server: `https://HOST[:PORT]`, or of http.
        path: what stands before a key; begins and ends in `/`.
        authorities: a file of certificates that are trusted.
    """

    region: str
    service: str
    server: str
    path: str
    authorities: str
    proxy: Proxy | None

    @property
    def is_of_aws(self) -> bool:
        """Whether nobody but AWS can answer there."""
        return is_of_aws(self.server)

    @property
    def identity(self) -> str:
        """What makes cached content of equal buckets and keys distinct: who was asked for it.

        The same bucket of AWS has several hosts, none of which anybody else controls.
        """
        if self.is_of_aws:
            return f"aws:{self.region}"
        return f"{self.server}{self.path}"


@dataclass(frozen=True, slots=True)
class TimedCredentials:
    """Credentials, and when to ask for others (in seconds since the epoch; None: they stay)."""

    credentials: SigningCredentials
    until_s: float | None = None


@dataclass(frozen=True, slots=True)
class ResolvedSource:
    """What was found out of a source, for a process that does without botocore.

    Attributes:
        credentials: None: requests are not signed.
        page: the first one of all that lies below the prefix, if it was asked for.
    """

    place: Place
    credentials: TimedCredentials | None
    page: Page | None

    def as_json(self) -> dict[str, Any]:
        """For `of_json`. Secrets are in it."""
        return asdict(self)

    @classmethod
    def of_json(cls, fields: Mapping[str, Any]) -> ResolvedSource:
        """What `as_json` gave."""
        place, timed, page = (fields[name] for name in ("place", "credentials", "page"))
        proxy = place["proxy"] and Proxy(**place["proxy"])
        if timed:
            timed = TimedCredentials(SigningCredentials(*timed["credentials"]), timed["until_s"])
        if page:
            objects = [ListedObject(**each) for each in page["objects"]]
            hidden = [Hidden(**each) for each in page["hidden"]]
            page = Page(objects, page["prefixes"], page["next_token"], hidden)
        return cls(Place(**{**place, "proxy": proxy}), timed, page)
