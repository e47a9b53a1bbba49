"""Parses and checks one answer to a listing. Pure.

All that S3 says about objects enters here. An answer that is not a listing (a login page, an empty
body, truncated XML) is an error and never "an empty directory". An invalid entry is left out and
named with the reason; the other entries of the page are used.

The format: https://docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html. Other services
leave out fields, write keys and times in other ways, or support version 1 only. Comments in the
code name these differences.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import unquote_to_bytes
from xml.parsers import expat

from lazyfs.listed_object import ListedObject
from lazyfs.store import entity_tag
from lazyfs.store.listing_page import Hidden

# A page of 1,000 keys of 1,024 bytes, each byte escaped, has 4 MiB.
MOST_BYTES = 16 << 20
# S3 returns up to 1,000 entries a page; some services return more than requested.
MOST_ENTRIES = 10_000
# Limits of S3: docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html, and for sizes
# docs.aws.amazon.com/general/latest/gr/s3.html.
LONGEST_KEY_BYTES = 1024
LARGEST_OBJECT_BYTES = 50 << 40
# No valid field is longer than a key with every byte escaped.
_LONGEST_FIELD = 3 * LONGEST_KEY_BYTES + 1
# The last time that fits into 64 bits of nanoseconds: the year 2262.
_LATEST_S = (1 << 63) // 10**9
_SHOWN = 120
# Marks a character that XML cannot carry. No key has it: Unicode keeps it for internal use.
_UNCARRIED = "\ufdd0"
# Such a character, as a reference or as it is; and references to others.
# https://www.w3.org/TR/xml/#charsets
_MAYBE_UNCARRIED = re.compile(
    "&#(?:x([0-9A-Fa-f]+)|([0-9]+));|[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
)
_NOT_XML = "a character of it cannot be in XML, and the service does not encode keys"
_NAMES_ANOTHER_ENCODING = re.compile(rb"<\?xml[^>]*encoding=.(?!utf-?8)", re.IGNORECASE)
_MARKED_AFTER = [
    expat.errors.codes[text]
    for text in (expat.errors.XML_ERROR_BAD_CHAR_REF, expat.errors.XML_ERROR_INVALID_TOKEN)
]
_ROOT, _ENTRY, _FIELD = 1, 2, 3


class NotAListingError(Exception):
    """The answer is not a listing; the message says what it is."""


@dataclass(slots=True)
class RawPage:
    """The fields of a listing as the text that was sent.

    Attributes:
        entries: the fields of each object, by name.
        prefixes: the common prefixes.
        about: the fields of the page itself, by name.
    """

    entries: list[dict[str, str]] = field(default_factory=list)
    prefixes: list[str] = field(default_factory=list)
    about: dict[str, str] = field(default_factory=dict)

    @property
    def is_encoded(self) -> bool:
        """Whether keys are percent-encoded: the page says so, and no key contradicts it."""
        said = self.about.get("EncodingType", "").lower() == "url"
        return said and not any(map(_cannot_be_encoded, self.texts()))

    @property
    def is_truncated(self) -> bool:
        """Whether more pages follow."""
        said = self.about.get("IsTruncated", "").lower()
        if said not in ("", "true", "false", "1", "0"):
            raise NotAListingError(f"IsTruncated is {said[:_SHOWN]!r}")
        return said in ("true", "1") or (said == "" and bool(self.token))

    @property
    def token(self) -> str | None:
        """The token for the next page, if the service gives one."""
        return self._carried("NextContinuationToken")

    @property
    def marker(self) -> str | None:
        """The same in version 1, encoded as keys are."""
        return self._carried("NextMarker")

    def _carried(self, name: str) -> str | None:
        text = self.about.get(name)
        return text if text and _UNCARRIED not in text else None

    def texts(self) -> Iterable[str]:
        """All keys and prefixes."""
        yield from (entry["Key"] for entry in self.entries if "Key" in entry)
        yield from self.prefixes


def parse(body: bytes) -> RawPage:
    """Parse an answer.

    Characters that XML cannot carry are marked, and hide their entries: services that ignore
    `encoding-type` send them.

    Raises:
        NotAListingError: it is not a listing, or is truncated.
        MemoryError: there is no memory for it.
    """
    # Services that need long for an answer may send blanks first, to keep the connection open.
    body = body.lstrip()
    if not body:
        raise NotAListingError("the answer is empty")
    try:
        return _parsed(body)
    except expat.ExpatError as error:
        told, code = str(error), error.code
    if code in _MARKED_AFTER and not _NAMES_ANOTHER_ENCODING.match(body):
        with contextlib.suppress(expat.ExpatError):
            return _parsed(_marked(body), "UTF-8")
    begins = body[:_SHOWN].decode(errors="replace")
    raise NotAListingError(f"the answer is no XML ({told}); it begins with {begins!r}")


def _parsed(body: bytes, encoding: str | None = None) -> RawPage:
    """Raises ExpatError, and as `parse`; `encoding`: instead of the one that the answer names."""
    parser = _Parser(encoding)
    try:
        parser.expat.Parse(body, True)
    except expat.ExpatError as error:
        if error.code == expat.errors.codes[expat.errors.XML_ERROR_NO_MEMORY]:
            raise MemoryError from None
        raise
    return parser.page


def _marked(body: bytes) -> bytes:
    """An answer in UTF-8 in which what XML cannot carry is shown, after a mark.

    Raises:
        NotAListingError: there is too much of it.
    """
    marks = 0

    def shown(found: re.Match[str]) -> str:
        nonlocal marks
        marks += 1
        if marks > MOST_ENTRIES:
            raise NotAListingError("the answer is full of characters that XML cannot carry")
        in_hex, in_decimal = found.groups()
        if not in_hex and not in_decimal:
            return f"{_UNCARRIED}&amp;#{ord(found[0])};"
        # No character has a number of more digits.
        number = int((in_hex or in_decimal).lstrip("0")[:8] or "0", 16 if in_hex else 10)
        is_one = number <= sys.maxunicode and not _MAYBE_UNCARRIED.match(chr(number))
        return found[0] if is_one else f"{_UNCARRIED}&amp;{found[0][1:]}"

    return _MAYBE_UNCARRIED.sub(shown, body.decode(errors="surrogateescape")).encode()


class _Parser:
    """Collects the fields of a ListBucketResult."""

    def __init__(self, encoding: str | None) -> None:
        self.page = RawPage()
        self._path: list[str] = []
        # Of the element that is being read: see `_start`.
        self._text: list[str]
        self._length: int
        self._entry: dict[str, str]
        self.expat = expat.ParserCreate(encoding)
        self.expat.buffer_text = True
        self.expat.StartElementHandler = self._start
        self.expat.EndElementHandler = self._end
        self.expat.CharacterDataHandler = self._characters
        self.expat.StartDoctypeDeclHandler = self._doctype

    def _doctype(self, name: str, *_: object) -> None:
        raise NotAListingError(f"the answer is a document of type {name[:_SHOWN]!r}")

    def _start(self, name: str, _: object) -> None:
        name = name.rpartition(":")[2]
        self._path.append(name)
        if len(self._path) == _ROOT and name not in ("ListBucketResult", "ListObjectsV2Output"):
            raise NotAListingError(f"the answer is XML, but its root is {name[:_SHOWN]!r}")
        if len(self._path) == _ENTRY:
            self._entry = {}
        self._text, self._length = [], 0

    def _characters(self, text: str) -> None:
        if self._length < _LONGEST_FIELD:
            self._text.append(text[:_LONGEST_FIELD])
            self._length += len(text)

    def _end(self, _: str) -> None:
        name, depth, page = self._path.pop(), len(self._path) + 1, self.page
        if depth == _FIELD:
            self._entry[name] = "".join(self._text)
        elif depth == _ENTRY:
            if name == "Contents":
                page.entries.append(self._entry)
            elif name == "CommonPrefixes":
                page.prefixes.append(self._entry.get("Prefix", ""))
            else:
                page.about[name] = "".join(self._text).strip()
            if len(page.entries) + len(page.prefixes) > MOST_ENTRIES:
                raise NotAListingError(f"the answer has over {MOST_ENTRIES} entries")
        self._text, self._length = [], 0


def plus_is_space(page: RawPage) -> bool | None:
    """Whether `+` is a space in an encoded page; None if the page does not show it.

    AWS writes a space as `+` and a plus as `%2B`; others write `%20` and leave the plus alone.
    """
    texts = list(page.texts())
    if any("%20" in text for text in texts):
        return False
    if any("%2b" in text.lower() for text in texts):
        return True
    return None


def has_plus(page: RawPage) -> bool:
    """Whether the meaning of `+` matters for this page."""
    return any("+" in text for text in page.texts())


def decode(text: str, *, encoded: bool, plus: bool) -> str | None:
    """A key as text; None if it is not UTF-8.

    Listings are requested URL-encoded, because XML cannot carry every character of a key.

    Args:
        plus: `+` is a space.
    """
    if not encoded:
        return text
    try:
        return unquote_to_bytes(text.replace("+", " ") if plus else text).decode()
    except UnicodeDecodeError:
        return None


def _cannot_be_encoded(text: str) -> bool:
    """Whether a text is not encoded: some services say `EncodingType` and encode nothing."""
    return " " in text or re.search(r"%(?![0-9A-Fa-f]{2})", text) is not None


@dataclass(frozen=True, slots=True)
class Entries:
    """The content of a page.

    Attributes:
        last: the last key or common prefix of the page, after which a listing can continue.
    """

    objects: list[ListedObject]
    prefixes: list[str]
    hidden: list[Hidden]
    last: str | None


def entries(page: RawPage, prefix: str, delimiter: str, *, encoded: bool, plus: bool) -> Entries:
    """The objects and common prefixes of a page, checked one by one.

    Args:
        prefix: the requested prefix. Keys that do not begin with it are hidden.
        delimiter: the requested delimiter. If a service ignores it, keys are grouped here.
        encoded, plus: as for `decode`.
    """
    objects: list[ListedObject] = []
    prefixes: dict[str, None] = {}
    hidden: list[Hidden] = []
    last: str | None = None
    for item in page.entries:
        text = item.get("Key")
        shown = _shown(text or "")
        key = None if text is None else decode(text, encoded=encoded, plus=plus)
        if text is None:
            hidden.append(Hidden("an entry", "it has no key"))
        elif _UNCARRIED in text:
            hidden.append(Hidden(shown, _NOT_XML))
        elif key is None:
            hidden.append(Hidden(shown, "not UTF-8"))
        elif reason := _refusal(key, prefix):
            hidden.append(Hidden(shown, reason))
        elif delimiter and delimiter in (rest := key[len(prefix) :]):
            last = key
            prefixes[prefix + rest.partition(delimiter)[0] + delimiter] = None
        else:
            last = key
            found = _listed(key, item)
            if isinstance(found, str):
                hidden.append(Hidden(shown, found))
            else:
                objects.append(found)
    for text in page.prefixes:
        common = decode(text, encoded=encoded, plus=plus)
        if _UNCARRIED in text:
            hidden.append(Hidden(_shown(text), _NOT_XML))
        elif common is None:
            hidden.append(Hidden(_shown(text), "not UTF-8"))
        elif reason := _refusal(common, prefix):
            hidden.append(Hidden(_shown(text), reason))
        elif common != prefix:
            prefixes[common] = None
            last = max(last or common, common)
    return Entries(objects, list(prefixes), hidden, last)


def _shown(text: str) -> str:
    return text.replace(_UNCARRIED, "")[:_SHOWN]


def _refusal(key: str, prefix: str) -> str | None:
    if not key:
        return "it has no key"
    if len(key.encode(errors="replace")) > LONGEST_KEY_BYTES:
        return f"a key over {LONGEST_KEY_BYTES} bytes"
    if not key.startswith(prefix):
        return f"it is not below the prefix {prefix!r} that was asked for"
    return None


def _listed(key: str, item: dict[str, str]) -> ListedObject | str:
    """One object, or the reason why the entry is invalid."""
    size = item.get("Size", "").strip()
    if not re.fullmatch(r"[0-9]{1,18}", size):
        return f"its size is {size[:_SHOWN]!r}"
    if int(size) > LARGEST_OBJECT_BYTES:
        return f"its size is {size}, and S3 has no object over {LARGEST_OBJECT_BYTES}"
    tag = entity_tag.canonical(item.get("ETag"))
    if tag is None:
        return f"its ETag is {item['ETag'][:_SHOWN]!r}"
    modified_ns = seconds_of(item.get("LastModified", "")) * 10**9
    return ListedObject(key, int(size), tag, modified_ns, key)


def seconds_of(text: str) -> int:
    """A time from a listing in seconds since the epoch; 0 if it is invalid or out of range.

    S3 writes ISO 8601, with milliseconds or without; other services write an HTTP date, or nothing.
    """
    text = text.strip()
    try:
        if text[10:11] == "T":
            # Unix time has no leap seconds.
            time = datetime.fromisoformat(text.replace(":60", ":59"))
        else:
            time = parsedate_to_datetime(text)
        seconds = int(time.replace(tzinfo=time.tzinfo or UTC).timestamp())
    except (ValueError, OverflowError, TypeError, IndexError):
        return 0
    return seconds if 0 <= seconds < _LATEST_S else 0
