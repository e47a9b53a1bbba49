"""A disk that really hangs: ext4 on a block device whose other end can be stopped.

The block device is a loop device (loop(4)) on the only file of a FUSE filesystem. As long as its
server is stopped, no request to the device is answered: threads wait in the kernel and cannot be
killed, as with a disk that does not answer. Needs root, loop devices and mkfs.ext4.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

NAME = b"disk"
# A process that waits for the disk cannot be killed, so a test could not end.
LONGEST_S = 150.0


class HangingDisk:
    """A mounted filesystem.

    Attributes:
        path: where it is mounted.
        hung_long: it hung for `LONGEST_S`, and answers for that reason: somebody waited for it.
    """

    def __init__(self, path: Path, device: str, server: int) -> None:
        self.path = path
        self._device = device
        self._server = server
        self._ends: threading.Timer | None = None
        self.hung_long = False

    def forget(self) -> None:
        """Have the kernel forget what it has read of it, as after a boot. No file may be open.

        A mount namespace that another test made meanwhile has a copy of the mount: it must end.
        """
        _run("umount", self.path)
        until_s = time.monotonic() + 60
        while any(f" {self._device} " in mounts for mounts in _mounts()):
            assert time.monotonic() < until_s
            time.sleep(0.1)
        _run("mount", self._device, self.path)

    def hang(self) -> None:
        """Answer nothing any more."""
        self._ends = threading.Timer(LONGEST_S, self._answer_at_last)
        self._ends.start()
        os.kill(self._server, signal.SIGSTOP)

    def answer(self) -> None:
        """Answer again."""
        if self._ends is not None:
            self._ends.cancel()
        os.kill(self._server, signal.SIGCONT)

    def _answer_at_last(self) -> None:
        self.hung_long = True
        os.kill(self._server, signal.SIGCONT)


@contextlib.contextmanager
def hanging_disk(directory: Path, size_bytes: int) -> Iterator[HangingDisk]:
    """A disk that answers, until it is told to hang.

    Args:
        directory: for its parts; must exist.

    Raises:
        OSError, subprocess.CalledProcessError: this machine cannot have one.
    """
    if shutil.which("mkfs.ext4") is None or not Path("/dev/loop-control").exists():
        raise OSError("no mkfs.ext4 or no loop devices")
    backing, served, path = directory / "backing", directory / "served", directory / "hanging"
    with open(backing, "wb") as file:
        file.truncate(size_bytes)
    served.mkdir()
    path.mkdir()
    with contextlib.ExitStack() as stack:
        server = subprocess.Popen([sys.executable, __file__, backing, served])
        stack.callback(server.wait)
        stack.callback(server.kill)  # if the disk is in use, it would not end
        stack.callback(_run, "umount", "--lazy", served)
        until_s = time.monotonic() + 20
        while not (served / NAME.decode()).exists():
            if server.poll() is not None or time.monotonic() > until_s:
                raise OSError("its server did not start")
            time.sleep(0.05)
        loop = _run("losetup", "--find", "--show", served / NAME.decode())
        stack.callback(_run, "losetup", "--detach", loop)
        _run("mkfs.ext4", "-q", loop)
        _run("mount", loop, path)
        disk = HangingDisk(path, loop, server.pid)
        stack.callback(_unmount, path)
        stack.callback(disk.answer)
        yield disk


def _mounts() -> Iterator[str]:
    """The mounts that each process sees."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            yield (process / "mountinfo").read_text()


def _unmount(path: Path) -> None:
    """Unmount as soon as processes that were killed while they waited for the disk have ended."""
    until_s = time.monotonic() + 60
    while subprocess.run(["umount", path], check=False, capture_output=True).returncode:
        assert time.monotonic() < until_s
        time.sleep(0.1)


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    return done.stdout.strip()


def serve(backing: str, served: str) -> None:
    """Serve one file, past the page cache, until it is unmounted."""
    import pyfuse3
    import trio

    descriptor = os.open(backing, os.O_RDWR)
    inode = pyfuse3.InodeT(2)

    class Server(pyfuse3.Operations):
        async def getattr(
            self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext | None = None
        ) -> pyfuse3.EntryAttributes:
            entry = pyfuse3.EntryAttributes()
            is_root = inode == pyfuse3.ROOT_INODE
            entry.st_ino = inode
            entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o755 if is_root else stat.S_IFREG | 0o600)
            entry.st_size = 0 if is_root else os.fstat(descriptor).st_size
            return entry

        async def lookup(
            self,
            parent_inode: pyfuse3.InodeT,
            name: pyfuse3.FileNameT,
            ctx: pyfuse3.RequestContext,
        ) -> pyfuse3.EntryAttributes:
            if name != NAME:
                raise pyfuse3.FUSEError(errno.ENOENT)
            return await self.getattr(inode)

        async def open(
            self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
        ) -> pyfuse3.FileInfo:
            return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), direct_io=True)

        async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
            return os.pread(descriptor, size, off)

        async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
            return os.pwrite(descriptor, buf, off)

        async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
            pass

    pyfuse3.init(Server(), served, {"fsname=hanging", *pyfuse3.default_options})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    serve(*sys.argv[1:])
