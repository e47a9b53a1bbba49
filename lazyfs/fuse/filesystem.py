"""Translates the kernel's requests. Contains no policy.

Every request is answered. An unexpected exception is EIO for that request, and so is a request on
which workers died (`InHand`).

Handles carry no state: a handle is the inode number. So another process can continue where this one
stopped. Names and attributes never change in a mount, so the kernel may cache them for ever.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pyfuse3
from pyfuse3 import EntryAttributes, FileHandleT, FileInfo, FUSEError, InodeT, StatvfsData

from lazyfs import user
from lazyfs.blocks import spans
from lazyfs.errors import SourceError
from lazyfs.faults import contained, report_fault
from lazyfs.fetch.fetcher import BlockFetcher
from lazyfs.handover.pending_requests import InHand
from lazyfs.listed_object import File
from lazyfs.namespace.catalog import Catalog
from lazyfs.namespace.tree import NAME_MAX_BYTES, ROOT_INODE, Directory, Node
from lazyfs.observe.recorder import Recorder
from lazyfs.options.mount_options import MountOptions
from lazyfs.pagecache.direct_reads import DirectReads

log = logging.getLogger(__name__)

# How long the kernel may cache names and attributes: practically for ever.
REMEMBER_S = 30 * 86400.0
READ_UNIT = 1 << 20
_KEY, _ETAG, _CACHED = b"user.lazyfs.key", b"user.lazyfs.etag", b"user.lazyfs.cached"


class Filesystem(pyfuse3.Operations):
    """One mount, as the kernel sees it.

    Args:
        catalog: maps names to nodes.
        fetcher: reads the bytes of nodes.
        options: for owner and modes.
        mounted_ns: the time of directories.
        on_init: called once, when libfuse has received the kernel's first message.
        on_open: called with each opened file.
        recorder: is told of opened and closed files.
        in_hand: records requests until they are answered.
        direct: says what becomes of direct reads.
    """

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(
        self,
        catalog: Catalog,
        fetcher: BlockFetcher,
        options: MountOptions,
        mounted_ns: int,
        on_init: Callable[[], None],
        on_open: Callable[[File], None],
        recorder: Recorder,
        in_hand: InHand,
        direct: DirectReads,
    ) -> None:
        super().__init__()
        self.in_hand = in_hand
        self._catalog = catalog
        self._tree = catalog.tree
        self._fetcher = fetcher
        self._options = options
        self._uid = user.uid() if options.uid is None else options.uid
        self._gid = user.gid() if options.gid is None else options.gid
        self._mounted_ns = mounted_ns
        self._on_init = on_init
        self._on_open = on_open
        self._recorder = recorder
        self.direct = direct
        # How often each inode was given to the kernel, minus how often the kernel forgot it.
        self._lookups: Counter[int] = Counter()
        self.reads = 0

    def init(self) -> None:
        self._on_init()

    def remember_all(self) -> None:
        """Count every file as known to the kernel: a former worker may have given it each one."""
        for file in self._tree.files():
            self._fetcher.set_known(file, True)

    async def lookup(
        self, parent_inode: InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        directory = self._directory(parent_inode)
        if name == b".":
            return self._known(directory)
        if name == b"..":
            return self._known(self._directory(InodeT(directory.parent)))
        if len(name) > NAME_MAX_BYTES:
            raise FUSEError(errno.ENAMETOOLONG)
        children = await self._children(directory)
        node = children.get(name.decode(errors="surrogateescape"))
        if node is None:
            # Inode 0: "no such name", which the kernel may cache as well.
            nothing = EntryAttributes()
            nothing.st_ino = InodeT(0)
            nothing.entry_timeout = REMEMBER_S
            return nothing
        return self._known(node)

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for inode, count in inode_list:
            self._lookups[inode] -= count
            if self._lookups[inode] <= 0:
                del self._lookups[inode]
                node = self._tree.get(inode)
                if isinstance(node, File):
                    self._fetcher.set_known(node, False)

    async def getattr(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        return self._attributes(self._node(inode))

    async def opendir(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> FileHandleT:
        self._directory(inode)
        return FileHandleT(inode)

    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        directory = self._directory(InodeT(fh))
        await self._children(directory)
        nodes = directory.in_order()  # not sliced: it is read in thousands of parts
        for position in range(start_id, len(nodes)):
            node = nodes[position]
            attributes = self._attributes(node)
            if not pyfuse3.readdir_reply(token, node.name.encode(), attributes, position + 1):
                return
            self._known(node)

    async def open(self, inode: InodeT, flags: int, ctx: pyfuse3.RequestContext) -> FileInfo:
        file = self._file(inode)
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise FUSEError(errno.EROFS)
        is_direct = bool(flags & os.O_DIRECT)
        self._fetcher.opened(file, direct=is_direct and self.direct.continued is False)
        self._on_open(file)
        self._recorder.opened(file, ctx.pid, direct=is_direct)
        # An inode's bytes never change, so its pages stay valid from one open to the next.
        return FileInfo(fh=FileHandleT(inode), keep_cache=True)

    def answers_empty(self, handle: FileHandleT, offset: int, size: int, flags: int) -> bool:
        """Whether a direct read is answered with no bytes: see `DirectReads`.

        Args:
            flags: with which the file was opened.
        """
        file = self._tree.get(handle)
        if not isinstance(file, File):
            return False
        if self.direct.answers_empty(file, offset, flags):
            self._fetcher.was_read(file, offset, size)
            return True
        if self.direct.continued is False:
            self._fetcher.is_read_directly(file)
        return False

    def read_arrives(self, handle: FileHandleT, offset: int, size: int) -> None:
        """A read came; `read` will serve it. The order of these calls is that of the kernel."""
        file = self._tree.get(handle)
        if isinstance(file, File):
            self._fetcher.was_read(file, offset, size)

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        file = self._file(InodeT(fh))
        self.reads += 1
        parts: list[memoryview] = []
        for span in spans(off, size, file.size_bytes, self._options.block_size):
            try:
                part = await self._fetcher.read(file, span)
            except SourceError as error:
                raise FUSEError(error.errno) from error
            if len(part) != span.stop - span.start:
                # The kernel would take it for the end of the file: SIGBUS for its mappings.
                log.error("%s at %d: a block is shorter than it should be", file.key, off)
                raise FUSEError(errno.EIO)
            if len(part) == size:
                return part  # type: ignore[return-value] # pyfuse3 takes any buffer
            parts.append(part)
        return b"".join(parts)

    async def release(self, fh: FileHandleT) -> None:
        self._recorder.closed(self._file(InodeT(fh)))

    async def releasedir(self, fh: FileHandleT) -> None:
        pass

    async def flush(self, fh: FileHandleT) -> None:
        pass

    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        pass

    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        pass

    async def statfs(self, ctx: pyfuse3.RequestContext) -> StatvfsData:
        status = StatvfsData()
        status.f_bsize = READ_UNIT
        status.f_frsize = 512
        status.f_blocks = -(-self._tree.total_bytes // 512)
        status.f_bfree = status.f_bavail = 0
        status.f_files = self._tree.file_count
        status.f_ffree = status.f_favail = 0
        status.f_namemax = NAME_MAX_BYTES
        return status

    async def getxattr(self, inode: InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        node = self._node(inode)
        if isinstance(node, File):
            if name == _KEY:
                return node.key.encode()
            if name == _ETAG:
                return node.etag.strip('"').encode()
            if name == _CACHED:
                return f"{await self._fetcher.cached_bytes(node)}/{node.size_bytes}".encode()
        elif name == _KEY:
            return node.prefix.encode()
        raise FUSEError(errno.ENODATA)

    async def listxattr(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        # The number of cached bytes changes by itself and is no property of the file: programs that
        # copy listed attributes (rsync -X, cp -a, tar) would fail or copy it. Reads by name work.
        return [_KEY, _ETAG] if isinstance(self._node(inode), File) else [_KEY]

    async def _children(self, directory: Directory) -> dict[str, Node]:
        try:
            return await self._catalog.children(directory)
        except SourceError as error:
            log.error("listing of %r: %s", directory.prefix, error)
            raise FUSEError(error.errno) from error

    def _known(self, node: Node) -> EntryAttributes:
        """The attributes of a node, which the kernel knows from this reply on."""
        self._lookups[node.inode] += 1
        if isinstance(node, File) and self._lookups[node.inode] == 1:
            self._fetcher.set_known(node, True)
        return self._attributes(node)

    def _attributes(self, node: Node) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = InodeT(node.inode)
        entry.generation = 0
        entry.entry_timeout = entry.attr_timeout = REMEMBER_S
        entry.st_uid, entry.st_gid = self._uid, self._gid
        entry.st_blksize = READ_UNIT
        # 1: "not counted", so that tools do not infer the number of subdirectories from it.
        entry.st_nlink = 1
        if isinstance(node, File):
            entry.st_mode = stat.S_IFREG | self._options.file_mode
            entry.st_size = node.size_bytes
            entry.st_blocks = -(-node.size_bytes // 512)
            modified_ns = node.modified_ns
        else:
            entry.st_mode = stat.S_IFDIR | self._options.dir_mode
            modified_ns = self._mounted_ns
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = modified_ns
        return entry

    def _node(self, inode: InodeT) -> Node:
        node = self._tree.get(inode)
        if node is None:
            raise FUSEError(errno.ESTALE)
        return node

    def _file(self, inode: InodeT) -> File:
        node = self._node(inode)
        if isinstance(node, Directory):
            raise FUSEError(errno.EISDIR)
        return node

    def _directory(self, inode: InodeT) -> Directory:
        node = self._node(inode)
        if isinstance(node, File):
            raise FUSEError(errno.ENOTDIR)
        return node


async def _refuse(*arguments: object) -> None:
    """The answer to all requests that would write."""
    raise FUSEError(errno.EROFS)


for _operation in (
    "create",
    "link",
    "mkdir",
    "mknod",
    "removexattr",
    "rename",
    "rmdir",
    "setattr",
    "setxattr",
    "symlink",
    "unlink",
    "write",
):
    setattr(Filesystem, _operation, staticmethod(_refuse))


def _answered(number: int, name: str) -> None:
    """Make an operation always answer, and record meanwhile that it is in hand."""
    operation = getattr(Filesystem, name)

    @functools.wraps(operation)
    async def answer(self: Filesystem, *arguments: Any) -> Any:
        inode = arguments[0] if name != "statfs" else ROOT_INODE
        detail = _DETAILS[name](arguments[1]) if name in _DETAILS else 0
        slot = self.in_hand.take(number, inode, detail)
        if slot is None:
            log.error("%s of inode %d: EIO: workers died on this request", name, inode)
            raise FUSEError(errno.EIO)
        try:
            return await operation(self, *arguments)
        except FUSEError:
            raise
        except Exception as error:
            report_fault(f"{name} of a file or directory", error)
            raise FUSEError(errno.EIO) from error
        finally:
            self.in_hand.answered(slot)

    setattr(Filesystem, name, answer)


async def _forget(
    self: Filesystem,
    inode_list: Sequence[tuple[InodeT, int]],
    forget: Callable[..., Awaitable[None]] = Filesystem.forget,
) -> None:
    """The only message of the kernel without an answer."""
    await contained("forget", forget, self, inode_list)


# Distinguishes requests of the same operation and inode.
_DETAILS: dict[str, Callable[[Any], int]] = {
    "lookup": zlib.crc32, "getxattr": zlib.crc32, "read": int, "readdir": int,
}  # fmt: skip
# The numbers are kept with the session, so they must not change.
for _number, _operation in enumerate((
    "lookup", "getattr", "opendir", "readdir", "open", "read", "release", "statfs", "getxattr",
    "listxattr",
)):  # fmt: skip
    _answered(_number, _operation)
Filesystem.forget = _forget  # type: ignore[method-assign]

assert ROOT_INODE == pyfuse3.ROOT_INODE
