"""Answers to a listing: which are listings, and which entries make sense."""

from __future__ import annotations

import tracemalloc
from urllib.parse import quote, quote_plus
from xml.sax.saxutils import escape

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.errors import BadRequestError
from lazyfs.listed_object import ListedObject
from lazyfs.store import listing
from lazyfs.store.listing import NotAListingError
from lazyfs.store.listing_page import MOST_EMPTY, Page, Tokens

SPACE = "http://s3.amazonaws.com/doc/2006-03-01/"


def entry(key: str | None = "m/a", **fields: str | None) -> str:
    given = {"LastModified": "2026-01-02T03:04:05.000Z", "ETag": '"e"', "Size": "10"} | fields
    key_field = "" if key is None else f"<Key>{escape(key)}</Key>"
    rest = "".join(
        f"<{name}>{escape(text)}</{name}>" for name, text in given.items() if text is not None
    )
    return f"<Contents>{key_field}{rest}</Contents>"


def page(*items: str, **about: str) -> bytes:
    told = "".join(f"<{name}>{escape(text)}</{name}>" for name, text in about.items())
    text = f'<?xml version="1.0"?><ListBucketResult xmlns="{SPACE}">{told}{"".join(items)}'
    return f"{text}</ListBucketResult>".encode()


def prefix(text: str) -> str:
    return f"<CommonPrefixes><Prefix>{escape(text)}</Prefix></CommonPrefixes>"


def entries(*items: str, below: str = "m/", delimiter: str = "") -> listing.Entries:
    return listing.entries(listing.parse(page(*items)), below, delimiter, encoded=False, plus=False)


def test_a_page() -> None:
    parsed = listing.parse(
        page(entry("m/a"), entry("m/b"), prefix("m/c/"), IsTruncated="true",
             NextContinuationToken=" t/= ")
    )  # fmt: skip
    assert parsed.is_truncated
    assert parsed.token == "t/="
    found = listing.entries(parsed, "m/", "/", encoded=False, plus=False)
    assert [each.key for each in found.objects] == ["m/a", "m/b"]
    assert found.objects[0].size_bytes == 10
    assert found.objects[0].etag == '"e"'
    assert found.objects[0].modified_ns == 1767323045 * 10**9
    assert (found.prefixes, found.hidden, found.last) == (["m/c/"], [], "m/c/")


def test_blanks_before_a_page_make_no_difference() -> None:
    assert len(listing.parse(b" \r\n " + page(entry())).entries) == 1


def test_a_prefix_of_the_namespace_makes_no_difference() -> None:
    text = page(entry()).decode().replace("<", "<s3:").replace("<s3:/", "</s3:")
    text = text.replace("<s3:?", "<?").replace("xmlns=", "xmlns:s3=")
    assert len(listing.parse(text.encode()).entries) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"  \n",
        b"{}",
        b"default backend",
        b"\x1f\x8b\x08\xff",
        b"<!doctype html><html><body/></html>",
        b"<html><head><title>Sign in</title></head><body/></html>",
        b"<Error><Code>SlowDown</Code></Error>",
        b"<ListAllMyBucketsResult/>",
        page(entry())[:-20],
        page(entry())[:-1],
        page(entry()) + b"<html/>",
        page(*[entry()] * (listing.MOST_ENTRIES + 1)),
        b'<!DOCTYPE a [<!ENTITY b "c">]><ListBucketResult>&b;</ListBucketResult>',
    ],
)
def test_answers_that_are_not_listings_are_refused(body: bytes) -> None:
    with pytest.raises(NotAListingError):
        listing.parse(body)


@given(st.integers(1, len(page(entry(), entry(), prefix("x/"))) - 1))
def test_every_truncation_is_noticed(at: int) -> None:
    with pytest.raises(NotAListingError):
        listing.parse(page(entry(), entry(), prefix("x/"))[:at])


