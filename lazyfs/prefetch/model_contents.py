"""Reads the contents of models that the plan depends on: indexes, and the headers of shards.

Memory is bounded: what takes too much to parse is left out, with a line in the log. Then shards are
read in the order of their names, and prefetched by offset.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import trio

from lazyfs.blocks import Span, spans
from lazyfs.errors import SourceError
from lazyfs.listed_object import File
from lazyfs.model.json_cost import json_cost
from lazyfs.model.safetensors import SUFFIX, MalformedHeaderError, Tensor, parse_header
from lazyfs.options.mount_options import MountOptions
from lazyfs.prefetch.prefetcher import Prefetcher

log = logging.getLogger(__name__)

# Headers that are parsed concurrently: parsing holds the interpreter's lock.
LEARNERS = 2
# The share of the memory limit that parsing one index or header may take.
PARSE_SHARE = 1 / 2
# How many tensors are remembered for each MiB of the limit: each takes 150 bytes.
TENSORS_PER_MIB = 2048


class BlockSource(Protocol):
    """The part of `BlockFetcher` that the planner uses (`lazyfs/fetch/fetcher.py`)."""

    @property
    def block_size(self) -> int:
        """In bytes."""

    def add_file(self, file: File) -> None:
        """A file may be prefetched."""

    async def scan(self, files: Sequence[File]) -> None:
        """Find out which blocks of these files are on the disk."""

    def pump(self) -> None:
        """Start what may be started now."""

    def abandon(self, files: Iterable[File]) -> None:
        """End the requests for blocks of files that no reader waits for."""

    def has_header(self, file: File) -> bool:
        """Whether the header of a shard is on this machine."""

    def is_coming(self, file: File) -> bool:
        """Whether the header of a shard is on its way."""

    async def header(self, file: File) -> memoryview | None:
        """The header of a shard; None: it is too long. Raises SourceError."""

    async def read(self, file: File, span: Span, *, reader: bool = True) -> memoryview:
        """A part of a block. Raises SourceError."""


class ModelContents:
    """Reads indexes and headers, and tells the prefetcher the tensors of shards.

    Args:
        fetcher: reads files.
        prefetcher: is told the tensors.
        options: the policy, and the memory limit.
    """

    def __init__(self, fetcher: BlockSource, prefetcher: Prefetcher, options: MountOptions) -> None:
        self._fetcher = fetcher
        self._prefetcher = prefetcher
        # Whether the policy uses tensors.
        self._wants_tensors = options.prefetch != "headers" or options.tensors is not None
        self._learners = trio.CapacityLimiter(LEARNERS)
        # One header at a time: each may take as much memory as PARSE_SHARE allows.
        self._parsing = trio.CapacityLimiter(1)
        self._parse_bytes = int(options.memory_limit * PARSE_SHARE)
        self._most_tensors = (options.memory_limit >> 20) * TENSORS_PER_MIB
        self._known_tensors = 0

    def may_have_tensors(self, file: File) -> bool:
        """Whether the tensors of a file are needed, not known yet, and can be read now."""
        self._fetcher.add_file(file)
        if not file.name.endswith(SUFFIX) or not self._wants_tensors:
            return False
        # After a worker has been replaced, all of the file may be in the page cache, where the
        # worker cannot read it.
        if self._prefetcher.blocks.is_near(file.inode) and not self._fetcher.has_header(file):
            return False
        # A header that is being fetched is reported when it arrives.
        return not self._prefetcher.knows_tensors(file.inode) and not self._fetcher.is_coming(file)

    async def learn_tensors(self, file: File) -> None:
        """Read a header, and tell the prefetcher the tensors."""
        async with self._learners:
            if not self.may_have_tensors(file):
                return
            try:
                tensors = await self._tensors(file)
            except SourceError:
                return  # logged where it was fetched
            except MalformedHeaderError as error:
                log.warning(
                    "%s: prefetched by offset, because its header is not valid: %s",
                    file.key, error,
                )  # fmt: skip
                tensors = ()
        self._prefetcher.set_tensors(file.inode, tensors)
        self._fetcher.pump()

    async def _tensors(self, file: File) -> Sequence[Tensor]:
        """The tensors of a file; none if they take too much memory.

        Raises:
            SourceError: its header cannot be fetched.
            MalformedHeaderError: its header is not valid.
        """
        if not file.size_bytes:
            raise MalformedHeaderError("the file is empty")
        header = await self._fetcher.header(file)
        if header is None:
            log.info("%s: prefetched by offset, because its header is very long", file.key)
            return ()
        if json_cost(header) > self._parse_bytes:
            log.info("%s: prefetched by offset, because its header takes much memory", file.key)
            return ()
        table = await trio.to_thread.run_sync(
            parse_header, header, file.size_bytes, limiter=self._parsing
        )
        self._known_tensors += len(table.tensors)
        if self._known_tensors > self._most_tensors:
            log.info("%s: prefetched by offset, because there are very many tensors", file.key)
            return ()
        return table.tensors

    async def indexes(self, files: Mapping[str, File]) -> dict[str, bytes]:
        """The contents of index files by path, as far as memory allows parsing them."""
        indexes: dict[str, bytes] = {}
        left = self._parse_bytes
        for path, file in files.items():
            content = await self._content(file) if file.size_bytes <= left else None
            if content is not None and json_cost(content) <= self._parse_bytes:
                indexes[path] = content
                left -= len(content)
            elif content is not None or file.size_bytes > left:
                log.warning(
                    "%s is ignored, because parsing it takes too much of --memory-limit; shards "
                    "are read in the order of their names", file.key,
                )  # fmt: skip
        return indexes

    async def _content(self, file: File) -> bytes | None:
        """The bytes of a file; None if they cannot be read."""
        size, block_size = file.size_bytes, self._fetcher.block_size
        parts = []
        for span in spans(0, size, size, block_size):
            try:
                parts.append(bytes(await self._fetcher.read(file, span, reader=False)))
            except SourceError:
                return None  # logged where it was fetched; its readers get the error
        return b"".join(parts)
