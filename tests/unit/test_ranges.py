"""Answers to a range, and which of them may be taken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.listed_object import ListedObject
from lazyfs.store import ranges
from lazyfs.store.ranges import (
    ChangedError,
    IgnoresRangeError,
    OtherRangeError,
    PackedError,
)

SIZE = 1000
TAGGED = ListedObject("k", SIZE, '"v1"', 1_700_000_000 * 10**9, "k")
BARE = ListedObject("k", SIZE, "", 1_700_000_000 * 10**9, "k")  # Tue, 14 Nov 2023 22:13:20 GMT
SAME, OTHER = {"etag": '"v1"'}, {"etag": '"v2"'}


def part(start: int, end: int, total: object = SIZE, **more: str) -> dict[str, str]:
    return {"content-range": f"bytes {start}-{end}/{total}", **more}


def check(status=206, headers=None, length=100, pin=TAGGED, start=100, wanted=100, **more):
    return ranges.check(status, headers or {}, length, pin, start, wanted, **more)


@pytest.mark.parametrize(
    ("status", "headers", "length", "start", "wanted", "before"),
    [
        (206, part(100, 199) | SAME, 100, 100, 100, 0),
        (206, part(100, 199) | {"etag": "v1"}, 100, 100, 100, 0),
        (206, part(100, 199) | {"etag": 'W/"v1"'}, 100, 100, 100, 0),
        (206, part(100, 199), 100, 100, 100, 0),
        (206, part(100, 199, "*") | SAME, None, 100, 100, 0),
        (206, {"content-range": "Bytes=100-199/1000"}, 100, 100, 100, 0),
        # 200: the whole object, a range that says what it is, one that proves its version.
        (200, SAME, SIZE, 0, SIZE, 0),
        (200, {}, SIZE, 0, SIZE, 0),
        (200, {}, None, 0, SIZE, 0),
        (200, part(100, 199) | SAME, 100, 100, 100, 0),
        (200, SAME, 100, 100, 100, 0),
        (200, SAME, SIZE, 100, 100, 100),
        (200, SAME, None, 100, 100, 100),
    ],
)
def test_taken(status, headers, length, start, wanted, before):
    assert check(status, headers, length, start=start, wanted=wanted) == (before, wanted)


@pytest.mark.parametrize(("last", "length"), [(100, 1), (198, 99), (150, None)])
def test_a_part_of_the_range_is_accepted(last, length):
    assert check(206, part(100, last) | SAME, length) == (0, last - 99)


@pytest.mark.parametrize(
    ("headers", "length", "taken"),
    [
        # Stored so: it has a length.
        (part(100, 199) | SAME, 100, True),
        (part(100, 199) | SAME, None, False),
        (part(100, 199) | SAME, 60, False),
        (part(100, 199) | SAME, 130, False),
        (SAME, None, False),
    ],
)
@pytest.mark.parametrize("coding", ["gzip", "BR", " zstd"])
def test_compression_by_proxies_is_told_from_stored_compression(headers, length, taken, coding):
    status = 206 if "content-range" in headers else 200
    answer = status, headers | {"content-encoding": coding}, length
    if taken:
        assert check(*answer, may_be_packed=True) == (0, 100)
    else:
        with pytest.raises(PackedError):
            check(*answer, may_be_packed=True)


def test_compressed_answers_count_as_stored_if_compression_was_not_allowed():
    answer = part(100, 199) | SAME | {"content-encoding": "gzip"}
    assert check(206, answer, None) == (0, 100)
    with pytest.raises(PackedError):
        check(206, answer, 60)
    # Nobody compresses so: it is how it was uploaded.
    answer["content-encoding"] = "aws-chunked"
    assert check(206, answer, None, may_be_packed=True) == (0, 100)


@pytest.mark.parametrize(
    ("status", "headers", "length"),
    [
        (206, part(100, 199) | OTHER, 100),
        (206, part(100, 199) | {"etag": 'W/"v2"'}, 100),
        (206, part(100, 199, SIZE + 1) | SAME, 100),
        (206, part(100, 199, SIZE - 1), 100),
        (200, OTHER, SIZE),
        (200, OTHER, 100),
        (200, SAME, SIZE + 1),
    ],
)
def test_another_version(status, headers, length):
    with pytest.raises(ChangedError, match=r"^listed with .* has "):
        check(status, headers, length)


@pytest.mark.parametrize(
    ("headers", "length"),
    [
        (part(101, 200) | SAME, 100),
        (part(100, 200) | SAME, 101),
        (part(100, 99) | SAME, 0),
        (part(0, 99) | SAME, 100),
        (part(100, 199) | SAME, 99),
        (SAME, 100),
        (part(1, 2, 3) | SAME, 100),
        ({"content-range": "items 1-2/3"}, 100),
        ({"content-range": "bytes */1000"}, 100),
        ({"content-type": "multipart/byteranges; boundary=x"}, 150),
    ],
)
def test_another_range(headers, length):
    with pytest.raises(OtherRangeError):
        check(206, headers, length)


@pytest.mark.parametrize("length", [0, 18, 100, SIZE + 1, None])
def test_the_page_of_a_proxy_is_not_taken_for_another_version(length):
    with pytest.raises(OtherRangeError):
        check(200, {"content-type": "text/html"}, length)


def test_services_that_ignore_ranges_do_not_send_gigabytes():
    huge = ListedObject("k", 1 << 40, '"v1"', 0, "k")
    with pytest.raises(IgnoresRangeError):
        check(200, SAME, 1 << 40, pin=huge, start=1 << 30)


def test_a_little_before_the_range_is_skipped() -> None:
    least = ranges.MOST_SKIPPED
    huge = ListedObject("k", 1 << 40, '"v1"', 0, "k")
    assert check(200, SAME, 1 << 40, pin=huge, start=least) == (least, 100)
    with pytest.raises(IgnoresRangeError):
        check(200, SAME, 1 << 40, pin=huge, start=least + 1)


@pytest.mark.parametrize(
    ("text", "length"),
    [("bytes 100-199/1000", 100), ("bytes 5-5/*", 1), (" Bytes = 0-9/10 ", 10),
     ("bytes */1000", None), ("items 1-2/3", None), ("bytes 1-2", None), ("", None)],
)  # fmt: skip
def test_the_length_that_a_content_range_tells(text: str, length: int | None) -> None:
    assert ranges.told_length({"content-range": text}) == length
    assert ranges.told_length({}) is None


def test_errors_show_what_came_instead() -> None:
    for told in ("bytes 0-99/1000", "x" * 5000):
        with pytest.raises(OtherRangeError) as error:
            check(206, {"content-range": told} | SAME)
        assert str(error.value) == f"asked for 100 bytes at 100, got {told[:100]!r}"


@pytest.mark.parametrize(
    ("modified", "changed"),
    [
        ("Tue, 14 Nov 2023 22:13:20 GMT", False),
        ("Tue, 14 Nov 2023 22:13:21 GMT", False),
        ("Tue, 14 Nov 2023 22:13:19 GMT", False),
        ("Tue, 14 Nov 2023 22:13:22 GMT", True),
        ("Tue, 14 Nov 2023 22:13:18 GMT", True),
        ("Tue, 14 Nov 2023 22:14:20 GMT", True),
        ("nonsense", False),
        (None, False),
    ],
)
def test_without_an_etag_size_and_time_pin(modified, changed):
    headers = part(100, 199, etag='"whatever"')
    if modified:
        headers["last-modified"] = modified
    if changed:
        with pytest.raises(ChangedError):
            check(206, headers, pin=BARE)
    else:
        assert check(206, headers, pin=BARE) == (0, 100)
    with pytest.raises(ChangedError):
        check(206, part(100, 199, SIZE + 1), pin=BARE)


def test_behind_a_redirect_tags_may_differ_but_not_sizes():
    assert check(206, part(100, 199) | OTHER, elsewhere=True) == (0, 100)
    with pytest.raises(ChangedError):
        check(206, part(100, 199, 999) | OTHER, elsewhere=True)
    # What it sends without saying which bytes they are is not known to be of this version.
    with pytest.raises(OtherRangeError):
        check(200, SAME, 100, elsewhere=True)


@given(
    size=st.integers(1, 50),
    other_size=st.integers(1, 50),
    version=st.sampled_from(['"v1"', '"v2"', None]),
    status=st.sampled_from([200, 206]),
    knows_ranges=st.booleans(),
    tells_length=st.booleans(),
    data=st.data(),
)
def test_bytes_of_another_version_are_never_accepted(
    size, other_size, version, status, knows_ranges, tells_length, data
):
    """Of an honest server, whatever headers it leaves out, only right bytes are taken."""
    start = data.draw(st.integers(0, size - 1))
    wanted = data.draw(st.integers(1, size - start))
    # A tag names one version, which has one size.
    stored = size if version == '"v1"' else other_size
    is_same = version != '"v2"' and stored == size
    content = bytes(range(100, 100 + stored)) if is_same else bytes(range(stored))
    headers = {} if version is None else {"etag": version}
    body = content
    if knows_ranges and start < stored:
        body = content[start : start + wanted]
        headers["content-range"] = f"bytes {start}-{start + len(body) - 1}/{stored}"
    else:
        status = 200
    pin = ListedObject("k", size, '"v1"', 0, "k")
    length = len(body) if tells_length else None
    try:
        before, count = ranges.check(status, headers, length, pin, start, wanted)
    except (ChangedError, OtherRangeError):
        return
    taken = body[before : before + count]
    at_end = before + count == len(body)
    must_end = status == 206 or start + count == size
    if len(taken) == count == wanted and (at_end or not must_end):  # else the body tells
        assert is_same or (version is None and stored == size)
        if is_same:
            assert taken == content[start : start + wanted]


@pytest.mark.parametrize(
    ("headers", "changed"),
    [
        ({"etag": '"v1"', "content-length": "1000"}, False),
        ({}, False),
        ({"etag": '"v2"', "content-length": "1000"}, True),
        ({"content-length": "1001"}, True),
    ],
)
def test_the_head_of_a_whole_object(headers, changed):
    if changed:
        with pytest.raises(ChangedError):
            ranges.check_whole(headers, TAGGED)
    else:
        ranges.check_whole(headers, TAGGED)


def test_behind_a_redirect_a_whole_object_is_known_by_its_size() -> None:
    ranges.check_whole(OTHER | {"content-length": "1000"}, TAGGED, elsewhere=True)
    ranges.check_whole({"content-length": "many"}, TAGGED)
    with pytest.raises(ChangedError, match="listed with 1000 bytes, and now has 999"):
        ranges.check_whole({"content-length": "999"}, TAGGED, elsewhere=True)
