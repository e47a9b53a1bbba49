"""Checks that an answer has the requested range of the object that was listed. Pure.

Requests have `If-Match`, but many services and caches ignore it. So entity tag and total size in
the head of *every* answer are compared with the listing before a byte of the body is used: bytes of
two versions are never mixed, in memory, in the page cache or on the disk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lazyfs.store import entity_tag
from lazyfs.store.listing import seconds_of
from lazyfs.store.listing_page import Pinned

# If a service answers with the whole object, at most this much before the range is skipped.
MOST_SKIPPED = 64 << 20
# Codings that proxies apply to answers. `aws-chunked`, which some services store, is not one.
_PACKINGS = ("gzip", "x-gzip", "br", "zstd", "deflate")
_CONTENT_RANGE = re.compile(
    r"\s*bytes\s*=?\s*(\d{1,20})-(\d{1,20})/(\d{1,20}|\*)\s*", re.IGNORECASE
)


class ChangedError(Exception):
    """The object is not the one that was listed; the message says how."""


class OtherRangeError(Exception):
    """The answer is not a usable range; the message says what it is."""


class PackedError(OtherRangeError):
    """A proxy compressed the answer: its bytes are not those that are stored."""


class IgnoresRangeError(Exception):
    """The service sends the whole object, whatever range is requested."""


def told_length(headers: Mapping[str, str]) -> int | None:
    """The number of bytes in an answer according to `Content-Range`; None if it does not say.

    Args:
        headers: names are in lower case.
    """
    found = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
    return int(found[2]) + 1 - int(found[1]) if found else None


def check(
    status: int,
    headers: Mapping[str, str],
    length: int | None,
    pin: Pinned,
    start: int,
    wanted: int,
    *,
    elsewhere: bool = False,
    may_be_packed: bool = False,
) -> tuple[int, int]:
    """How many bytes of the body precede the range, and how many bytes of the range follow them.

    The answer may have fewer bytes than requested: a cache may answer with the part that it has
    (RFC 9110, 15.3.7). The rest must be requested again.

    Args:
        status: 200 or 206.
        headers: names are in lower case.
        length: the length of the body in bytes; None if the answer does not say.
        start, wanted: the requested range.
        elsewhere: a redirect led to another service, which has entity tags of its own.
        may_be_packed: the request allowed compression.

    Raises:
        ChangedError, OtherRangeError, IgnoresRangeError: the body cannot be used.
    """
    known = False if elsewhere else _check_version(headers, pin)
    told = headers.get("content-range")
    is_packed = headers.get("content-encoding", "").strip().lower() in _PACKINGS
    if is_packed and may_be_packed and length is None:
        # Objects that are stored compressed have a length; what a proxy compresses has none.
        raise PackedError("the answer is compressed on the way")
    if told is not None:
        found = _CONTENT_RANGE.fullmatch(told)
        if found is None:
            raise OtherRangeError(f"asked for {wanted} bytes at {start}, got {told[:100]!r}")
        first, last = int(found[1]), int(found[2])
        if first == start and found[3] != "*" and int(found[3]) != pin.size_bytes:
            raise ChangedError(f"listed with {pin.size_bytes} bytes, and now has {found[3]}")
        if first != start or not start <= last < start + wanted:
            raise OtherRangeError(f"asked for {wanted} bytes at {start}, got {told[:100]!r}")
        count = last + 1 - start
        if length not in (None, count):
            kind = PackedError if is_packed else OtherRangeError
            raise kind(f"asked for {wanted} bytes at {start}, got {told[:100]!r} in {length}")
        return 0, count
    if status == 206:
        raise OtherRangeError(f"asked for {wanted} bytes at {start}, got 206 without Content-Range")
    if known and length == wanted:
        return 0, wanted
    if known and length not in (None, pin.size_bytes):
        raise ChangedError(f"listed with {pin.size_bytes} bytes, and the whole of it has {length}")
    # An answer without a version may be a page of a proxy, which its length shows.
    until_the_end = length is None and start + wanted == pin.size_bytes
    if not known and length != pin.size_bytes and not until_the_end:
        raise OtherRangeError(
            f"asked for {wanted} bytes at {start}, got status 200 without ETag and Content-Range"
        )
    if start > MOST_SKIPPED:
        raise IgnoresRangeError(
            f"asked for {wanted} bytes at {start}, got all of the object: the service, or a cache "
            "before it, ignores Range"
        )
    return start, wanted


def check_whole(headers: Mapping[str, str], pin: Pinned, *, elsewhere: bool = False) -> None:
    """Check that the head of a whole object belongs to the object that was listed.

    Raises:
        ChangedError: it does not.
    """
    if not elsewhere:
        _check_version(headers, pin)
    told = headers.get("content-length", "")
    if told.isdigit() and int(told) != pin.size_bytes:
        raise ChangedError(f"listed with {pin.size_bytes} bytes, and now has {told}")


def _check_version(headers: Mapping[str, str], pin: Pinned) -> bool:
    """Whether the answer proves to be of the pinned version. Raises ChangedError for another."""
    told = entity_tag.canonical(headers.get("etag"))
    if pin.etag:
        if not told:
            return False
        if not entity_tag.same(told, pin.etag):
            raise ChangedError(f"listed with the ETag {pin.etag}, and now has {told}")
        return True
    modified = seconds_of(headers.get("last-modified", ""))
    if not (modified and pin.modified_ns):
        return False
    # Listings may round a time that other answers truncate.
    if abs(modified - pin.modified_ns // 10**9) > 1:
        raise ChangedError("changed since it was listed (Last-Modified), and has no ETag")
    return True