@pytest.mark.parametrize(
    ("about", "truncated"),
    [
        ({"IsTruncated": "true"}, True),
        ({"IsTruncated": " True "}, True),
        ({"IsTruncated": "1"}, True),
        ({"IsTruncated": "false", "NextContinuationToken": "t"}, False),
        ({}, False),
        ({"NextContinuationToken": "t"}, True),
        ({"IsTruncated": "", "NextContinuationToken": ""}, False),
    ],
)
def test_whether_more_follows(about: dict[str, str], truncated: bool) -> None:
    assert listing.parse(page(**about)).is_truncated is truncated


def test_a_page_must_say_whether_more_follows() -> None:
    with pytest.raises(NotAListingError):
        _ = listing.parse(page(IsTruncated="maybe")).is_truncated


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (entry(None), "no key"),
        (entry(""), "no key"),
        (entry("x/y"), "not below"),
        (entry("m/" + "k" * 1023), "over 1024 bytes"),
        (entry("m/" + "ä" * 512), "over 1024 bytes"),
        (entry("m/" + "k" * 5_000_000), "over 1024 bytes"),
        (entry(Size="-5"), "size"),
        (entry(Size="ten"), "size"),
        (entry(Size=""), "size"),
        (entry(Size=None), "size"),
        (entry(Size=str(1 << 58)), "no object over"),
        (entry(Size=str(1 << 64)), "size"),
        (entry(Size="1.5"), "size"),
        (entry(ETag='"x\r\nX-Evil: 1"'), "ETag"),
        (entry(ETag="*"), "ETag"),
        (prefix("y/z/"), "not below"),
    ],
)
def test_invalid_entries_are_hidden_and_the_others_are_shown(item: str, reason: str) -> None:
    found = entries(entry("m/before"), item, entry("m/later"))
    assert [each.key for each in found.objects] == ["m/before", "m/later"]
    assert len(found.hidden) == 1
    assert reason in found.hidden[0].reason
    assert len(found.hidden[0].key) <= 120


def test_entries_at_the_limits_of_s3_are_shown() -> None:
    key = "m/" + "k" * (listing.LONGEST_KEY_BYTES - 2)
    found = entries(entry(key, Size=str(listing.LARGEST_OBJECT_BYTES)), entry("m/l", Size=" 0 "))
    assert [(each.key, each.size_bytes) for each in found.objects] == [
        (key, listing.LARGEST_OBJECT_BYTES), ("m/l", 0),
    ]  # fmt: skip
    assert not found.hidden
    parsed = listing.parse(page(*[entry()] * (listing.MOST_ENTRIES - 1), prefix("m/d/")))
    assert len(parsed.entries) + len(parsed.prefixes) == listing.MOST_ENTRIES


NOT_BELOW = "it is not below the prefix 'm/' that was asked for"


@pytest.mark.parametrize(
    ("item", "key", "reason"),
    [
        (entry(None), "an entry", "it has no key"),
        (entry(""), "", "it has no key"),
        (entry("x/" + "y" * 500), "x/" + "y" * 118, NOT_BELOW),
        (entry("m/a", Size="9" * 500), "m/a", f"its size is '{'9' * 120}'"),
        (entry("m/a", Size=str((50 << 40) + 1)), "m/a",
         f"its size is {(50 << 40) + 1}, and S3 has no object over {50 << 40}"),
        (entry("m/a", ETag="a b"), "m/a", "its ETag is 'a b'"),
        (prefix("y/z/"), "y/z/", NOT_BELOW),
        (prefix(""), "", "it has no key"),
        ("<CommonPrefixes></CommonPrefixes>", "", "it has no key"),
    ],
)  # fmt: skip
def test_a_hidden_entry_is_named_with_the_reason(item: str, key: str, reason: str) -> None:
    (hidden,) = entries(item).hidden
    assert (hidden.key, hidden.reason) == (key, reason)


@pytest.mark.parametrize(
    ("items", "last"),
    [
        ([entry("m/a"), entry("m/b", Size="ten")], "m/b"),
        ([entry("m/a"), entry("x")], "m/a"),
        ([prefix("m/a/")], "m/a/"),
        ([entry("m/b"), prefix("m/a/")], "m/b"),
        ([entry("m/b"), prefix("m/c/"), prefix("m/a/")], "m/c/"),
        ([entry("m/d/x")], "m/d/x"),
        ([prefix("m/")], None),
        ([], None),
    ],
)
def test_a_listing_goes_on_after_the_last_of_all(items: list[str], last: str | None) -> None:
    assert entries(*items, delimiter="/").last == last


