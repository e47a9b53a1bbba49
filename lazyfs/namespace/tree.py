"""Turns listed keys into directories and files.

Pure: keys in, nodes with stable inode numbers out. The rules, as in `docs/SEMANTICS.md`:

- A key is split at `/`. Its last part is a file, the parts before it are directories.
- A key that ends in `/` is a directory marker: the directory exists, even if it is empty.
- If a name is both, the directory is shown and the object is hidden.
- A key that no path can name is hidden: an empty part, `.` or `..`, a part over 255 bytes, control
  characters, bytes that are not UTF-8.
- An inode number is a hash: of key, ETag and size for a file, of the prefix for a directory. It is
  the same in every mount and after every restart, and a replaced object has another inode.

A directory gets its children once and never changes afterwards; that makes a mount a snapshot.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace

from lazyfs.listed_object import File, ListedObject
from lazyfs.steps import at_once
from lazyfs.store.listing_page import Hidden

ROOT_INODE = 1
NAME_MAX_BYTES = 255
# Objects or prefixes that are planted in one step: about 3 ms.
STEP = 250
SAME_NAME = "a directory has the same name"
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(slots=True)
class Directory:
    """A directory: all keys that begin with `prefix`. `children` is None until it was listed."""

    inode: int
    parent: int
    name: str
    prefix: str
    children: dict[str, Node] | None = field(default=None, repr=False)
    _in_order: tuple[Node, ...] = field(default=(), repr=False)

    def in_order(self) -> tuple[Node, ...]:
        """The children in the order of their keys; sorted once, because readdir reads in parts."""
        if not self._in_order and self.children:
            self._in_order = tuple(self.children.values())
        return self._in_order


Node = File | Directory

# The memory of a node, without its strings (measured on CPython 3.11).
FILE_BYTES, DIRECTORY_BYTES = 400, 600


def file_inode(key: str, etag: str, size_bytes: int) -> int:
    """The inode number of an object: 63 bits, because some tools read it as a signed number."""
    return _inode(f"file\0{key}\0{etag}\0{size_bytes}")


def directory_inode(prefix: str) -> int:
    """The inode number of a directory below the root."""
    return _inode(f"directory\0{prefix}")


def _inode(identity: str) -> int:
    digest = hashlib.blake2b(identity.encode(), digest_size=8).digest()
    # 0 means "none" to FUSE and 1 is the root.
    return (int.from_bytes(digest, "little") >> 1) | 2


def refusal(relative_key: str) -> str | None:
    """Why no path can name this key (without the mount's prefix); None if a path can."""
    for part in relative_key.removesuffix("/").split("/"):
        if not part:
            return "an empty part between slashes"
        if part in (".", ".."):
            return f"a part that is {part!r}"
        if len(part.encode()) > NAME_MAX_BYTES:
            return f"a part over {NAME_MAX_BYTES} bytes"
        if _CONTROL.search(part):
            return "a control character"
    return None


def whole_directories(
    prefix: str, objects: Iterable[ListedObject], *, ended: bool
) -> dict[str, list[ListedObject]]:
    """The directories directly below a prefix that are complete in a listing, by name.

    Args:
        objects: the objects listed below the prefix, at any depth, from the beginning of one of
            its directories on. They must be in the order of their keys.
        ended: no objects follow.
    """
    found: dict[str, list[ListedObject]] = {}
    last_key, last_name = "", None
    for listed in objects:
        if listed.key < last_key:
            return {}
        name, slash, _ = listed.key[len(prefix) :].partition("/")
        if slash:
            found.setdefault(name, []).append(listed)
        last_key, last_name = listed.key, name if slash else None
    if last_name is not None and not ended:
        del found[last_name]
    return found


class Tree:
    """All nodes listed so far.

    Args:
        prefix: the prefix of all keys of the mount; empty or ending in `/`.
        wanted: whether a file is shown, by its path below the root.
    """

    def __init__(self, prefix: str, wanted: Callable[[str], bool] = lambda path: True) -> None:
        self.root = Directory(ROOT_INODE, ROOT_INODE, "", prefix)
        self._wanted = wanted
        self._nodes: dict[int, Node] = {ROOT_INODE: self.root}
        self.file_count = 0
        self.total_bytes = 0

    def get(self, inode: int) -> Node | None:
        """The node of that inode number, if it was listed."""
        return self._nodes.get(inode)

    def cost_bytes(
        self, directory: Directory, objects: Iterable[ListedObject], prefixes: Sequence[str] = ()
    ) -> int:
        """About how much memory `plant` takes for a listing. Keys should be in order.

        A key of 1,024 bytes may have 500 directories, each of which keeps its whole prefix.
        """
        cost = sum(DIRECTORY_BYTES + 2 * len(prefix) for prefix in prefixes)
        above = len(directory.prefix)
        before = ""
        for listed in objects:
            key = listed.key
            if self.wants(key):
                cost += FILE_BYTES + 2 * len(key)
            common = above if not before else _common_length(before, key, above)
            slash = key.find("/", common)
            while slash >= 0:
                cost += DIRECTORY_BYTES + slash
                slash = key.find("/", slash + 1)
            before = key
        return cost

    def wants(self, key: str) -> bool:
        """Whether a file of that key is shown."""
        return self._wanted(key[len(self.root.prefix) :])

    def directory(self, prefix: str) -> Directory:
        """The directory of that prefix, which must have been listed."""
        inode = ROOT_INODE if prefix == self.root.prefix else directory_inode(prefix)
        found = self._nodes[inode]
        assert isinstance(found, Directory)
        return found

    def path(self, node: Node) -> str:
        """The path of a node below the root, without a leading slash."""
        key = node.key if isinstance(node, File) else node.prefix.removesuffix("/")
        return key[len(self.root.prefix) :]

    @property
    def is_whole(self) -> bool:
        """Whether all known directories are listed, so that there are no others."""
        directories = (node for node in self._nodes.values() if isinstance(node, Directory))
        return all(directory.children is not None for directory in directories)

    def files(self) -> Iterable[File]:
        """All files listed so far."""
        return (node for node in self._nodes.values() if isinstance(node, File))

    def plant(
        self,
        directory: Directory,
        objects: Iterable[ListedObject],
        prefixes: Iterable[str] = (),
        *,
        whole: bool,
    ) -> list[Hidden]:
        """Set the children of a directory, once; see `planting`."""
        return at_once(self.planting(directory, objects, prefixes, whole=whole))

    def planting(
        self,
        directory: Directory,
        objects: Iterable[ListedObject],
        prefixes: Iterable[str] = (),
        *,
        whole: bool,
        on_whole: Callable[[], None] = lambda: None,
    ) -> Generator[None, None, list[Hidden]]:
        """Set the children of a directory, once, in short steps, between which others may work.

        The directory has its children from the last step on. If it ends before that, nothing is
        left of it.

        Args:
            directory: a directory without children so far.
            objects: the objects listed below its prefix.
            prefixes: the common prefixes of a listing by `/`.
            whole: the objects are all below it, at any depth, so that its subdirectories are
                complete too; otherwise they are listed on first access.
            on_whole: called in the last step, before the directory has its children.

        Returns:
            The keys that are not shown.
        """
        top = replace(directory, children={})
        planted: list[Node] = []
        hidden: list[Hidden] = []
        count = 0
        is_done = False
        try:
            for listed in objects:
                if reason := self._plant_object(top, listed, whole, planted, hidden):
                    hidden.append(Hidden(listed.shown, reason))
                if (count := count + 1) % STEP == 0:
                    yield
            for prefix in prefixes:
                name = prefix[len(top.prefix) :]
                reason = refusal(name) or self._grow(top, name[:-1], False, planted, hidden)[1]
                if reason:
                    hidden.append(Hidden(prefix, reason))
                if (count := count + 1) % STEP == 0:
                    yield
            on_whole()
            directory.children = top.children
            is_done = True
            return hidden
        finally:
            if not is_done:
                for node in planted:
                    self._remove(node)

    def _plant_object(
        self,
        top: Directory,
        listed: ListedObject,
        whole: bool,
        planted: list[Node],
        hidden: list[Hidden],
    ) -> str | None:
        """Add one object below `top`; returns the reason if it cannot be shown."""
        relative = listed.key[len(top.prefix) :]
        if not relative:
            return None  # the marker of `top` itself
        if reason := refusal(relative):
            return reason
        *parents, name = relative.split("/")
        directory = top
        for part in parents:
            grown, reason = self._grow(directory, part, whole, planted, hidden)
            if grown is None:
                return reason
            directory = grown
        return self._add_file(directory, name, listed, planted) if name else None

    def _grow(
        self,
        parent: Directory,
        name: str,
        whole: bool,
        planted: list[Node],
        hidden: list[Hidden],
    ) -> tuple[Directory | None, str]:
        """The directory `name` of `parent`, created if necessary; or None and the reason."""
        siblings = _children(parent)
        found = siblings.get(name)
        if isinstance(found, Directory):
            return found, ""
        prefix = f"{parent.prefix}{name}/"
        inode = directory_inode(prefix)
        if inode in self._nodes:
            return None, "its inode number is taken"
        if found is not None:
            self._remove(found)
            hidden.append(Hidden(found.key, SAME_NAME))
        directory = Directory(inode, parent.inode, name, prefix, {} if whole else None)
        self._nodes[inode] = siblings[name] = directory
        planted.append(directory)
        return directory, ""

    def _add_file(
        self, parent: Directory, name: str, listed: ListedObject, planted: list[Node]
    ) -> str | None:
        siblings = _children(parent)
        if name in siblings:
            return SAME_NAME
        inode = file_inode(listed.key, listed.etag, listed.size_bytes)
        if inode in self._nodes:
            return "its inode number is taken"
        file = File(
            inode, parent.inode, name, listed.key, listed.size_bytes, listed.etag,
            listed.modified_ns,
        )  # fmt: skip
        if self._wanted(self.path(file)):
            self._nodes[inode] = siblings[name] = file
            self.file_count += 1
            self.total_bytes += file.size_bytes
            planted.append(file)
        return None

    def _remove(self, node: Node) -> None:
        """Remove a node, if it is there."""
        removed = self._nodes.pop(node.inode, None)
        if isinstance(removed, File):
            self.file_count -= 1
            self.total_bytes -= removed.size_bytes


def _common_length(one: str, other: str, start: int) -> int:
    """The length of the common prefix of two texts; `start` letters are known to be equal."""
    least, most = start, min(len(one), len(other))
    while least < most:
        middle = (least + most + 1) // 2
        if one[start:middle] == other[start:middle]:
            least = middle
        else:
            most = middle - 1
    return least


def _children(directory: Directory) -> dict[str, Node]:
    assert directory.children is not None, f"{directory.prefix!r} is not listed yet"
    return directory.children
