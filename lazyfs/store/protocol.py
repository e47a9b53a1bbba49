"""What the rest of lazyfs asks of a store of objects.

S3 is one (`s3_source.py`); the tests have another one in memory (`tests/memory_store.py`). A new
store is one more file with this class. All calls block, and are made from any number of threads.
Whatever goes wrong is a `SourceError`, which knows what a reader gets and whether waiting may help;
its message names the object.
"""

from __future__ import annotations

from typing import Protocol

from lazyfs.store.cancel import Cancel
from lazyfs.store.checksum import ObjectSum
from lazyfs.store.fleet_cache import FleetCache
from lazyfs.store.objects import Page, Pinned
from lazyfs.store.url import SourceUrl


class Store(Protocol):
    """The objects below one prefix."""

    @property
    def url(self) -> SourceUrl:
        """What is read, as it was named."""

    @property
    def endpoint(self) -> str:
        """What makes cached content of equal names distinct: who was asked for it."""

    def name(self, key: str) -> str:
        """An object, for messages."""

    def list_page(
        self, prefix: str, token: str | None = None, *, delimiter: str = "", after: str = ""
    ) -> Page:
        """Some objects below a prefix, in key order, from where the token of a page says.

        Args:
            delimiter: gathers keys that have it behind the prefix as common prefixes.
            after: without a token, only keys that follow this one.

        Raises:
            SourceError: the store did not answer, or not as it must.
        """

    def read_range(
        self, pin: Pinned, start: int, length: int, cancel: Cancel | None = None
    ) -> memoryview:
        """Exactly `length` bytes of an object from `start`, of the version that was listed.

        Raises:
            CancelledError: by `cancel`, from another thread.
            ObjectChangedError, ObjectGoneError: the object is no longer what was listed.
            SourceError: any other failure.
        """

    def read_cached(
        self, cache: FleetCache, pin: Pinned, start: int, length: int, cancel: Cancel
    ) -> memoryview | None:
        """As `read_range`, asked of the cache of a fleet, which passes it on to the store.

        None: the cache is not to be asked for this object.

        Raises:
            CancelledError: by `cancel`.
            FleetCacheError: the cache did not give the range of that version.
            SourceError: any other failure.
        """

    def checksum(self, pin: Pinned) -> ObjectSum | None:
        """That this still is the object, and its checksum; None if the store keeps none.

        Raises:
            ObjectChangedError, ObjectGoneError: the object is no longer what was listed.
            SourceError: any other failure.
        """

    def close_idle(self) -> None:
        """Close connections that nobody has used for a while."""
