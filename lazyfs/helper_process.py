"""Asks for helper processes that use the mount of this worker, which itself must not.

The supervisor starts them (`process/mount_helpers.py`).
"""

from __future__ import annotations

import json
import os
import socket

import trio


class HelperProcesses:
    """The helpers of one mount.

    Args:
        supervisor: a SOCK_SEQPACKET socket.
    """

    def __init__(self, supervisor: socket.socket) -> None:
        self._supervisor = supervisor

    async def run(self, helper: str, wanted: bytes) -> bytes:
        """Run a helper and return what it prints; nothing if it was not started, or failed.

        It may wait for a FUSE answer that only the next worker can give, and cannot be killed until
        then. So a cancelled caller does not wait for it.

        Args:
            helper: its name.
            wanted: the bytes that it reads from its standard input.

        Raises:
            OSError: the supervisor is gone, or is given more requests than it takes.
        """
        theirs_in, ours_out = os.pipe2(os.O_CLOEXEC)
        ours_in, theirs_out = os.pipe2(os.O_CLOEXEC)
        async with trio.lowlevel.FdStream(ours_out) as said, trio.lowlevel.FdStream(ours_in) as got:
            try:
                socket.send_fds(
                    self._supervisor, [json.dumps({"help": helper}).encode()],
                    [theirs_in, theirs_out], socket.MSG_DONTWAIT,
                )  # fmt: skip
            finally:
                os.close(theirs_in)
                os.close(theirs_out)
            try:
                await said.send_all(wanted)
            except trio.BrokenResourceError:  # it was not started, or ended
                return b""
            await said.aclose()
            return b"".join([part async for part in got])
