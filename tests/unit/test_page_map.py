"""What lies in the page cache is known to the next worker, whenever the former one was killed."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from lazyfs.blocks import block_count
from lazyfs.blocks.file_blocks import Place
from lazyfs.handover.handover import new_near
from lazyfs.listed_object import File, ListedObject
from lazyfs.namespace.tree import Tree
from lazyfs.pagecache.page_map import PageMap

BLOCK = 10
SIZES = {"a": 35, "b": 1, "c": 4000, "empty": 0}


def tree_of(sizes: dict[str, int], etag: str = "1") -> Tree:
    tree = Tree("")
    tree.plant(
        tree.root,
        [ListedObject(key, size, etag, 0, key) for key, size in sizes.items()],
        whole=True,
    )
    return tree


def files_of(tree: Tree) -> dict[str, File]:
    return {file.key: file for file in tree.files()}


def known(descriptor: int, tree: Tree, block_size: int = BLOCK) -> dict[tuple[str, int], Place]:
    """What a successor finds."""
    near = PageMap(descriptor, block_size).read(tree)
    return {(file.key, block.number): place for file, block, place in near}


keys = st.sampled_from([key for key, size in SIZES.items() if size])
moves = st.lists(st.tuples(keys, st.integers(0, 399), st.sampled_from(Place)), max_size=30)


@given(moves, st.integers(0, 500), moves)
def test_truncated_marks_are_unknown_and_later_ones_are_known(
    before: list[tuple[str, int, Place]], cut: int, after: list[tuple[str, int, Place]]
) -> None:
    tree = tree_of(SIZES)
    files = files_of(tree)
    descriptor = new_near()
    expected: dict[tuple[str, int], Place] = {}

    def write(near: PageMap, moves: list[tuple[str, int, Place]]) -> None:
        for key, number, place in moves:
            number %= block_count(SIZES[key], BLOCK)
            near.write(files[key], number, place)
            expected[key, number] = place

    write(PageMap(descriptor, BLOCK), before)
    there = {at: place for at, place in expected.items() if place in (Place.NEAR, Place.USED)}
    assert known(descriptor, tree) == there
    os.ftruncate(descriptor, max(0, os.fstat(descriptor).st_size - cut))
    successor = PageMap(descriptor, BLOCK)
    left = {(file.key, block.number): place for file, block, place in successor.read(tree)}
    assert left.items() <= there.items()
    expected = dict(left)
    write(successor, after)
    there = {at: place for at, place in expected.items() if place in (Place.NEAR, Place.USED)}
    assert known(descriptor, tree) == there
    os.close(descriptor)


def test_other_bytes_stay_unknown() -> None:
    descriptor = new_near()
    near = PageMap(descriptor, BLOCK)
    for file in files_of(tree_of(SIZES)).values():
        near.write(file, 0, Place.NEAR)
    replaced = tree_of(SIZES, etag="2")
    assert known(descriptor, replaced) == {}
    assert known(descriptor, tree_of({"b": 1})) == {("b", 0): Place.NEAR}
    assert known(descriptor, tree_of(SIZES), block_size=2 * BLOCK) == {}
    assert known(descriptor, tree_of(SIZES)) == {}, "it began anew with the other size"
    os.close(descriptor)
