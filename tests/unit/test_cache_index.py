"""The table of a cache directory: what is entered, what is found, what leaves first."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import diskcache
import pytest

from lazyfs.cache import index as module
from lazyfs.cache.index import (
    INDEX_NAME,
    BlockIndex,
    Entered,
    Entry,
    IndexCorruptError,
    IndexFailedError,
    IndexFullError,
    Row,
    Stored,
    remove_index,
)

NOW_S = 1_700_000_000.0
ALL = float("inf")
NEW, KNOWN, DECLINED = Entered.NEW, Entered.KNOWN, Entered.DECLINED


@pytest.fixture
def index(tmp_path: Path) -> Iterator[BlockIndex]:
    made = BlockIndex(tmp_path)
    yield made
    made.close()


def entry(key: str, size: int = 10, name: str = "", tag: str = "") -> Entry:
    return Entry(key, name or f"00/{key}", size, tag or key.partition(":")[0])


def enter(index: BlockIndex, *keys: str, at_s: float = NOW_S) -> None:
    """Store blocks of 10 bytes, used at that time."""
    entries = [entry(key) for key in keys]
    assert index.reserve(entries, at_s, 1 << 40, ALL) == ([NEW] * len(keys), [])
    assert index.complete([(each, None) for each in entries]) == [True] * len(keys)


def keys(index: BlockIndex) -> set[str]:
    return {row.key for row in index.rows()}


def test_a_block_is_found_when_it_is_complete_and_its_room_counts_before(
    index: BlockIndex,
) -> None:
    one = entry("a:0", 7)
    assert index.used_bytes() == 0
    assert index.reserve([one], NOW_S, 100, ALL) == ([NEW], [])
    assert index.filename("a:0") is None
    assert index.numbers("a") == []
    assert index.rows() == [Row("a:0", "00/a:0", 7, NOW_S, True)]
    assert index.used_bytes() == 7
    assert index.complete([(one, b"sums")]) == [True]
    assert index.filename("a:0") == "00/a:0"
    assert index.rows() == [Row("a:0", "00/a:0", 7, NOW_S, False)]
    assert index.used_bytes() == 7
    index.discard("a:0", "00/a:0")
    assert (index.rows(), index.used_bytes(), index.filename("a:0")) == ([], 0, None)


def test_running_sums_are_kept_with_the_file_that_they_are_of(index: BlockIndex) -> None:
    first, second, third = entry("a:0"), entry("a:1"), entry("a:2")
    index.reserve([first, second, third], NOW_S, 100, ALL)
    assert index.file_and_sums("a:0") is None, "it is not written yet"
    index.complete([(first, b"sums"), (second, None), (third, b"")])
    assert index.file_and_sums("a:0") == ("00/a:0", b"sums")
    assert index.file_and_sums("a:1") == ("00/a:1", b"")
    assert index.file_and_sums("a:2") == ("00/a:2", b"")
    assert index.file_and_sums("a:3") is None
    for value in (7, 1.5, "text"):  # whatever another program wrote
        index._sql("UPDATE Cache SET value = ? WHERE key = 'a:0'", (value,))
        assert index.file_and_sums("a:0") == ("00/a:0", b"")


def test_the_blocks_of_a_content_are_found_in_order_and_no_others(index: BlockIndex) -> None:
    enter(index, "a:10", "a:9", "a:0", "ab:1", "b:2", "a;:3")
    index.reserve([entry("a:5")], NOW_S, 1 << 40, ALL)
    assert index.numbers("a") == [0, 9, 10]
    assert index.numbers("c") == []


def test_a_block_that_is_here_is_not_entered_again(index: BlockIndex) -> None:
    enter(index, "a:0")
    assert index.reserve([entry("a:0", name="00/x"), entry("a:1")], NOW_S, 20, 0) == (
        [KNOWN, NEW], [],
    )  # fmt: skip
    assert index.filename("a:0") == "00/a:0"


def test_a_block_that_another_process_did_not_complete_is_entered_again(index: BlockIndex) -> None:
    first, second = entry("a:0", 10, "00/first"), entry("a:0", 20, "00/second")
    index.reserve([first], NOW_S, 100, ALL)
    assert index.reserve([second], NOW_S, 100, ALL) == ([NEW], ["00/first"])
    assert index.used_bytes() == 20
    assert index.complete([(first, b"first")]) == [False], "its row is gone"
    index.discard("a:0", "00/first")
    assert index.complete([(second, b"second"), (entry("a:9"), None)]) == [True, False]
    assert index.filename("a:0") == "00/second"


def test_blocks_fit_up_to_the_last_byte(index: BlockIndex) -> None:
    states, _ = index.reserve([entry("a:0"), entry("a:1"), entry("a:2")], NOW_S, 20, 0)
    assert states == [NEW, NEW, DECLINED]
    assert index.used_bytes() == 20


def test_the_least_recently_used_make_room_and_no_more_than_needed(index: BlockIndex) -> None:
    for age, key in enumerate(["a:3", "a:1", "a:2", "a:0"]):
        enter(index, key, at_s=NOW_S - age)
    assert index.reserve([entry("b:0", 11)], NOW_S, 40, ALL) == ([NEW], ["00/a:0", "00/a:2"])
    assert keys(index) == {"a:1", "a:3", "b:0"}


def test_blocks_used_since_a_time_stay(index: BlockIndex) -> None:
    enter(index, "a:0", at_s=NOW_S - 2)
    enter(index, "a:1", at_s=NOW_S - 1)
    one, two = entry("b:0", 10), entry("b:0", 20)
    assert index.reserve([two], NOW_S, 20, NOW_S - 1) == ([DECLINED], []), "all or nothing"
    assert index.reserve([one], NOW_S, 20, NOW_S - 2) == ([DECLINED], [])
    assert index.reserve([one], NOW_S, 20, NOW_S - 1) == ([NEW], ["00/a:0"])


def test_blocks_used_in_the_future_were_used_before_the_clock_was_set_back(
    index: BlockIndex,
) -> None:
    enter(index, "a:0", at_s=NOW_S + 60)
    assert index.reserve([entry("b:0")], NOW_S, 10, 0) == ([DECLINED], [])
    index.touch([(NOW_S + 61, "a:0")])
    assert index.reserve([entry("b:0")], NOW_S, 10, 0) == ([NEW], ["00/a:0"])


def test_a_use_is_recorded_only_where_a_block_is(index: BlockIndex) -> None:
    enter(index, "a:0", "a:1")
    index.touch([(NOW_S + 5, "a:0"), (NOW_S - 5, "a:1"), (NOW_S, "a:7")])
    used = {row.key: row.used_s for row in index.rows()}
    assert used == {"a:0": NOW_S + 5, "a:1": NOW_S - 5}


def test_a_content_is_forgotten_but_not_what_is_being_written(index: BlockIndex) -> None:
    enter(index, "a:0", "a:1", "ab:0", "b:0")
    index.reserve([entry("a:2")], NOW_S, 1 << 40, ALL)
    assert sorted(index.forget("a")) == ["00/a:0", "00/a:1"]
    assert keys(index) == {"a:2", "ab:0", "b:0"}
    assert index.used_bytes() == 30


def test_what_was_not_used_since_a_time_is_forgotten(index: BlockIndex) -> None:
    enter(index, "a:0", at_s=NOW_S - 1)
    enter(index, "a:1", at_s=NOW_S)
    index.reserve([entry("a:2")], NOW_S - 9, 1 << 40, ALL)
    assert index.forget_older(NOW_S) == ["00/a:0"]
    assert keys(index) == {"a:1", "a:2"}


def test_a_cache_shrinks_by_its_oldest_blocks_as_far_as_it_can(index: BlockIndex) -> None:
    for age, key in enumerate(["a:0", "a:1", "a:2"]):
        enter(index, key, at_s=NOW_S - age)
    index.reserve([entry("b:0")], NOW_S - 99, 1 << 40, ALL)
    assert index.shrink(10, NOW_S) == ["00/a:2"]
    assert index.shrink(11, NOW_S) == ["00/a:1", "00/a:0"]
    assert index.shrink(10, NOW_S) == []
    assert keys(index) == {"b:0"}


def test_hits_and_misses_are_added_up(index: BlockIndex, tmp_path: Path) -> None:
    assert index.hits_and_misses() == (0, 0)
    index.add_counts(2, 5)
    index.add_counts(1, 0)
    again = BlockIndex(tmp_path)
    assert again.hits_and_misses() == (3, 5)
    again.close()


def test_contents_are_told_with_their_blocks_and_times(index: BlockIndex) -> None:
    enter(index, "a:9", at_s=NOW_S - 3)
    enter(index, "a:10", at_s=NOW_S - 1)
    enter(index, "b:0", at_s=NOW_S)
    index.reserve([entry("a:11"), entry("c:0")], NOW_S, 1 << 40, ALL)
    index.touch([(NOW_S + 7, "a:9")])
    assert sorted(index.contents()) == [
        Stored("a", 2, 10, NOW_S - 3, NOW_S + 7), Stored("b", 1, 0, NOW_S, NOW_S),
    ]  # fmt: skip


def test_an_index_that_was_replaced_is_not_current(tmp_path: Path) -> None:
    index = BlockIndex(tmp_path)
    assert index.is_current
    file = tmp_path / INDEX_NAME
    file.rename(tmp_path / "aside")
    assert not index.is_current
    file.write_bytes(b"")
    assert not index.is_current
    (tmp_path / "aside").replace(file)
    assert index.is_current
    index.close()


def test_all_files_of_an_index_are_removed_and_no_others(tmp_path: Path) -> None:
    names = [INDEX_NAME + end for end in ("", "-wal", "-shm", "-other")]
    for name in names:
        (tmp_path / name).touch()
    remove_index(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [names[-1]]
    remove_index(tmp_path)


def test_an_index_that_is_locked_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOCK_TIMEOUT_S", 0.01)
    index = BlockIndex(tmp_path)
    other = sqlite3.connect(tmp_path / INDEX_NAME, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(IndexFailedError, match="locked") as error:
        index.touch([(NOW_S, "a:0")])
    assert not isinstance(error.value, IndexCorruptError)
    other.execute("ROLLBACK")
    other.close()
    index.touch([(NOW_S, "a:0")])
    index.close()


@pytest.mark.parametrize(
    "statement", ["DROP TABLE Cache", "UPDATE Cache SET key = 'a:x'", "DELETE FROM Settings"]
)
def test_an_index_with_other_tables_or_rows_is_damaged(
    index: BlockIndex, tmp_path: Path, statement: str
) -> None:
    enter(index, "a:0")
    with sqlite3.connect(tmp_path / INDEX_NAME) as other:
        other.execute(statement)
    other.close()
    with pytest.raises(IndexCorruptError):
        index.numbers("a")
        index.used_bytes()


@pytest.mark.parametrize(
    ("code", "kind", "reason"),
    [
        (sqlite3.SQLITE_CORRUPT, IndexCorruptError, "its index is damaged: told"),
        (sqlite3.SQLITE_CORRUPT | 2 << 8, IndexCorruptError, "its index is damaged: told"),
        (sqlite3.SQLITE_NOTADB, IndexCorruptError, "its index is damaged: told"),
        (sqlite3.SQLITE_ERROR, IndexCorruptError, "its index is damaged: told"),
        (sqlite3.SQLITE_FULL, IndexFullError, "its disk is full"),
        (sqlite3.SQLITE_IOERR, IndexFailedError, "its index does not work: told"),
        (sqlite3.SQLITE_READONLY, IndexFailedError, "its index does not work: told"),
        (None, IndexCorruptError, "its index is damaged: told"),
    ],
)
def test_what_sqlite_says_decides_whether_an_index_is_made_again(
    index: BlockIndex, monkeypatch: pytest.MonkeyPatch, code: int | None, kind: type[Exception],
    reason: str,
) -> None:  # fmt: skip
    def fail(*_: object) -> None:
        error = sqlite3.DatabaseError("told")
        if code is not None:
            error.sqlite_errorcode = code  # type: ignore[misc]
        raise error

    monkeypatch.setattr(BlockIndex, "_sql", property(lambda self: fail))
    with pytest.raises(IndexFailedError) as error:
        index.filename("a:0")
    assert type(error.value) is kind
    assert str(error.value) == reason


def test_what_fails_as_a_change_begins_decides_as_well(
    index: BlockIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diskcache calls it a timeout, whatever it was."""

    def fail(*_: object) -> None:
        error = sqlite3.OperationalError("told")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL  # type: ignore[misc]
        try:
            raise error
        except sqlite3.OperationalError:
            raise diskcache.Timeout  # noqa: B904

    monkeypatch.setattr(BlockIndex, "_transact", fail)
    for change in (
        lambda: index.touch([(NOW_S, "a:0")]),
        lambda: index.reserve([entry("a:0")], NOW_S, 10, 0),
        lambda: index.complete([(entry("a:0"), None)]),
        lambda: index.discard("a:0", "00/a:0"),
        lambda: index.forget("a"),
        lambda: index.forget_older(NOW_S),
        lambda: index.shrink(10, NOW_S),
        lambda: index.add_counts(1, 1),
    ):
        with pytest.raises(IndexFullError, match="its disk is full"):
            change()