def test_a_prefix_that_is_the_listed_one_or_comes_twice_is_not_shown_again() -> None:
    found = entries(prefix("m/"), prefix("m/a/"), prefix("m/a/"), entry("m/a/x"), delimiter="/")
    assert (found.prefixes, found.hidden) == (["m/a/"], [])


@pytest.mark.parametrize("root", ["ListBucketResult", "ListObjectsV2Output", "a:ListBucketResult"])
def test_the_root_of_a_listing(root: str) -> None:
    declared = ' xmlns:a="a"' if ":" in root else ""
    body = f"<{root}{declared}><Contents><Key>m/a</Key><Size>1</Size></Contents></{root}>"
    assert listing.parse(body.encode()).entries == [{"Key": "m/a", "Size": "1"}]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "the answer is empty"),
        (b"{}" * 500, f"it begins with '{'{}' * 60}'"),
        (b"<" + b"a" * 500 + b"/>", f"the answer is XML, but its root is '{'a' * 120}'"),
        (b"<!DOCTYPE " + b"h" * 500 + b"><h/>", f"the answer is a document of type '{'h' * 120}'"),
    ],
)
def test_what_is_no_listing_is_shown_in_part(body: bytes, words: str) -> None:
    with pytest.raises(NotAListingError) as told:
        listing.parse(body)
    assert str(told.value).endswith(words)


def test_blanks_belong_to_keys_and_to_no_other_field() -> None:
    parsed = listing.parse(page(entry(" m/a\n"), prefix("m/b /"), IsTruncated=" true\n"))
    assert list(parsed.texts()) == [" m/a\n", "m/b /"]
    assert parsed.about == {"IsTruncated": "true"}


@pytest.mark.parametrize(
    ("key", "encoding", "encoded"),
    [("m/a%20b", "url", True), ("m/a%2Fb", "URL", True), ("m/a", "url", True), ("m/a", "", False),
     ("m/a", "none", False), ("m/a b", "url", False), ("m/a%2", "url", False),
     ("m/%g0", "url", False)],
)  # fmt: skip
def test_whether_keys_are_encoded(key: str, encoding: str, encoded: bool) -> None:
    assert listing.parse(page(entry(key), EncodingType=encoding)).is_encoded is encoded
    assert listing.parse(page(prefix(key), EncodingType=encoding)).is_encoded is encoded


@pytest.mark.parametrize(
    ("keys", "space", "matters"),
    [(["a%20b", "a%2Bb"], False, False), (["a%2bb+"], True, True), (["a+b"], None, True),
     (["ab"], None, False), ([], None, False)],
)  # fmt: skip
def test_what_a_page_shows_of_the_meaning_of_plus(
    keys: list[str], space: bool | None, matters: bool
) -> None:
    for item in (entry, prefix):
        parsed = listing.parse(page(*map(item, keys)))
        assert listing.plus_is_space(parsed) is space
        assert listing.has_plus(parsed) is matters


@pytest.mark.parametrize(
    ("text", "encoded", "plus", "key"),
    [("a+%2B", True, True, "a +"), ("a+%2B", True, False, "a++"), ("a+%2B", False, True, "a+%2B"),
     ("%C3%A4", True, False, "ä"), ("%ff", True, False, None)],
)  # fmt: skip
def test_keys_are_decoded(text: str, encoded: bool, plus: bool, key: str | None) -> None:
    assert listing.decode(text, encoded=encoded, plus=plus) == key


