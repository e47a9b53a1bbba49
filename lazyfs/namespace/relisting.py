"""Checks whether S3 still lists what a mount shows.

The mount itself stays as it is, because it is a snapshot. The answer says whether a new mount of
the source would show something else.
"""

from __future__ import annotations

import os

import trio

from lazyfs.listed_object import File
from lazyfs.namespace.catalog import Catalog
from lazyfs.namespace.listing_log import ListingLog
from lazyfs.namespace.tree import Directory, Node


async def lists_the_same(catalog: Catalog) -> bool:
    """List again what was listed so far, and compare names, sizes and versions.

    Directories that were not listed yet do not count, because no reader has seen them. A source of
    up to 1,000 objects takes one request.

    Raises:
        SourceError: S3 did not answer, refused, or lists nothing any more.
    """
    journal = ListingLog()
    try:
        now = catalog.listed_anew(journal)
        await now.open()
        return await _same(catalog, now)
    finally:
        os.close(journal.descriptor)


async def _same(then: Catalog, now: Catalog) -> bool:
    ahead = [then.tree.root]
    while ahead:
        directory = ahead.pop()
        if directory.children is None:
            continue
        children = await now.children(now.tree.directory(directory.prefix))
        if children.keys() != directory.children.keys():
            return False
        for name, node in directory.children.items():
            if _version(node) != _version(children[name]):
                return False
            if isinstance(node, Directory):
                ahead.append(node)
        # Requests of readers are answered meanwhile.
        await trio.lowlevel.checkpoint()
    return not then.listed_ahead or then.listed_ahead == now.listed_ahead


def _version(node: Node) -> tuple[object, ...]:
    """The version of an object: its ETag, or its size and time if it has none."""
    if isinstance(node, File):
        return node.size_bytes, node.etag, 0 if node.etag else node.modified_ns
    return ()
