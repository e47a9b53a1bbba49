"""Entity tags: how S3 names one version of an object. Pure.

Services write them differently: with quotes or without (NetApp and Ceph), as weak tags (a proxy
that compresses), escaped twice, or not at all. `canonical` converts all of them to one form.
"""

from __future__ import annotations

import re

# RFC 9110, 8.8.3, without the bytes above 127: a header cannot carry those safely.
_OPAQUE = re.compile(r"[\x21\x23-\x7e]{1,256}")


def canonical(text: str | None) -> str | None:
    """The tag as `"abc"` or `W/"abc"`; empty if there is none; None if it is not a tag.

    `*` is not a tag: in `If-Match` it stands for any version of any object.
    """
    tag = (text or "").strip().replace("&quot;", '"')
    weak = tag[:2] in ("W/", "w/")
    if weak:
        tag = tag[2:]
    if len(tag) >= 2 and tag[0] == tag[-1] == '"':
        tag = tag[1:-1]
    if not tag:
        return ""
    if tag == "*" or not _OPAQUE.fullmatch(tag):
        return None
    return f'W/"{tag}"' if weak else f'"{tag}"'


def is_strong(tag: str) -> bool:
    """Whether `If-Match` can match the tag: a weak tag never matches there (RFC 9110, 13.1.1)."""
    return tag.startswith('"')


def same(one: str, other: str) -> bool:
    """Whether two canonical tags name the same version; a proxy may have made one of them weak."""
    return one.removeprefix("W/") == other.removeprefix("W/")