@pytest.mark.parametrize("field", ["ETag", "LastModified"])
def test_without_etag_or_time_an_object_is_shown(field: str) -> None:
    for text in (None, ""):
        found = entries(entry(**{field: text}))
        assert not found.hidden
        assert len(found.objects) == 1


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2026-01-02T03:04:05.000Z", 1767323045),
        ("2026-01-02T03:04:05Z", 1767323045),
        ("2026-01-02T03:04:05", 1767323045),
        ("2026-01-02T03:04:05.123456789Z", 1767323045),
        ("2026-01-02T05:04:05+0200", 1767323045),
        ("2026-01-02T05:04:05.5+02:00", 1767323045),
        ("Fri, 02 Jan 2026 03:04:05 GMT", 1767323045),
        ("Fri, 02 Jan 2026 03:04:05", 1767323045),
        ("2016-12-31T23:59:60Z", 1483228799),
        ("1970-01-01T00:00:00.000Z", 0),
        ("0001-01-01T00:00:00Z", 0),
        ("1601-01-01T00:00:00Z", 0),
        ("2262-04-11T23:47:15Z", (1 << 63) // 10**9 - 1),
        ("2262-04-11T23:47:16Z", 0),
        (" 2026-01-02T03:04:05Z\n", 1767323045),
        ("9999-12-31T23:59:59.999Z", 0),
        ("", 0),
        ("yesterday", 0),
        ("2026-13-45T99:99:99Z", 0),
    ],
)
def test_times(text: str, seconds: int) -> None:
    assert listing.seconds_of(text) == seconds


@given(st.text(max_size=40))
def test_no_time_is_an_error(text: str) -> None:
    assert 0 <= listing.seconds_of(text) < 1 << 34


def test_a_service_that_does_not_know_the_delimiter() -> None:
    found = entries(entry("m/a"), entry("m/d/x"), entry("m/d/y/z"), entry("m/e"), delimiter="/")
    assert [each.key for each in found.objects] == ["m/a", "m/e"]
    assert found.prefixes == ["m/d/"]
    assert found.last == "m/e"


KEYS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
    min_size=1, max_size=6, unique=True,
)  # fmt: skip


def of_aws(key: str) -> str:
    return quote_plus(key, safe="/")


def of_others(key: str) -> str:
    return quote(key, safe="/+")


@given(KEYS, st.sampled_from([of_aws, of_others]))
def test_keys_come_back_as_they_were(keys: list[str], encode: object) -> None:
    """A page that shows what `+` means is read right; another one says that it does not."""
    assert callable(encode)
    texts = ["m/" + encode(key) for key in keys]
    parsed = listing.parse(page(*map(entry, texts), EncodingType="url"))
    assert parsed.is_encoded
    plus = listing.plus_is_space(parsed)
    if plus is None and listing.has_plus(parsed):
        return
    found = listing.entries(parsed, "m/", "", encoded=True, plus=bool(plus))
    assert [each.key for each in found.objects] == ["m/" + key for key in keys]


@pytest.mark.parametrize("key", ["m/a b+c", "m/100%", "m/%zz", "m/a b%20c"])
def test_a_service_that_claims_encoding_but_does_not_encode(key: str) -> None:
    parsed = listing.parse(page(entry(key), entry("m/x%41"), EncodingType="url"))
    assert not parsed.is_encoded


def objects_of(*keys: str) -> list[ListedObject]:
    return [ListedObject(key, 1, "", 0, key) for key in keys]


def test_following_pages_ends() -> None:
    tokens = Tokens("x")
    pages = [Page(objects_of("a"), [], "1"), Page([], [], "2"), Page(objects_of("b"), [], None)]
    assert [tokens.after(each) for each in pages] == ["1", "2", None]


def test_pages_of_services_without_delimiters_may_look_the_same() -> None:
    tokens = Tokens("x")
    pages = [Page([], ["p/"], "1"), Page([], ["p/"], "2"), Page(objects_of("q"), ["p/"], None)]
    assert [tokens.after(each) for each in pages] == ["1", "2", None]


@pytest.mark.parametrize(
    "pages",
    [
        [Page(objects_of("a"), [], "1"), Page(objects_of("b"), [], "1")],
        [Page([], [], "1"), Page([], [], "2"), Page([], [], "1")],
        [Page(objects_of("a"), ["p/"], "1"), Page(objects_of("a"), ["p/"], "2")],
        [Page([], [], str(number)) for number in range(MOST_EMPTY + 1)],
        [Page([], ["p/"], str(number)) for number in range(MOST_EMPTY + 2)],
    ],
)
def test_a_repeated_page_token_is_an_error(pages: list[Page]) -> None:
    tokens = Tokens("x")
    with pytest.raises(BadRequestError, match="no end"):
        for each in pages:
            tokens.after(each)


