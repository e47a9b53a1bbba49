"""What a store returns about its objects. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from lazyfs.errors import BadRequestError
from lazyfs.listed_object import ListedObject


@dataclass(frozen=True, slots=True)
class Hidden:
    """A key that is not shown, and why."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Page:
    """One answer of a listing.

    Attributes:
        prefixes: common prefixes of a listing by a delimiter.
        next_token: requests the next page; None on the last one.
        hidden: invalid entries.
    """

    objects: list[ListedObject]
    prefixes: list[str]
    next_token: str | None
    hidden: list[Hidden] = field(default_factory=list)


# The most pages in a row without anything new; S3 may send empty pages after many deleted objects.
MOST_EMPTY = 10_000


class Tokens:
    """Follows the pages of one listing, and notices if they never end.

    Args:
        what: the name of the listing, for errors.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._seen: set[str] = set()
        self._former: Page | None = None
        self._empty = 0

    def after(self, page: Page) -> str | None:
        """The token for the page after this one.

        Raises:
            BadRequestError: the token or the page was seen before: the listing would never end.
        """
        token, former = page.next_token, self._former
        self._former = page
        is_same = former is not None and page.prefixes == former.prefixes
        if is_same and page.objects and former is not None and page.objects == former.objects:
            raise BadRequestError(f"{self._what}: the listing has no end: a page came twice")
        # If a service ignores delimiters, pages within one directory repeat the same prefix.
        has_news = bool(page.objects) or (bool(page.prefixes) and not is_same)
        self._empty = 0 if has_news else self._empty + 1
        if token in self._seen or self._empty > MOST_EMPTY:
            raise BadRequestError(f"{self._what}: the listing has no end: its tokens lead nowhere")
        if token is not None:
            self._seen.add(token)
        return token


class Pinned(Protocol):
    """One version of one object: a file of the mount, or an object of a listing."""

    @property
    def key(self) -> str: ...

    @property
    def etag(self) -> str: ...

    @property
    def size_bytes(self) -> int: ...

    @property
    def modified_ns(self) -> int: ...
