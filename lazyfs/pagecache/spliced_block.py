"""The way of a block past our memory: from the socket into the page cache, inside the kernel.

Instead of two copies, into a buffer and out of it, there is one. The bytes are nowhere else then:
so this is for blocks of which nobody waits for a part, and which need not be on the disk now.

Who asks for a part meanwhile has locked its pages until he is answered, and storing them would wait
for him. So a passage can be *called off*: what has not been stored by then comes into memory. Its
thread may be in the kernel, waiting for just such a page; then another one finishes in its place
(`rescue`), with all bytes that were not stored: pipes hold them until they are.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import mmap
import threading
from concurrent.futures import Future
from typing import NamedTuple

from lazyfs.blocks.buffers import take_buffer
from lazyfs.pagecache.page_cache import PageCache, store_header
from lazyfs.pagecache.pipe_pair import PipePair
from lazyfs.store.http import Body

log = logging.getLogger(__name__)

# Of one message to the kernel. A pipe may be full before that, of pages that are not.
PIECE = 512 << 10
# So much is waited for, or the rest. Threads that take less at a time need the interpreter's lock
# so often that the loop hardly gets it, and a quarter more processor time.
AT_ONCE = 256 << 10


class Arrived(NamedTuple):
    """A range of bytes that came.

    Attributes:
        data: with room for all of it.
        passed: so many bytes at its beginning went into the page cache instead; in `data` they
            are not. If all did, `data` is empty.
    """

    data: memoryview
    passed: int = 0


class SplicedBlock:
    """A block on its way into the page cache.

    Args:
        page_cache: where to.
        inode: of the file, which the kernel knows.
        offset: of the block in the file, whole pages.
        length: of the block.
    """

    def __init__(self, page_cache: PageCache, inode: int, offset: int, length: int) -> None:
        self._page_cache = page_cache
        self._inode = inode
        self._offset = offset
        self._length = length
        self._done = 0
        self._lock = threading.Lock()
        self._called_off = False
        self._is_storing = False
        self._rescue: Future[Arrived] | None = None
        self._under_way: tuple[Body, PipePair] | None = None

    def receive(self, body: Body) -> Arrived:
        """Take the block out of an answer.

        Raises:
            OSError, http.client.HTTPException: the connection broke, or was silent.
        """
        try:
            pipes = PipePair() if body.descriptor is not None else None
        except OSError as error:
            log.debug("blocks come into memory: %s", error)
            pipes = None
        if pipes is None:
            return Arrived(body.read(self._length))
        with contextlib.closing(pipes):
            self._under_way = body, pipes
            pipes.put(body.take_buffered())
            while self._done < self._length:
                _fill(pipes, body)
                if not self._store(pipes):
                    return self._rescue.result() if self._rescue else self._keep()
            return Arrived(memoryview(b""), self._done)

    def call_off(self) -> bool:
        """Have what is not stored yet come into memory; whether something is being stored."""
        with self._lock:
            self._called_off = True
            return self._is_storing

    def rescue(self) -> Arrived | None:
        """Receive in the place of a thread that is still storing; None if there is none.

        That thread returns the same.

        Raises:
            OSError, http.client.HTTPException: the connection broke, or was silent.
        """
        with self._lock:
            if not self._is_storing:
                return None
            self._rescue = Future()
        try:
            self._rescue.set_result(self._keep())
        except BaseException as error:
            self._rescue.set_exception(error)  # whatever it is, the other thread waits for it
        return self._rescue.result()

    def _store(self, pipes: PipePair) -> bool:
        """Store whole pages of what has come; False if the rest is to come into memory."""
        size = pipes.held
        if self._done + size < self._length:
            size -= size % mmap.PAGESIZE
        if not size:
            return False
        try:
            pipes.compose(store_header(self._inode, self._offset + self._done, size), size)
        except OSError as error:
            log.debug("the rest of a block comes into memory: %s", error)
            return False
        # From here on a rescue may take out what is held, even before the kernel has the message.
        with self._lock:
            if self._called_off:
                return False
            self._is_storing = True
        stored = self._page_cache.push_held(self._inode, size, pipes)
        with self._lock:
            self._is_storing = False
        if self._rescue:
            return False
        if stored:
            pipes.let_go(size)
            self._done += size
        return stored

    def _keep(self) -> Arrived:
        """Take all that was not stored into memory."""
        assert self._under_way is not None
        body, pipes = self._under_way
        data = take_buffer(self._length)
        held = pipes.read_into(data[self._done :])
        body.read_into(data[self._done + held :])
        return Arrived(data, self._done)


def _fill(pipes: PipePair, body: Body) -> None:
    """Hold a piece, or the rest, or as much as there is room for."""
    assert body.descriptor is not None
    while body.left and pipes.held < PIECE:
        try:
            taken = pipes.take(body.descriptor, min(body.left, PIECE - pipes.held))
        except BlockingIOError:
            if pipes.held and body.is_ready:
                return  # so it is room that lacks
            body.wait(min(body.left, PIECE - pipes.held, AT_ONCE))
            continue
        if taken == 0:
            raise http.client.IncompleteRead(b"", body.left)
        body.took(taken)