def test_a_key_that_is_not_utf_8_is_hidden() -> None:
    parsed = listing.parse(page(entry("m/%ff"), prefix("m/%fe/"), entry("m/b"), EncodingType="url"))
    found = listing.entries(parsed, "m/", "/", encoded=True, plus=True)
    assert [each.key for each in found.objects] == ["m/b"]
    assert [each.reason for each in found.hidden] == ["not UTF-8", "not UTF-8"]


RAW = "<Contents><Key>m/a{}b</Key><Size>1</Size></Contents>"


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ("&#x1F;", "&#x1F;"),
        ("&#0;", "&#0;"),
        ("&#xD800;", "&#xD800;"),
        ("&#65535;", "&#65535;"),
        ("&#1114112;", "&#1114112;"),
        (f"&#{'9' * 5000};", "&#999"),
        ("\x1f", "&#31;"),
        ("\uffff", "&#65535;"),
        (b"\xff", "&#56575;"),  # not UTF-8
    ],
)
def test_an_entry_with_a_character_that_xml_cannot_carry_is_hidden_alone(
    sent: str | bytes, shown: str
) -> None:
    text = sent if isinstance(sent, bytes) else sent.encode()
    body = page(entry("m/ä"), "HERE", prefix("m/d/"), RAW.format("&#x0000041;&#38;#0;"))
    of_object, of_prefix = RAW.format("HERE"), prefix("m/pHERE/")
    for item in of_object, of_prefix:
        sent_body = body.replace(b"HERE", item.encode()).replace(b"HERE", text)
        found = listing.entries(listing.parse(sent_body), "m/", "/", encoded=False, plus=False)
        assert [each.key for each in found.objects] == ["m/ä", "m/aA&#0;b"]
        assert found.prefixes == ["m/d/"]
        assert len(found.hidden) == 1
        assert found.hidden[0].key.startswith(("m/a" if item == of_object else "m/p") + shown)
        assert "XML" in found.hidden[0].reason


def test_a_page_that_ends_with_a_character_of_no_xml_continues_after_its_last_good_key() -> None:
    told = "<NextMarker>m/a&#0;</NextMarker><NextContinuationToken>&#1;</NextContinuationToken>"
    parsed = listing.parse(page(entry("m/a"), told, RAW.format("&#0;"), IsTruncated="true"))
    assert (parsed.token, parsed.marker) == (None, None)
    found = listing.entries(parsed, "m/", "", encoded=False, plus=False)
    assert found.last == "m/a"


def test_an_owner_with_a_character_that_xml_cannot_carry_hides_nothing() -> None:
    owner = "<Owner><DisplayName>&#2;</DisplayName></Owner><Size>"
    found = entries(entry().replace("<Size>", owner))
    assert ([each.key for each in found.objects], found.hidden) == (["m/a"], [])


def test_a_character_of_no_xml_outside_of_fields_is_no_listing() -> None:
    with pytest.raises(NotAListingError, match="no XML"):
        listing.parse(page(entry()).replace(b"<Size>", b"<Size\x01>"))


def test_an_answer_full_of_what_xml_cannot_carry_is_refused_early() -> None:
    rest = bytes(range(1, 9)) * (1 << 19)
    tracemalloc.start()
    try:
        with pytest.raises(NotAListingError, match="full of characters"):
            listing.parse(b"<ListBucketResult>" + rest)
        assert tracemalloc.get_traced_memory()[1] < 8 * len(rest)
    finally:
        tracemalloc.stop()


def test_an_answer_in_another_encoding_is_not_taken_for_utf_8() -> None:
    body = page(entry("m/\x01"), entry("m/\xe9")).decode().partition("?>")[2]
    named = "<?xml version='1.0' encoding='ISO-8859-1'?>" + body
    with pytest.raises(NotAListingError, match="no XML"):
        listing.parse(named.encode("latin-1"))
