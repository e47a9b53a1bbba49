"""A FUSE session: started, handed over, resumed.

A session is a descriptor of `/dev/fuse` and the kernel's first message, FUSE_INIT. libfuse gets
neither of them directly: the supervisor mounts and reads FUSE_INIT, and `negotiate` finds libfuse's
answer to it. The worker sends that answer to the kernel (`answer`), with settings that libfuse
leaves at their defaults or does not support: limits, and FUSE_ALLOW_IDMAP, without which pods with
user namespaces cannot use the mount. libfuse itself uses one end of a socket pair (`attach`), and
its answer to FUSE_INIT there is dropped.

So another process can resume a session: it gets the same descriptor and replays FUSE_INIT to its
own libfuse. The kernel ignores a second answer to FUSE_INIT. So it must be the same answer, or
kernel and worker would speak different protocols from then on. The kernel resends the requests
that the former process had taken and not answered (`resend`).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from pathlib import Path

import pyfuse3
import trio

from lazyfs.errors import CannotResumeError
from lazyfs.fuse import mount_syscalls
from lazyfs.fuse.connection import KernelConnection
from lazyfs.fuse.filesystem import Filesystem
from lazyfs.movers.pool import Movers

OPTIONS = {"default_permissions"}
# linux/fuse.h: offsets in FUSE_INIT and in the answer to it, headers included (struct
# fuse_init_in, fuse_init_out). `congestion_threshold` follows `max_background`.
ASKED_FLAGS, ASKED_FLAGS2 = 52, 56
ANSWERED_READ_AHEAD, ANSWERED_FLAGS, ANSWERED_BACKGROUND, ANSWERED_FLAGS2 = 24, 28, 32, 48
# FUSE_ALLOW_IDMAP is 1 << 40, in the second word.
INIT_EXT, ALLOW_IDMAP = 1 << 30, 1 << 8
# With these libfuse moves messages by splice(2), which packet sockets do not support
# (FUSE_SPLICE_WRITE, _MOVE, _READ).
SPLICE = 1 << 7 | 1 << 8 | 1 << 9
# Direct reads with several concurrent requests (FUSE_ASYNC_DIO). For these the kernel sends no
# interrupts for signals to the waiting thread, and an asynchronous read that is answered with fewer
# bytes ends there (`pagecache/direct_reads.py`).
ASYNC_DIRECT = 1 << 15
# Background reads (read-ahead, which includes page faults) that the kernel sends at once. With its
# default of 12, threads that fault at the same time wait for each other, and pushes for them.
MAX_BACKGROUND = 1024


class Session:
    """A mount that this process serves.

    Args:
        mountpoint: an absolute path.
        descriptor: the mount's, of `/dev/fuse`.
        init_message: the kernel's FUSE_INIT.
    """

    def __init__(self, mountpoint: Path, descriptor: int, init_message: bytes) -> None:
        self.mountpoint = mountpoint
        self.descriptor = descriptor
        self.init_message = init_message

    @property
    def device(self) -> str | None:
        """The mount's device number, `major:minor`; None if it was detached while in use."""
        found = mount_syscalls.find_mount(self.mountpoint)
        return found.device if found else None

    @property
    def ended(self) -> bool:
        """Whether the kernel has ended the session: unmounted, or aborted."""
        return mount_syscalls.session_ended(self.descriptor)

    async def negotiate(self) -> bytes:
        """The installed libfuse's answer to this session's FUSE_INIT."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            # libfuse closes its end.
            pyfuse3.init(pyfuse3.Operations(), f"/dev/fd/{theirs.detach()}", OPTIONS)
            try:
                ours.send(self.init_message)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(pyfuse3.main)
                    await trio.lowlevel.wait_readable(ours)
                    pyfuse3.terminate()
                return ours.recv(mount_syscalls.INIT_BUFFER)
            finally:
                pyfuse3.close(unmount=False)

    def answer(self, answer: bytes, read_ahead_bytes: int) -> None:
        """Answer the kernel's FUSE_INIT; no effect if a former worker did.

        Args:
            answer: libfuse's answer.
            read_ahead_bytes: the maximum read-ahead of the kernel.
        """
        message = with_limits(with_idmap(self.init_message, answer), read_ahead_bytes)
        try:
            os.write(self.descriptor, message)
        except OSError as error:
            # ENOENT: it was answered. ENODEV: the session has ended.
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise

    def attach(self, operations: Filesystem, movers: Movers) -> KernelConnection:
        """Give libfuse its socket and our operations; returns the connection to run."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # libfuse closes its end.
        pyfuse3.init(operations, f"/dev/fd/{theirs.detach()}", OPTIONS)
        message = bytearray(self.init_message)
        (flags,) = struct.unpack_from("<I", message, ASKED_FLAGS)
        struct.pack_into("<I", message, ASKED_FLAGS, flags & ~SPLICE)
        ours.send(message)
        return KernelConnection(
            self.descriptor,
            ours,
            operations.read,
            operations.read_arrives,
            operations.answers_empty,
            movers,
        )

    def resend(self) -> None:
        """Have the kernel resend the requests that the former worker had taken and not answered.

        Raises:
            CannotResumeError: this kernel cannot, and waiting readers would wait for ever.
        """
        try:
            os.write(self.descriptor, mount_syscalls.RESEND)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            since = ".".join(map(str, mount_syscalls.RESEND_SINCE))
            raise CannotResumeError(
                f"{self.mountpoint}: this kernel cannot resend requests in flight "
                f"(Linux {since} and newer can): mounting again"
            ) from error

    def close(self) -> None:
        """Close the descriptor. The mount continues if another process holds it."""
        os.close(self.descriptor)


