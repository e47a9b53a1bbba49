"""The block files of a directory: their names, and what is told of them without reading them."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from lazyfs.blocks.buffers import take_buffer
from lazyfs.cache.block_files import BlockFiles, Described, new_name
from lazyfs.cache.block_format import Content, DamagedBlockError, running_sums
from lazyfs.cache.index import FOLDERS, IndexCorruptError

CONTENT = Content("http://s3", "b", "m/a", '"1"', 10_005, 5000)
NAME, OTHER, THIRD = (f"{digit}0/{digit * 30}" for digit in "0a7")


@pytest.fixture
def files(tmp_path: Path) -> BlockFiles:
    made = BlockFiles(tmp_path)
    made.make_folders()
    return made


def block(number: int, content: Content = CONTENT) -> memoryview:
    data = take_buffer(content.length(number))
    data[:] = bytes([number + 1]) * len(data)
    return data


def write(files: BlockFiles, name: str, number: int, content: Content = CONTENT) -> None:
    written = files.write_all([(name, content, number, block(number, content))])
    assert written == ([running_sums(block(number, content))], None)


def test_folders_are_made_for_all_names_and_may_be_there(tmp_path: Path) -> None:
    files = BlockFiles(tmp_path)
    (tmp_path / FOLDERS[3]).mkdir()
    for _ in range(2):
        files.make_folders()
        made = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
        assert sorted(made) == sorted(FOLDERS)
        assert all(mode == 0o700 for name, mode in made.items() if name != FOLDERS[3])
    assert all(files.path(new_name()).parent.is_dir() for _ in range(100))


def test_new_names_are_names_of_block_files_and_never_the_same(files: BlockFiles) -> None:
    names = {new_name() for _ in range(1000)}
    assert len(names) == 1000
    assert {name[:3] for name in names} == {f"{folder}/" for folder in FOLDERS}
    assert len({name[3:5] for name in names}) > 200, "the rest is random as well"
    assert {len(files.path(name).name) for name in names} == {30}


@pytest.mark.parametrize(
    "name",
    ["", "cache.db", "../00/" + "a" * 30, "00/../" + "a" * 27, "/etc/passwd", "00/" + "a" * 29,
     "00/" + "a" * 31, "00/" + "A" * 30, "0g/" + "a" * 30, "00/" + "a" * 30 + "\n",
     "00//" + "a" * 29, "000/" + "a" * 30, "x00/" + "a" * 30],
)  # fmt: skip
def test_other_names_lead_to_no_file(files: BlockFiles, name: str) -> None:
    for use in (
        lambda: files.path(name),
        lambda: files.read(name, CONTENT, 0),
        lambda: files.write_all([(name, CONTENT, 0, block(0))]),
        lambda: files.describe(name),
        lambda: files.remove([name]),
    ):
        with pytest.raises(IndexCorruptError, match="invalid files"):
            use()


def test_only_block_files_are_listed(files: BlockFiles, tmp_path: Path) -> None:
    write(files, NAME, 0)
    write(files, OTHER, 1)
    (tmp_path / "00" / "notes").touch()
    (tmp_path / "00" / ("b" * 31)).touch()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / ("b" * 30)).touch()
    (tmp_path / "000").mkdir()
    (tmp_path / "000" / ("b" * 30)).touch()
    (tmp_path / "cache.db").touch()
    assert sorted(files.names()) == [NAME, OTHER]


def test_blocks_are_read_under_the_names_they_were_written(files: BlockFiles) -> None:
    blocks = [(NAME, CONTENT, 0, block(0)), (OTHER, CONTENT, 2, block(2))]
    assert files.write_all(blocks) == ([running_sums(data) for *_, data in blocks], None)
    assert files.read(NAME, CONTENT, 0) == block(0)
    assert files.read(OTHER, CONTENT, 2) == block(2)
    with pytest.raises(DamagedBlockError):
        files.read(OTHER, CONTENT, 0)
    with pytest.raises(FileNotFoundError):
        files.read(THIRD, CONTENT, 1)


@pytest.mark.parametrize(
    ("content", "number"),
    [
        (CONTENT, 0),
        (CONTENT, 2),
        (dataclasses.replace(CONTENT, size_bytes=1, block_size=1), 0),
        (dataclasses.replace(CONTENT, size_bytes=1 << 20, block_size=1 << 19), 1),
        (dataclasses.replace(CONTENT, key="é" * 512, endpoint="http://" + "s" * 3000), 1),
    ],
    ids=["whole", "last", "tiny", "large", "long names"],
)
def test_a_file_tells_what_it_is_and_when_it_was_written(
    files: BlockFiles, content: Content, number: int
) -> None:
    write(files, NAME, number, content)
    os.utime(files.path(NAME), (7, 1234.5))
    assert files.describe(NAME) == Described(content, number, 1234.5)


def longer(path: Path) -> None:
    """The end is right, but for a file that would be shorter."""
    path.write_bytes(bytes(4096) + path.read_bytes())


def shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[1:])


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("damage", [longer, shorter, cut, emptied, Path.unlink])
def test_nothing_is_told_of_a_file_that_is_damaged_or_gone(
    files: BlockFiles, damage: Callable[[Path], None]
) -> None:
    write(files, NAME, 1)
    damage(files.path(NAME))
    assert files.describe(NAME) is None


def test_files_are_removed_whether_or_not_others_are_gone(files: BlockFiles) -> None:
    for name in (NAME, THIRD):
        write(files, name, 0)
    files.remove(name for name in (NAME, OTHER, THIRD))
    assert files.names() == []
    files.remove([])
