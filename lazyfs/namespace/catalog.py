"""The tree that the mount shows, listed from S3 on first access.

A source of up to 1,000 objects is listed with one request. In a larger source each directory is
listed when it is first accessed, so that a mount of a huge prefix is ready after one request. A
walk through all directories would then need one request for each. So when a directory is accessed
and the one before it is already listed, the request is not for that directory, but for all keys
that follow, at any depth: a page of 1,000 objects. All directories that are complete in this page
count as listed. The same applies to the first page, requested at mount.

In both cases a directory is listed once and then stays the same: the mount is a snapshot.
"""

from __future__ import annotations

import gc
import logging
from collections import defaultdict

import trio

from lazyfs.errors import ObjectGoneError, SourceError, TooManyNamesError
from lazyfs.listed_object import ListedObject
from lazyfs.namespace.listing_log import Listing, ListingLog
from lazyfs.namespace.tree import STEP, Directory, Node, Tree, whole_directories
from lazyfs.observe.recorder import Recorder
from lazyfs.options.mount_options import MountOptions
from lazyfs.steps import in_turn
from lazyfs.store.listing_page import Hidden, Page, Tokens
from lazyfs.store.protocol import Store
from lazyfs.store.retry import patiently

log = logging.getLogger(__name__)

# The memory that names may take: a constant, plus this multiple of the memory limit. A file with a
# usual name takes 600 bytes.
NAMES_BYTES, NAMES_SHARE = 128 << 20, 2
# The log names at most this many hidden keys of a directory.
HIDDEN_SHOWN = 5
# Remember at most this many hidden keys, so that each is named once.
MOST_REMEMBERED = 10_000


