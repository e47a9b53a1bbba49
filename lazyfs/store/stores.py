"""The object stores that lazyfs can read, by the scheme of a URL.

Each module is imported only when a URL names its store.
"""

from __future__ import annotations

from lazyfs.options.mount_options import MountOptions
from lazyfs.store.credentials import Credentials
from lazyfs.store.protocol import Source
from lazyfs.store.url import SourceUrl


def _s3() -> type[Source]:
    from lazyfs.store.s3_source import S3Source

    return S3Source


_STORES = {"s3": _s3}


def source_class(url: SourceUrl) -> type[Source]:
    """The class of a source's store."""
    return _STORES[url.scheme]()


def open_source(
    url: SourceUrl, options: MountOptions, credentials: Credentials | None = None
) -> Source:
    """Find out where a source is and how it is read.

    Args:
        credentials: the credentials for this source; None: they are found as usual.

    Raises:
        SourceError, OptionError: as for `Source`.
    """
    return source_class(url)(url, options, credentials)