def with_idmap(question: bytes, answer: bytes) -> bytes:
    """The answer to FUSE_INIT, with FUSE_ALLOW_IDMAP if the kernel offers it (since Linux 6.12).

    A mount can then have mapped owners (mount_setattr(2), MOUNT_ATTR_IDMAP), as container runtimes
    set up for pods with a user namespace. The kernel maps the owners; it requires
    `default_permissions`, which all our mounts have.
    """
    flags, flags2 = _words(question, ASKED_FLAGS, ASKED_FLAGS2)
    if not (flags & INIT_EXT and flags2 & ALLOW_IDMAP) or len(answer) < ANSWERED_FLAGS2 + 4:
        return answer
    changed = bytearray(answer)
    flags, flags2 = _words(answer, ANSWERED_FLAGS, ANSWERED_FLAGS2)
    struct.pack_into("=I", changed, ANSWERED_FLAGS, flags | INIT_EXT)
    struct.pack_into("=I", changed, ANSWERED_FLAGS2, flags2 | ALLOW_IDMAP)
    return bytes(changed)


def _words(message: bytes, *offsets: int) -> tuple[int, ...]:
    """Words of 32 bits; 0 for those that the message of an older kernel lacks."""
    padded = message.ljust(max(offsets) + 4, b"\0")
    return tuple(struct.unpack_from("=I", padded, offset)[0] for offset in offsets)


def with_limits(answer: bytes, read_ahead_bytes: int) -> bytes:
    """The answer to FUSE_INIT with limits that suit readers with many threads."""
    message = bytearray(answer)
    (ahead,) = struct.unpack_from("<I", message, ANSWERED_READ_AHEAD)
    struct.pack_into("<I", message, ANSWERED_READ_AHEAD, max(ahead, read_ahead_bytes))
    (flags,) = struct.unpack_from("<I", message, ANSWERED_FLAGS)
    struct.pack_into("<I", message, ANSWERED_FLAGS, flags & ~ASYNC_DIRECT)
    limits = MAX_BACKGROUND, MAX_BACKGROUND * 3 // 4
    struct.pack_into("<HH", message, ANSWERED_BACKGROUND, *limits)
    return bytes(message)
