"""The interface of an object store.

S3 implements it (`s3_source.py`), and so does a store in memory for tests
(`tests/memory_store.py`). To add a store, write a class that implements `Source`, and name it in
`stores.py`. All calls block, and are made from any number of threads. Every failure is a
`SourceError`, which says which error a reader gets and whether waiting may help; its message names
the object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # a mount waits for whatever is imported here
    from lazyfs.movers.call import Nudge
    from lazyfs.movers.pool import Movers
    from lazyfs.options.mount_options import MountOptions
    from lazyfs.store.cancel import Cancel
    from lazyfs.store.checksum import ObjectSum
    from lazyfs.store.credentials import Credentials
    from lazyfs.store.fleet_cache import FleetCache
    from lazyfs.store.listing_page import Page, Pinned
    from lazyfs.store.resolved_source import ResolvedSource
    from lazyfs.store.url import SourceUrl

# What `read_each` is told while it runs: give each part as it comes; end what has not come.
EACH, STOP = b"each", b"stop"


class Ranges(Protocol):
    """Reads ranges of the objects of a store."""

    def read(
        self,
        pin: Pinned,
        start: int,
        length: int,
        cancel: Cancel | None = None,
        asked: Any = None,
    ) -> memoryview:
        """Exactly `length` bytes of an object from `start`, of the version that was listed.

        Args:
            asked: what `read_by_mover` returned for the same range.

        Raises:
            CancelledError: by `cancel`, from another thread.
            ObjectChangedError, ObjectGoneError: the object is no longer what was listed.
            SourceError: any other failure.
        """

    async def read_by_mover(
        self,
        pin: Pinned,
        start: int,
        length: int,
        cancel: Cancel,
        has_time: Callable[[], bool],
        ended: Callable[[], None],
    ) -> memoryview | Any:
        """Like `read`, for a task of the trio thread: a mover makes the request.

        Args:
            has_time: whether it may wait for the first mover to start.
            ended: called when no mover uses the memory any more, even if the task was cancelled
                before.

        Returns:
            The bytes; or what `read` needs as `asked` to go on; None if it is to begin.

        Raises:
            CancelledError: by `cancel`.
        """

    async def read_each(
        self,
        pin: Pinned,
        parts: Sequence[tuple[int, int]],
        came: Callable[[Sequence[tuple[int, memoryview | Any]]], None],
        nudge: Nudge,
        patience_s: float,
        ended: Callable[[], None],
    ) -> None:
        """Like `read_by_mover`, for several parts of an object, all at once.

        Args:
            parts: start and length of each; none is shorter than `LEAST_SHARED`.
            came: called with what `read_by_mover` would return, and which part it is, of one or
                more parts at a time. It is not called with parts that were not requested.
            nudge: sends `EACH` and `STOP` meanwhile.
            patience_s: after this time, in seconds, what is missing is cut off.
            ended: see `read_by_mover`.

        Raises:
            OSError: out of memory.
        """

    @property
    def may_move(self) -> bool:
        """Whether a mover may make requests now."""

    def read_cached(
        self,
        cache: FleetCache,
        pin: Pinned,
        start: int,
        length: int,
        cancel: Cancel,
        *,
        fresh: bool = False,
    ) -> memoryview | None:
        """Like `read`, from the cache of a fleet, which passes the request on to the store.

        Args:
            fresh: the cache must get it from the store, because what it has is wrong.

        None: the cache cannot be used for this object.

        Raises:
            CancelledError: by `cancel`.
            FleetCacheError: the cache did not deliver the range of that version.
            SourceError: any other failure.
        """


class Store(Protocol):
    """The objects below one prefix."""

    @property
    def url(self) -> SourceUrl:
        """The source, as the user wrote it."""

    @property
    def endpoint(self) -> str:
        """The identity of the service, which keeps cached content of two services apart."""

    @property
    def ranges(self) -> Ranges:
        """Reads ranges of its objects."""

    def name(self, key: str) -> str:
        """An object, for messages."""

    def list_page(
        self, prefix: str, token: str | None = None, *, delimiter: str = "", after: str = ""
    ) -> Page:
        """A page of the objects below a prefix, in key order.

        Args:
            token: from the page before; None: the first page.
            delimiter: keys that have it after the prefix are grouped as common prefixes.
            after: without a token, only keys that follow this one.

        Raises:
            SourceError: the store did not answer, or its answer is invalid.
        """

    def checksum(self, pin: Pinned) -> ObjectSum | None:
        """Check that the object is unchanged; returns its checksum, None if the store has none.

        Raises:
            ObjectChangedError, ObjectGoneError: the object is no longer what was listed.
            SourceError: any other failure.
        """

    def close_idle(self, longer_than_s: float) -> None:
        """Close connections that have been idle for this long."""


class Source(Store, Protocol):
    """A store that was opened by its URL, for mounts and commands.

    Args:
        url: the bucket and prefix.
        options: how to reach it.
        credentials: the credentials for this source; None: they are found as usual.
        resolved: what another process found out with `resolve`; None: it is found out now.

    Raises:
        SourceError: there are no credentials.
        OptionError: the options or the configuration cannot be used.
    """

    def __init__(
        self,
        url: SourceUrl,
        options: MountOptions,
        credentials: Credentials | None = None,
        resolved: ResolvedSource | None = None,
    ) -> None: ...

    @classmethod
    def resolve(
        cls,
        url: SourceUrl,
        options: MountOptions,
        credentials: Credentials | None = None,
        region: str | None = None,
    ) -> ResolvedSource:
        """Resolve a source, list its first page, and check that it can be read.

        Args:
            region: the bucket's region, if it is already known: then no request is made.

        Raises:
            SourceError, OptionError: as above; or the source cannot be listed or read.
        """

    @property
    def region(self) -> str:
        """The region of the bucket."""

    def use(self, movers: Movers) -> None:
        """Have movers receive ranges from now on."""

    def set_credentials(self, credentials: Credentials) -> None:
        """Use other credentials from now on, instead of those given at first.

        Raises:
            BadRequestError: none were given at first.
        """

    def clock_skew_s(self) -> float | None:
        """How far the store's clock is ahead of ours; None if its answer does not say.

        Raises:
            SourceError: the store did not answer.
        """