def test_only_texts_are_keys_and_nothing_is_a_value(index: BlockIndex) -> None:
    for action in (lambda: index.get(1), lambda: index.set("a:0", b"x"), lambda: index.get((1, 2))):
        with pytest.raises(TypeError):
            action()
    assert index.rows() == []
    enter(index, "a:0")
    assert list(index) == ["a:0"]


def test_what_is_no_text_is_no_key() -> None:
    """diskcache would unpickle it."""
    disk = module._NoValues(".")
    assert disk.put("a:0") == ("a:0", True)
    assert disk.get("a:0", 1) == "a:0"
    for key, raw in (("a:0", 0), (b"a:0", 1), (7, 1)):
        with pytest.raises(ValueError, match="not a block's key"):
            disk.get(key, raw)
    for use in (disk.store, disk.fetch):
        with pytest.raises(TypeError, match="not stored as values"):
            use(b"value", False)
        with pytest.raises(TypeError, match="not stored as values"):
            use(b"value", False, key="a:0")


def test_the_blocks_that_leave_first_are_found_without_a_look_at_all(index: BlockIndex) -> None:
    columns = {
        column
        for _, name, *_ in index._sql("PRAGMA index_list(Cache)")
        for _, _, column in index._sql(f"PRAGMA index_info({name})")
    }
    assert "access_time" in columns


