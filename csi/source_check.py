"""Checks whether a source can be read, and how large it is, before a volume is made."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from csi.volume_attributes import Volume
from lazyfs.errors import ObjectGoneError
from lazyfs.store.credentials import Credentials
from lazyfs.store.listing_page import Page, Tokens
from lazyfs.store.protocol import Store
from lazyfs.store.stores import open_source
from lazyfs.store.url import SourceUrl

log = logging.getLogger(__name__)

# A page has up to 1,000 objects. external-provisioner waits 10 s (--timeout), then retries.
MOST_PAGES = 100
LONGEST_S = 6.0


@dataclass(frozen=True, slots=True)
class SourceSize:
    """The size of a source.

    Attributes:
        size_bytes: of all files that a mount would show.
        complete: whether all files were counted; a huge prefix is not listed to its end.
    """

    size_bytes: int
    complete: bool


def check_source(volume: Volume, credentials: Credentials | None) -> SourceSize:
    """List a source, and read a byte of it.

    Args:
        credentials: to read with; None: botocore finds them.

    Raises:
        SourceError: it does not exist, or cannot be listed or read.
    """
    url, options = SourceUrl.parse(volume.source), volume.mount_options
    began = time.monotonic()
    source = open_source(url, options, credentials)
    tokens = Tokens(str(url))
    page = source.list_page(url.prefix)
    size_bytes, pages, was_read, seen_objects = 0, 1, False, False
    while True:
        token = tokens.after(page)
        was_read = was_read or read_a_byte(source, page)
        size_bytes += sum(
            each.size_bytes
            for each in page.objects
            if options.wants(each.key.removeprefix(url.prefix))
        )
        seen_objects = seen_objects or bool(page.objects)
        if token is None:
            if not seen_objects:
                raise ObjectGoneError(f"{url}: no objects below this prefix; check its spelling")
            return SourceSize(size_bytes, complete=True)
        if pages == MOST_PAGES or time.monotonic() - began > LONGEST_S:
            log.warning(
                "%s: counted only the first %d pages of objects; its size is larger", url, pages
            )
            return SourceSize(size_bytes, complete=False)
        page = source.list_page(url.prefix, token)
        pages += 1


def read_a_byte(source: Store, page: Page) -> bool:
    """Read a byte, because reading needs another permission than listing; False if none exists."""
    for each in page.objects:
        if each.size_bytes:
            source.ranges.read(each, 0, 1)
            return True
    return False
