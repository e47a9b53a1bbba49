"""Whether an answer to a range is that range, of the object that was listed. Pure.

`If-Match` is sent, and many services and caches ignore it. So the head of *every* answer is held
against what was listed, entity tag and total size, before a byte of the body is taken: bytes of two
versions never meet, in memory, in the page cache or on the disk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lazyfs.store import entity_tag
from lazyfs.store.listing import seconds_of
from lazyfs.store.objects import Pinned

# Where a service answers with the whole object, how much before the range is thrown away.
MOST_SKIPPED = 64 << 20
_CONTENT_RANGE = re.compile(
    r"\s*bytes\s*=?\s*(\d{1,20})-(\d{1,20})/(\d{1,20}|\*)\s*", re.IGNORECASE
)


class ChangedError(Exception):
    """The object is not the one that was listed; the message says how."""


class OtherRangeError(Exception):
    """The answer is no usable range; the message says what it is."""


class IgnoresRangeError(Exception):
    """The service sends all of the object whatever range is asked for."""


def check(
    status: int,
    headers: Mapping[str, str],
    length: int | None,
    pin: Pinned,
    start: int,
    wanted: int,
    *,
    elsewhere: bool = False,
) -> int:
    """How many bytes of the body come before the range.

    Args:
        status: 200 or 206.
        headers: with names in lower case.
        length: of the body; None: the answer does not say.
        start, wanted: the range that was asked for.
        elsewhere: another service was redirected to. It has entity tags of its own.

    Raises:
        ChangedError, OtherRangeError, IgnoresRangeError: none can be taken.
    """
    known = False if elsewhere else _check_version(headers, pin)
    told = headers.get("content-range")
    if told is not None:
        found = _CONTENT_RANGE.fullmatch(told)
        if found is None:
            raise OtherRangeError(f"asked for {wanted} bytes at {start}, got {told[:100]!r}")
        if int(found[1]) == start and found[3] != "*" and int(found[3]) != pin.size_bytes:
            raise ChangedError(f"listed with {pin.size_bytes} bytes, and now has {found[3]}")
        if (int(found[1]), int(found[2])) != (start, start + wanted - 1):
            raise OtherRangeError(f"asked for {wanted} bytes at {start}, got {told[:100]!r}")
        if length not in (None, wanted):
            raise OtherRangeError(f"asked for {wanted} bytes at {start}, got {length}")
        return 0
    if status == 206:
        raise OtherRangeError(f"asked for {wanted} bytes at {start}, got 206 without Content-Range")
    if length == wanted and (known or wanted == pin.size_bytes):
        return 0
    if length not in (None, pin.size_bytes):
        raise ChangedError(f"listed with {pin.size_bytes} bytes, and the whole of it has {length}")
    if start > MOST_SKIPPED:
        raise IgnoresRangeError(
            f"asked for {wanted} bytes at {start}, got all of the object: the service, or a cache "
            "before it, ignores Range"
        )
    return start


def check_whole(headers: Mapping[str, str], pin: Pinned, *, elsewhere: bool = False) -> None:
    """Whether the head of a whole object is that of the one that was listed.

    Raises:
        ChangedError: it is not.
    """
    if not elsewhere:
        _check_version(headers, pin)
    told = headers.get("content-length", "")
    if told.isdigit() and int(told) != pin.size_bytes:
        raise ChangedError(f"listed with {pin.size_bytes} bytes, and now has {told}")


def _check_version(headers: Mapping[str, str], pin: Pinned) -> bool:
    """Whether the answer proves to be of the pinned version. Raises ChangedError if of another."""
    told = entity_tag.canonical(headers.get("etag"))
    if pin.etag:
        if not told:
            return False
        if not entity_tag.same(told, pin.etag):
            raise ChangedError(f"listed with the ETag {pin.etag}, and now has {told}")
        return True
    modified = seconds_of(headers.get("last-modified", ""))
    # Listings may round a time where answers cut it.
    if modified and pin.modified_ns and abs(modified - pin.modified_ns // 10**9) > 1:
        raise ChangedError("changed since it was listed (Last-Modified), and has no ETag")
    return False
