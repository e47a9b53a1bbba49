"""Listings whose pages never end are noticed, and no others."""

from __future__ import annotations

import pytest

from lazyfs.errors import BadRequestError
from lazyfs.listed_object import ListedObject
from lazyfs.store import listing_page
from lazyfs.store.listing_page import Page, Tokens


@pytest.fixture(autouse=True)
def few_empty_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing_page, "MOST_EMPTY", 3)


def page(token: str | None, *keys: str, prefixes: tuple[str, ...] = ()) -> Page:
    found = [ListedObject(key, 1, '"e"', 0, key) for key in keys]
    return Page(found, list(prefixes), token)


def follow(*pages: Page) -> list[str | None]:
    tokens = Tokens("listing of s3://b/m/")
    return [tokens.after(page) for page in pages]


def test_pages_follow_each_other() -> None:
    assert follow(page("1", "a"), page("2", "b"), page(None, "c")) == ["1", "2", None]


def test_some_empty_pages_may_come_after_deleted_objects() -> None:
    empty = [page(str(n)) for n in range(3)]
    again = [page(str(n)) for n in range(10, 13)]
    for news in (page("x", "a"), page("x", prefixes=("m/b/",))):
        assert follow(*empty, news, *again, page(None, "z"))[-1] is None
    with pytest.raises(BadRequestError, match=r"listing of s3://b/m/: .* lead nowhere"):
        follow(*empty, page("3"))


def test_the_same_prefix_again_and_again_is_no_news() -> None:
    same = [page(str(n), prefixes=("m/a/",)) for n in range(5)]
    assert follow(*same[:4])[-1] == "3"
    with pytest.raises(BadRequestError, match="lead nowhere"):
        follow(*same)


def test_a_token_that_was_seen_before_is_an_error() -> None:
    with pytest.raises(BadRequestError, match=r"listing of s3://b/m/: .* lead nowhere"):
        follow(page("1", "a"), page("2", "b"), page("1", "c"))


def test_a_page_that_comes_twice_is_an_error() -> None:
    with pytest.raises(BadRequestError, match=r"listing of s3://b/m/: .* a page came twice"):
        follow(page("1", "a"), page("2", "a"))
