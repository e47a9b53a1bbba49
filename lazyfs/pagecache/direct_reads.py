"""Sends direct reads (O_DIRECT) into the page cache, where the bytes are.

A direct read bypasses the page cache: what was put there ahead of the reader would be read from the
disk again, and copied by this process. But if a direct read returns fewer bytes than it asked for,
Linux reads the rest through the page cache (mm/filemap.c, `generic_file_read_iter`: "Otherwise
fallthrough to buffered io for the rest of the read"). So each direct read is answered with no
bytes, and its reader gets them from the page cache, or by ordinary requests where pages are
missing.

That is how all versions of Linux read so far, but it is promised nowhere, and a kernel that did
otherwise would show an empty file. So before the first direct read is answered in this way, a
helper process tries it (`direct_probe.py`): with preadv(2), and with io_submit(2), for which it
only works if the kernel was not told to send parts of a read concurrently (`session.py`,
ASYNC_DIRECT). Until then, and where it does not work, direct reads are answered with their bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from lazyfs.errors import SourceError
from lazyfs.helper_process import HelperProcesses
from lazyfs.listed_object import File
from lazyfs.pagecache.direct_probe import PROBE_FLAGS, SIZE, YES

log = logging.getLogger(__name__)


class DirectReads:
    """The direct reads of one mount.

    Args:
        path: returns the path of a file below the mountpoint.
        helpers: starts the helper process.
        fetch: waits until a byte of a file is on this machine. Raises SourceError.
        enabled: whether the page cache may be used.

    Attributes:
        continued: whether the kernel continues direct reads in the page cache; None: not known yet.
    """

    def __init__(
        self,
        path: Callable[[File], str],
        helpers: HelperProcesses,
        fetch: Callable[[File, int], Awaitable[object]],
        *,
        enabled: bool,
    ) -> None:
        self._path = path
        self._helpers = helpers
        self._fetch = fetch
        self._asked: tuple[File, int] | None = None
        self._ask = trio.Event()
        self.continued: bool | None = None if enabled else False

    def answers_empty(self, file: File, offset: int, flags: int) -> bool:
        """Whether a direct read is answered with no bytes, so that the kernel continues it.

        Args:
            flags: with which the file was opened.
        """
        if self.continued is None:
            if flags & PROBE_FLAGS == PROBE_FLAGS:
                return True
            if offset < file.size_bytes:  # at the end there is nothing to try
                self._asked = file, offset
                self._ask.set()
        return bool(self.continued)

    async def run(self) -> None:
        """Find out what the kernel does, when the first direct read has come."""
        while self.continued is None:
            await self._ask.wait()
            self._ask = trio.Event()
            assert self._asked is not None
            file, offset = self._asked
            try:
                # The helper must not wait for S3: nobody could unmount meanwhile.
                await self._fetch(file, offset)
            except SourceError:
                continue  # its reader gets the error
            said = await self._probe(file, offset)
            self.continued = said == YES
            if self.continued:
                log.info("direct reads use the page cache")
            else:
                reason = said.decode(errors="replace").strip() or "the test did not run"
                log.info("direct reads do not use the page cache: %s", reason)

    async def _probe(self, file: File, offset: int) -> bytes:
        length = min(SIZE, file.size_bytes - offset)
        wanted = f"{file.inode} {offset} {length} {self._path(file)}"
        try:
            return await self._helpers.run("direct", wanted.encode(errors="surrogateescape"))
        except OSError as error:
            return str(error).encode()