def test_an_index_takes_little_memory_and_maps_no_file(index: BlockIndex) -> None:
    """A thread that waits for a page of a file on a disk that hangs would stop all others."""
    for name, value in (("cache_size", 256), ("mmap_size", 0)):
        found = index._sql(f"PRAGMA {name}").fetchone()
        assert (found or (0,))[0] == value


def test_an_index_that_is_locked_is_waited_for_for_a_moment(index: BlockIndex) -> None:
    (milliseconds,) = index._sql("PRAGMA busy_timeout").fetchone()
    assert milliseconds == module.LOCK_TIMEOUT_S * 1000


def test_a_block_that_is_too_large_keeps_no_other_from_being_entered(index: BlockIndex) -> None:
    enter(index, "a:0", at_s=NOW_S - 9)
    enter(index, "a:1", at_s=NOW_S - 8)
    entries = [entry("b:0", 30), entry("b:1", 5), entry("a:1"), entry("b:2", 6)]
    assert index.reserve(entries, NOW_S, 25, NOW_S - 5) == (
        [DECLINED, NEW, KNOWN, NEW], ["00/a:0"],
    )  # fmt: skip
    assert keys(index) == {"a:1", "b:1", "b:2"}


def test_rows_go_only_with_the_file_that_they_name(index: BlockIndex) -> None:
    enter(index, "a:0", "a:1")
    index.discard("a:0", "00/a:1")
    index.discard("a:2", "00/a:1")
    assert keys(index) == {"a:0", "a:1"}
    index.discard("a:1", "00/a:1")
    assert keys(index) == {"a:0"}
    assert index.complete([(entry("a:0", name="00/x"), None)]) == [False]