class Catalog:
    """The tree of one source.

    Args:
        source: the source to list.
        options: which files are wanted, and how long to wait for S3.
        journal: listings are written to it before they are shown.
        recorder: records requests and retries.
    """

    def __init__(
        self, source: Store, options: MountOptions, journal: ListingLog, recorder: Recorder
    ) -> None:
        self._recorder = recorder
        self._source = source
        self._options = options
        self._journal = journal
        self.tree = Tree(source.url.prefix, options.wants)
        # Only one listing is added at a time.
        self._adding = trio.Lock()
        self._listing: defaultdict[int, trio.Lock] = defaultdict(trio.Lock)
        # The first page, if the source has more objects.
        self._first: list[ListedObject] = []
        # Inodes of directories whose subdirectories cannot be listed together.
        self._scattered: set[int] = set()
        self._hidden: set[str] = set()
        self._names_bytes = 0
        self._most_names_bytes = NAMES_BYTES + NAMES_SHARE * options.memory_limit

    async def open(self) -> None:
        """List the first page, which shows whether there is anything to mount.

        Raises:
            SourceError: nothing is below the prefix, or S3 refuses to list it.
        """
        tokens = Tokens(str(self._source.url))
        page = await self._page(self.tree.root.prefix, None, "")
        hidden = len(page.hidden)
        token = tokens.after(page)
        # A page may be empty without being the last one, after many deleted objects.
        while not page.objects and token is not None:
            page = await self._page(self.tree.root.prefix, token, "")
            hidden += len(page.hidden)
            token = tokens.after(page)
        if not page.objects:
            what = f"{hidden} objects, none of which can be shown" if hidden else "no objects"
            raise ObjectGoneError(
                f"{self._source.url}: {what} below this prefix; check its spelling"
            )
        if page.next_token is None:
            root = self.tree.root
            await self._add(root, Listing(root.prefix, page.objects, [], whole=True))
        else:
            self._first = page.objects

    def restore(self) -> None:
        """Restore the tree that former workers showed, from the journal."""
        for listing in self._journal.read():
            # They were within the limit once, and count against later listings.
            self._names_bytes += self._cost_bytes(listing)
            directory = self.tree.directory(listing.prefix)
            self.tree.plant(directory, listing.objects, listing.prefixes, whole=listing.whole)

    @property
    def listed_ahead(self) -> list[ListedObject]:
        """The first page of a larger source, until its root is listed."""
        return self._first

    def listed_anew(self, journal: ListingLog) -> Catalog:
        """A catalog of the same source that has listed nothing yet."""
        anew = Catalog(self._source, self._options, journal, self._recorder)
        anew._hidden = self._hidden  # each is logged and counted once
        return anew

    async def children(self, directory: Directory) -> dict[str, Node]:
        """The nodes of a directory by name, listed now if it was not listed yet.

        Raises:
            SourceError: S3 did not answer within `--io-timeout`, or refused.
        """
        if directory.children is None:
            async with self._listing[directory.inode]:
                # Another task may have listed it while this one waited for the lock.
                if directory.children is None:
                    await self._list(directory)
            self._listing.pop(directory.inode, None)
        assert directory.children is not None
        return directory.children

    async def _list(self, directory: Directory) -> None:
        if self._follows(directory):
            await self._list_from(directory)
        # Readers may have seen what other tasks listed meanwhile, so those listings stay.
        if directory.children is None:
            listing, cost_bytes = await self._list_alone(directory.prefix)
            if directory.children is None:
                await self._add(directory, listing, cost_bytes)
                while listing.objects:  # to free a million of them at once takes long
                    del listing.objects[-STEP:]
                    await trio.lowlevel.checkpoint()
                if directory is self.tree.root:
                    first, self._first = self._first, []
                    await self._add_whole(directory, first, ended=False)

    def _follows(self, directory: Directory) -> bool:
        """Whether a reader seems to walk the tree: the directory before this one is listed."""
        before: Directory | None = None
        if directory is not self.tree.root and directory.parent not in self._scattered:
            for node in self._parent(directory).in_order():
                if node is directory:
                    return before is not None and before.children is not None
                if isinstance(node, Directory):
                    before = node
        return False

    def _parent(self, directory: Directory) -> Directory:
        parent = self.tree.get(directory.parent)
        assert isinstance(parent, Directory)
        return parent

    async def _list_from(self, directory: Directory) -> None:
        """List this directory and those that follow it, if they are small enough for that."""
        parent = self._parent(directory)
        try:
            page = await self._patient_page(parent.prefix, after=directory.prefix)
        except SourceError as error:
            if error.transient:
                raise
            # Some policies allow only listings by `/`. If that is not the reason, the listing
            # of the directory alone shows it.
            log.info("directories of %r are listed one by one: %s", parent.prefix, error)
        else:
            await self._add_whole(parent, page.objects, ended=page.next_token is None)
        if directory.children is None:
            self._scattered.add(parent.inode)

    async def _add_whole(
        self, parent: Directory, objects: list[ListedObject], *, ended: bool
    ) -> None:
        """Add the directories below that one which are complete in a listing.

        Requests are answered between two directories: all together take 20 ms and more.
        """
        assert parent.children is not None
        for name, below in whole_directories(parent.prefix, objects, ended=ended).items():
            node = parent.children.get(name)
            if isinstance(node, Directory) and node.children is None:
                await self._add(node, Listing(node.prefix, below, [], whole=True))
                await trio.lowlevel.checkpoint()

    async def _list_alone(self, prefix: str) -> tuple[Listing, int]:
        """The listing of a directory, and about how much memory its names take."""
        objects: list[ListedObject] = []
        prefixes: list[str] = []
        coming = 0
        tokens, token = Tokens(self._source.name(prefix)), None
        while True:
            page = await self._patient_page(prefix, token, "/")
            wanted = [listed for listed in page.objects if self.tree.wants(listed.key)]
            coming += self.tree.cost_bytes(self.tree.directory(prefix), wanted, page.prefixes)
            self._check_room(prefix, coming)
            objects += wanted
            prefixes += page.prefixes
            token = tokens.after(page)
            if token is None:
                return Listing(prefix, objects, prefixes, whole=False), coming

    async def _patient_page(
        self, prefix: str, token: str | None = None, delimiter: str = "", after: str = ""
    ) -> Page:
        return await patiently(
            lambda: self._page(prefix, token, delimiter, after),
            what=f"listing of {self._source.name(prefix)}",
            timeout_s=lambda: self._options.io_timeout,
            on_retry=self._recorder.listing_retried,
        )

    async def _page(self, prefix: str, token: str | None, delimiter: str, after: str = "") -> Page:
        began_s = self._recorder.asked("list")
        page: Page | None = None
        try:
            page = await trio.to_thread.run_sync(
                lambda: self._source.list_page(prefix, token, delimiter=delimiter, after=after),
                abandon_on_cancel=True,
            )
        finally:
            self._recorder.answered("list", began_s, key=prefix, failed=page is None)
        self._tell_hidden(page.hidden)
        return page

    def _check_room(self, prefix: str, coming_bytes: int) -> None:
        """Raises TooManyNamesError if the names would take too much memory."""
        if self._names_bytes + coming_bytes > self._most_names_bytes:
            raise TooManyNamesError(
                f"{self._source.name(prefix)}: the names below it take more memory than "
                f"--memory-limit allows ({self.tree.file_count} files are known): mount a longer "
                "prefix, or raise the limit"
            )

    async def _add(
        self, directory: Directory, listing: Listing, cost_bytes: int | None = None
    ) -> None:
        """Show a listing, unless another task has shown one of the directory meanwhile.

        Requests are answered in between: a million names take many seconds.
        """
        async with self._adding:
            if directory.children is not None:
                return
            cost = self._cost_bytes(listing) if cost_bytes is None else cost_bytes
            self._check_room(listing.prefix, cost)
            counts = await in_turn(self._journal.writing(listing), _keep_from_collector)

            def on_whole() -> None:
                counts()
                self._names_bytes += cost

            planting = self.tree.planting(
                directory, listing.objects, listing.prefixes, whole=listing.whole, on_whole=on_whole
            )
            hidden = await in_turn(planting, _keep_from_collector)
            self._tell_hidden(hidden)

    def _cost_bytes(self, listing: Listing) -> int:
        directory = self.tree.directory(listing.prefix)
        return self.tree.cost_bytes(directory, listing.objects, listing.prefixes)

    def _tell_hidden(self, hidden: list[Hidden]) -> None:
        """Log and count hidden keys, each once, however often it is listed."""
        new = [each for each in hidden if each.key not in self._hidden]
        if new:
            if len(self._hidden) < MOST_REMEMBERED:
                self._hidden.update(each.key for each in new)
            self._recorder.hidden_objects += len(new)
            log.warning("%s", _hidden_sentence(new))


def _keep_from_collector() -> None:
    """Names stay as long as the mount: the collector of cycles need not look at a million of them.

    That would take 0.3 s each time.
    """
    gc.freeze()


def _hidden_sentence(hidden: list[Hidden]) -> str:
    shown = "; ".join(f"{item.key!r} ({item.reason})" for item in hidden[:HIDDEN_SHOWN])
    more = f"; and {len(hidden) - HIDDEN_SHOWN} more" if len(hidden) > HIDDEN_SHOWN else ""
    return f"keys that cannot be shown as files: {shown}{more}"
