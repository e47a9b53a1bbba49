"""The conversation with the kernel: begun, handed over, taken up again.

The kernel's side of a mount is a descriptor of `/dev/fuse` and one message, FUSE_INIT, which opens
the conversation. Here both are kept apart from libfuse: the supervisor mounts and reads FUSE_INIT,
and the worker lets libfuse begin on one end of a socket pair into which that message is sent. In
the moment in which libfuse has taken it, the kernel's descriptor is put in the place of the socket
(`adopt`).

So a session can go on in another process, which gets the same descriptor and plays the same
beginning to its own libfuse. The kernel is beyond that point: it ignores the second answer to
FUSE_INIT. It must therefore be the same answer, or the two would speak different dialects from then
on; `negotiate` finds out what libfuse answers before anything is at stake. What the former process
had taken and not answered is asked for again (`resend`).

The first answer is sent by us as well (`answer`): libfuse's, and one flag that libfuse does not
know, FUSE_ALLOW_IDMAP, without which pods with user namespaces cannot have the mount.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
from pathlib import Path

import pyfuse3
import trio

from lazyfs.errors import CannotResumeError
from lazyfs.fuse import mount_syscalls

log = logging.getLogger(__name__)

# linux/fuse.h: struct fuse_out_header with FUSE_NOTIFY_RESEND in the place of an error.
RESEND = struct.pack("<IiQ", 16, 7, 0)
OPTIONS = {"default_permissions"}
# Where the flags are in FUSE_INIT and in the answer to it, headers included (struct fuse_init_in,
# fuse_init_out), and two of them; FUSE_ALLOW_IDMAP is 1 << 40, in the second word.
ASKED_FLAGS, ASKED_FLAGS2, ANSWERED_FLAGS, ANSWERED_FLAGS2 = 52, 56, 28, 48
INIT_EXT, ALLOW_IDMAP = 1 << 30, 1 << 8


class Session:
    """A mount that this process serves.

    Args:
        mountpoint: an absolute path.
        descriptor: of `/dev/fuse`, mounted there.
        init_message: the kernel's FUSE_INIT.
    """

    def __init__(self, mountpoint: Path, descriptor: int, init_message: bytes) -> None:
        self.mountpoint = mountpoint
        self.descriptor = descriptor
        self.init_message = init_message
        self._ours: socket.socket | None = None
        self._theirs: int | None = None

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
        """What libfuse, as it is installed now, answers to this session's FUSE_INIT."""
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

    def answer(self, answer: bytes) -> None:
        """Answer the kernel's FUSE_INIT with what libfuse answers, and allow idmapped mounts."""
        os.write(self.descriptor, with_idmap(self.init_message, answer))

    def attach(self, operations: pyfuse3.Operations) -> None:
        """Give the session to libfuse; its `init` must call `adopt`."""
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._theirs = theirs.detach()  # libfuse closes it
        pyfuse3.init(operations, f"/dev/fd/{self._theirs}", OPTIONS)
        logging.getLogger("pyfuse3").addFilter(self._is_news)
        self._ours.send(self.init_message)

    def adopt(self) -> None:
        """Put the kernel in the place of the socket from which libfuse has read FUSE_INIT."""
        assert self._ours is not None and self._theirs is not None
        os.dup2(self.descriptor, self._theirs)
        self._ours.close()

    def _is_news(self, record: logging.LogRecord) -> bool:
        """Not that an answer found nobody who waits for it, when the session has ended."""
        return record.args != (os.strerror(errno.ENOENT),) or not self.ended

    def resend(self) -> None:
        """Have the kernel ask again for what the former daemon had taken and not answered.

        Raises:
            CannotResumeError: this kernel cannot; those who wait would wait for ever.
        """
        try:
            os.write(self.descriptor, RESEND)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            since = ".".join(map(str, mount_syscalls.RESEND_SINCE))
            raise CannotResumeError(
                f"{self.mountpoint}: this kernel cannot ask again for what was in flight "
                f"(it can since Linux {since}): mounting anew"
            ) from error

    def close(self) -> None:
        """Let go of the descriptor. The mount goes on if somebody else holds it."""
        os.close(self.descriptor)


def with_idmap(question: bytes, answer: bytes) -> bytes:
    """The answer to FUSE_INIT, with FUSE_ALLOW_IDMAP if the kernel offers it (since Linux 6.12).

    A mount can then be shown with other owners (mount_setattr(2), MOUNT_ATTR_IDMAP), as container
    runtimes do for pods with a user namespace. The kernel maps the owners; it asks for
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
    """Words of 32 bits; 0 where the message of an older kernel ends before."""
    padded = message.ljust(max(offsets) + 4, b"\0")
    return tuple(struct.unpack_from("=I", padded, offset)[0] for offset in offsets)
