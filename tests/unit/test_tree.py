"""Keys to paths."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lazyfs.listed_object import File, ListedObject
from lazyfs.namespace.tree import Directory, Tree, file_inode, refusal, whole_directories


def listed(*keys: str) -> list[ListedObject]:
    return [ListedObject(key, 3, '"etag"', 10**9, key) for key in keys]


def paths(tree: Tree) -> set[str]:
    return {tree.path(file) for file in tree.files()}


def test_a_whole_listing_becomes_directories() -> None:
    tree = Tree("p/")
    assert tree.plant(tree.root, listed("p/", "p/a", "p/d/e/f", "p/d/g"), whole=True) == []
    assert paths(tree) == {"a", "d/e/f", "d/g"}
    directory = tree.root.children["d"]
    assert isinstance(directory, Directory) and list(directory.children) == ["e", "g"]
    assert (tree.file_count, tree.total_bytes) == (3, 9)


def test_a_listing_of_one_directory_leaves_those_below_unlisted() -> None:
    tree = Tree("")
    assert tree.plant(tree.root, listed("a"), ["d/", "e/"], whole=False) == []
    below = tree.root.children["d"]
    assert isinstance(below, Directory) and below.children is None
    tree.plant(below, listed("d/x"), whole=False)
    assert paths(tree) == {"a", "d/x"}


def test_keys_that_no_path_can_name_are_hidden_with_the_reason() -> None:
    tree = Tree("")
    keys = ["a//b", "./a", "b/../c", "n\0ul", "x" * 256, "fine"]
    hidden = tree.plant(tree.root, listed(*keys), ["ok/", "//", "../"], whole=False)
    assert paths(tree) == {"fine"}
    assert list(tree.root.children) == ["fine", "ok"]
    assert len(hidden) == 7
    assert all(item.reason for item in hidden)


def test_a_directory_hides_an_object_of_its_name() -> None:
    tree = Tree("")
    hidden = tree.plant(tree.root, listed("both", "both/below", "z"), whole=True)
    assert [(item.key, item.reason) for item in hidden] == [
        ("both", "a directory has the same name")
    ]
    assert paths(tree) == {"both/below", "z"}
    assert tree.file_count == 2
    other = Tree("")
    assert len(other.plant(other.root, listed("both"), ["both/"], whole=False)) == 1
    assert paths(other) == set()


def test_inodes_follow_from_the_object() -> None:
    assert file_inode("k", "e", 1) == file_inode("k", "e", 1)
    assert len({file_inode("k", "e", 1), file_inode("k", "f", 1), file_inode("k", "e", 2)}) == 3
    first, second = Tree(""), Tree("")
    first.plant(first.root, listed("a/b", "c"), whole=True)
    second.plant(second.root, listed("c"), ["a/"], whole=False)
    for name in ("a", "c"):
        assert first.root.children[name].inode == second.root.children[name].inode


@given(st.lists(st.text(st.sampled_from("a./\0é"), max_size=8)))
def test_any_keys_make_a_sound_tree(keys: list[str]) -> None:
    tree = Tree("")
    keys = sorted(set(keys))
    hidden = tree.plant(tree.root, listed(*keys), whole=True)
    files = paths(tree)
    markers = {key for key in keys if key.endswith("/") or not key}
    assert files | {item.key for item in hidden} | markers >= set(keys)
    assert not files & {item.key for item in hidden}
    for file in tree.files():
        node, names = file, []
        while node.inode != 1:
            names.append(node.name)
            node = tree.get(node.parent)
            assert isinstance(node, Directory)
        assert "/".join(reversed(names)) == file.key
        assert refusal(file.key) is None
        assert isinstance(tree.get(file.inode), File)


def test_directories_that_a_page_has_from_begin_to_end() -> None:
    page = listed("p/a/1", "p/a/x/2", "p/b", "p/b/", "p/c/3")
    found = whole_directories("p/", page, ended=False)
    assert {name: [each.key for each in below] for name, below in found.items()} == {
        "a": ["p/a/1", "p/a/x/2"],
        "b": ["p/b/"],
    }
    assert list(whole_directories("p/", page, ended=True)) == ["a", "b", "c"]


def test_unordered_keys_complete_no_directory() -> None:
    assert whole_directories("", listed("a/1", "b/1", "a/2"), ended=True) == {}


@given(st.sets(st.text(st.sampled_from("a/-é0"), max_size=6)), st.integers(0, 30))
def test_whole_directories_are_as_if_listed_by_themselves(keys: set[str], size: int) -> None:
    ordered = sorted(keys)
    page, rest = ordered[:size], ordered[size:]
    found = whole_directories("", listed(*page), ended=not rest)
    for name, below in found.items():
        assert [each.key for each in below] == [
            key for key in ordered if key.startswith(f"{name}/")
        ]
    cut = page[-1].partition("/")[0] if page and rest and "/" in page[-1] else None
    assert set(found) == {key.partition("/")[0] for key in page if "/" in key} - {cut}
