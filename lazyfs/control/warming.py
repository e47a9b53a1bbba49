"""Fills the cache from a mount, on request at its control socket.

The mount has the credentials, the listing and the options.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import trio

from lazyfs.cache import BlockCache
from lazyfs.control import Route
from lazyfs.errors import BadRequestError, LazyfsError
from lazyfs.faults import report_fault
from lazyfs.namespace.catalog import Catalog
from lazyfs.options.mount_options import MountOptions
from lazyfs.store.protocol import Store

if TYPE_CHECKING:
    from lazyfs.fetch.warm import Warmer

log = logging.getLogger(__name__)


class Warming:
    """Fills the cache once at a time: `start` for `PUT /warm`, `describe` for `GET /warm`.

    Args:
        source: the mount's.
        catalog: the mount's.
        options: the mount's.
        nursery: ends with the mount.
    """

    def __init__(
        self, source: Store, catalog: Catalog, options: MountOptions, nursery: trio.Nursery
    ) -> None:
        self._source = source
        self._catalog = catalog
        self._options = options
        self._nursery = nursery
        self._warmer: Warmer | None = None
        self._is_running = False
        self._error: str | None = None

    def routes(self) -> dict[tuple[str, str], Route]:
        """The requests that it answers on the control socket."""
        return {("GET", "/warm"): lambda _: self.describe(), ("PUT", "/warm"): self.start}

    def start(self, body: dict[str, Any]) -> dict[str, Any]:
        """Start, with `include`, a list of patterns, and `verify`; returns `describe`.

        Raises:
            BadRequestError: the cache is being filled, or the mount has none.
            ValueError: the body is invalid.
        """
        include, verify = body.get("include", []), body.get("verify", False)
        if not isinstance(include, list) or not all(isinstance(one, str) for one in include):
            raise ValueError("include")
        if self._is_running:
            raise BadRequestError(f"{self._source.url}: the cache is being filled already")
        # A cache of its own: claims of the same opened cache do not exclude each other.
        cache = BlockCache.of(self._options, self._source.endpoint, self._source.url.bucket)
        if cache is None:
            raise BadRequestError(f"{self._source.url}: was mounted with --cache-dir none")
        from lazyfs.fetch.warm import Warmer  # most mounts never need it

        self._warmer = Warmer(self._source, self._catalog, cache, self._options)
        self._is_running, self._error = True, None
        self._nursery.start_soon(self._run, self._warmer, tuple(include), bool(verify))
        return self.describe()

    def describe(self) -> dict[str, Any]:
        """The progress, with `state` (idle, running, done, failed) and `error`."""
        if self._warmer is None:
            return {"state": "idle", "error": None}
        state = "running" if self._is_running else "failed" if self._error else "done"
        return {"state": state, "error": self._error, **asdict(self._warmer.progress)}

    async def _run(self, warmer: Warmer, include: tuple[str, ...], verify: bool) -> None:
        try:
            await warmer.run(include, verify=verify)
            log.info("the cache was filled with %d files", warmer.progress.files)
        except LazyfsError as error:
            self._error = str(error)
            log.warning("filling the cache: %s", error)
        except Exception as error:
            self._error = f"a fault of lazyfs ({type(error).__name__}); its log has more"
            report_fault("filling the cache", error)
        finally:
            self._is_running = False
