"""A pair of pipes through which bytes go from a socket to the kernel's FUSE without being copied.

A pipe holds references to pages: `splice` puts the pages there that the network brought, and what
is written to `/dev/fuse` out of a pipe is copied once, from those pages into the page cache. A
message to FUSE needs its header in front and its length in the header, before it is known how much
will have come. So one pipe collects what comes, and the other one gets the header and, by `tee`,
references to what the first one holds: that stays there until the kernel has it.

splice(2), tee(2), pipe(7).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os

# A pipe of so many pages, if we may have it; without privileges a user has 64 MiB of them at most.
_WANTED_BYTES = 1 << 20
# With less than this a message is so short that it costs more than it saves.
_LEAST_BYTES = 128 << 10

# Called without letting go of the interpreter's lock: to get it back takes longer than they do.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.tee.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint]
_libc.tee.restype = ctypes.c_ssize_t
_libc.splice.argtypes = [
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint,
]  # fmt: skip
_libc.splice.restype = ctypes.c_ssize_t
_libc.write.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t]
_libc.write.restype = ctypes.c_ssize_t


class PipePair:
    """What has come of a body, and messages that are made of it. For one thread at a time, but
    while one sends a message, another one may read what is held.

    Attributes:
        held: how many bytes have come and were not let go.

    Raises:
        OSError: pipes of a useful size are not to be had.
    """

    def __init__(self) -> None:
        self.held = 0
        self._message_size = 0
        self._descriptors = [os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)]
        self._nowhere = self._descriptors[0]
        try:
            self._held_out, self._held_in = self._pair()
            self._message_out, self._message_in = self._pair()
            size = _resize(self._message_in, _WANTED_BYTES)
            if size < _LEAST_BYTES:
                raise OSError(errno.EMFILE, "this user's pipes take up too much memory")
            # So that all that is held fits into a message, behind its header.
            _resize(self._held_in, size // 2)
        except OSError:
            self.close()
            raise

    def _pair(self) -> tuple[int, int]:
        pair = os.pipe2(os.O_CLOEXEC)
        self._descriptors += pair
        return pair

    def close(self) -> None:
        """Give them back to the system."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    def put(self, data: bytes) -> None:
        """Hold some kilobytes that were read already."""
        if data:
            self.held += os.write(self._held_in, data)

    def take(self, descriptor: int, count: int) -> int:
        """Hold up to `count` bytes more out of a socket, which does not block; 0: at its end.

        Raises:
            BlockingIOError: there are none now, or no more can be held.
            OSError: the connection broke.
        """
        taken: int = _libc.splice(
            descriptor, None, self._held_in, None, count, os.SPLICE_F_NONBLOCK
        )
        if taken < 0:
            raise _error()
        self.held += taken
        return taken

    def compose(self, header: bytes, count: int) -> None:
        """Make a message of a header and the first `count` bytes held; they stay held.

        Never waits: it would, with the interpreter's lock, for what somebody else had taken out.

        Raises:
            OSError: it cannot be made. Then these pipes are good for reading only.
        """
        _whole(_libc.write(self._message_in, header, len(header)), len(header))
        _whole(_libc.tee(self._held_out, self._message_in, count, os.SPLICE_F_NONBLOCK), count)
        self._message_size = len(header) + count

    def send(self, device: int) -> None:
        """Send the message to FUSE. What is held may be read meanwhile, by another thread.

        Waits while somebody has locked one of the pages.

        Raises:
            OSError: the kernel did not take it. Then these pipes are good for reading only.
        """
        size = self._message_size
        _whole(os.splice(self._message_out, device, size), size)

    def let_go(self, count: int) -> None:
        """Hold the first `count` bytes no more."""
        self.held -= count
        gone = _libc.splice(self._held_out, None, self._nowhere, None, count, os.SPLICE_F_NONBLOCK)
        _whole(gone, count)

    def read_into(self, into: memoryview) -> int:
        """Copy all that is held to the beginning of a buffer, and hold it no more; how much."""
        count, done = self.held, 0
        while done < count:
            done += os.readv(self._held_out, [into[done:count]])
        self.held = 0
        return count


def _whole(done: int, wanted: int) -> None:
    """Raises OSError unless a call has done all that it was to do."""
    if done < 0:
        raise _error()
    if done != wanted:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def _error() -> OSError:
    """Why the last call failed."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def _resize(pipe: int, size: int) -> int:
    """Have a pipe take so many bytes, or leave it as it is where that is not permitted."""
    try:
        return fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, size)
    except PermissionError:
        return fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ)
