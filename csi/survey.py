"""Whether a source can be read, and how large it is.

Asked before a volume of it is promised, and before the keys of a daemon are replaced.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from csi.volumes import Volume
from lazyfs.errors import ObjectGoneError
from lazyfs.options.mount_options import MountOptions
from lazyfs.process.mount_spec import MountSpec
from lazyfs.store.credentials import Credentials
from lazyfs.store.objects import Page, Tokens
from lazyfs.store.protocol import Store
from lazyfs.store.source import Source
from lazyfs.store.url import SourceUrl

log = logging.getLogger(__name__)

# A page has up to 1,000 objects. external-provisioner waits for 10 s (--timeout), then asks again.
MOST_PAGES = 100
LONGEST_S = 6.0


@dataclass(frozen=True, slots=True)
class Survey:
    """What is below a source.

    Attributes:
        size_bytes: of all files that a mount would show.
        complete: whether all were counted; a huge prefix is not listed to its end.
    """

    size_bytes: int
    complete: bool


def check_keys(spec: MountSpec, credentials: Credentials) -> None:
    """See that what a daemon serves can be read with others than its own credentials.

    Raises:
        SourceError: it cannot, as far as is known.
    """
    options = MountOptions.parse(("{attribute}", spec.options))
    url = SourceUrl.parse(spec.source)
    source = Source(url, options, credentials)
    _read_a_byte(source, source.list_page(url.prefix, None))


def survey(volume: Volume, credentials: Credentials | None) -> Survey:
    """List a source, and read a byte of it.

    Args:
        credentials: to read with; None: botocore finds them.

    Raises:
        SourceError: it does not exist, or cannot be listed or read.
    """
    url, options = SourceUrl.parse(volume.source), volume.mount_options
    began = time.monotonic()
    source = Source(url, options, credentials)
    tokens = Tokens(str(url))
    page = source.list_page(url.prefix)
    size_bytes, pages, was_read, seen_objects = 0, 1, False, False
    while True:
        token = tokens.after(page)
        was_read = was_read or _read_a_byte(source, page)
        size_bytes += sum(
            each.size_bytes
            for each in page.objects
            if options.wants(each.key.removeprefix(url.prefix))
        )
        seen_objects = seen_objects or bool(page.objects)
        if token is None:
            if not seen_objects:
                raise ObjectGoneError(f"{url}: no objects below this prefix; check its spelling")
            return Survey(size_bytes, complete=True)
        if pages == MOST_PAGES or time.monotonic() - began > LONGEST_S:
            log.warning(
                "%s: counted %d pages of objects, not all; its capacity is more", url, pages
            )
            return Survey(size_bytes, complete=False)
        page = source.list_page(url.prefix, token)
        pages += 1


def _read_a_byte(source: Store, page: Page) -> bool:
    """To list needs another permission than to read; whether there was anything to read."""
    for each in page.objects:
        if each.size_bytes:
            source.read_range(each, 0, 1)
            return True
    return False
