"""A store in memory: the second one, beside S3, that `lazyfs/store/protocol.py` has."""

from __future__ import annotations

import hashlib

from lazyfs.errors import ObjectChangedError, ObjectGoneError
from lazyfs.listed_object import ListedObject
from lazyfs.store.cancel import Cancel, CancelledError
from lazyfs.store.checksum import ObjectSum
from lazyfs.store.fleet_cache import FleetCache
from lazyfs.store.listing_page import Page, Pinned
from lazyfs.store.protocol import Ranges
from lazyfs.store.url import SourceUrl


class MemoryStore:
    """Objects by key; put into `objects` and taken out at any time.

    Args:
        objects: to begin with.
        page_size: entries of a page.
    """

    def __init__(self, objects: dict[str, bytes], page_size: int = 1000) -> None:
        self.url = SourceUrl("memory", "")
        self.endpoint = "memory:"
        self.objects = objects
        self.asked: list[tuple[str, int, int]] = []
        self._page_size = page_size

    def name(self, key: str) -> str:
        return f"memory/{key}"

    def list_page(
        self, prefix: str, token: str | None = None, *, delimiter: str = "", after: str = ""
    ) -> Page:
        last = token or after
        entries: dict[str, bool] = {}
        for key in sorted(self.objects):
            rest = key[len(prefix) :]
            if not key.startswith(prefix):
                continue
            if delimiter and delimiter in rest:
                entries[prefix + rest.partition(delimiter)[0] + delimiter] = True
            else:
                entries[key] = False
        names = [name for name in entries if name > last]
        shown = names[: self._page_size]
        more = shown[-1] if len(names) > len(shown) else None
        objects = [self.listed(name) for name in shown if not entries[name]]
        return Page(objects, [name for name in shown if entries[name]], more)

    def listed(self, key: str) -> ListedObject:
        """An object as a listing has it now."""
        body = self.objects[key]
        return ListedObject(key, len(body), f'"{hashlib.md5(body).hexdigest()}"', 0, key)

    @property
    def ranges(self) -> Ranges:
        return self

    def read(
        self,
        pin: Pinned,
        start: int,
        length: int,
        cancel: Cancel | None = None,
        asked: object = None,
    ) -> memoryview:
        if cancel is not None and cancel.called:
            raise CancelledError
        self._check(pin)
        self.asked.append((pin.key, start, length))
        return memoryview(self.objects[pin.key])[start : start + length]

    def read_cached(
        self, cache: FleetCache, pin: Pinned, start: int, length: int, cancel: Cancel
    ) -> memoryview | None:
        return None

    def checksum(self, pin: Pinned) -> ObjectSum | None:
        self._check(pin)
        return None

    def close_idle(self, longer_than_s: float = 0.0) -> None:
        """There are no connections."""

    def _check(self, pin: Pinned) -> None:
        if pin.key not in self.objects:
            raise ObjectGoneError(f"{self.name(pin.key)}: is gone")
        if self.listed(pin.key).etag != pin.etag:
            raise ObjectChangedError(f"{self.name(pin.key)}: is another one")
