"""One cache directory: what it counts, keeps, gives up and tells other processes."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from lazyfs.blocks.buffers import take_buffer
from lazyfs.cache import block_io, current_load
from lazyfs.cache import directory as module
from lazyfs.cache.block_format import Content
from lazyfs.cache.current_load import ANNOUNCE_S, IDLE_S
from lazyfs.cache.directory import DAMAGED_SHOWN, CacheCounters, CacheDirectory
from lazyfs.cache.index import BlockIndex, IndexCorruptError, IndexFailedError
from lazyfs.cache.space import Limits
from lazyfs.cache.sweep import SWEEP_S
from lazyfs.movers.pool import Movers

BLOCK = 4096
ONE = Content("http://s3", "b", "m/one", '"1"', 40 * BLOCK, BLOCK)
OTHER = Content("http://s3", "b", "m/two", '"2"', 40 * BLOCK, BLOCK)
FILE_BYTES = ONE.file_length(0)

Open = Callable[..., CacheDirectory]


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """Opens the same directory, as one process after another does."""

    def make(blocks: int = 1000) -> CacheDirectory:
        made = CacheDirectory(tmp_path / "cache", Limits(blocks * FILE_BYTES))
        made.open()
        return made

    return make


def block(number: int = 0) -> memoryview:
    data = take_buffer(BLOCK)
    data[:] = bytes([number + 1]) * BLOCK
    return data


def store(directory: CacheDirectory, content: Content, *numbers: int) -> list[bool]:
    return directory.put_all([(content, number, block(number)) for number in numbers])


def files(directory: CacheDirectory) -> list[Path]:
    return sorted(directory.path.glob("?0/*"))


def test_what_was_read_and_missed_is_counted_for_all_processes_together(opened: Open) -> None:
    first = opened()
    assert store(first, ONE, 0, 1) == [True, True]
    assert first.load(ONE, 0) == block(0)
    assert first.load(ONE, 5) is None
    assert first.load(OTHER, 0) is None
    assert first.counters == CacheCounters(hits=1, misses=2)
    first.care([])
    first.care([])
    assert first.hits_and_misses() == (1, 2)
    second = opened()
    assert second.load(ONE, 1) == block(1)
    second.care([])
    assert (second.counters, second.hits_and_misses()) == (CacheCounters(hits=1), (2, 2))


def test_a_part_of_a_block_counts_as_a_use(opened: Open) -> None:
    cache = opened()
    store(cache, ONE, 0, 1)
    assert cache.load_part(ONE, 1, 10, 20) == block(1)[10:20]
    assert cache.load_part(ONE, 2, 10, 20) is None
    assert cache.counters == CacheCounters(), "blocks are counted"
    cache.care([])
    opened().shrink(FILE_BYTES)
    assert cache.present(ONE) == [1], "it was used last"


def test_damage_in_a_part_drops_the_block(opened: Open, caplog: pytest.LogCaptureFixture) -> None:
    cache = opened()
    store(cache, ONE, 0, 1)
    for path in files(cache):
        path.write_bytes(bytes(FILE_BYTES))
    assert cache.load_part(ONE, 0, 0, 10) is None
    assert cache.counters == CacheCounters(damaged=1)
    assert "has a wrong checksum" in caplog.text
    assert (cache.present(ONE), len(files(cache))) == ([1], 1)
    files(cache)[0].unlink()
    assert cache.load_part(ONE, 1, 0, 10) is None
    assert cache.counters == CacheCounters(damaged=1)
    assert cache.present(ONE) == []


@pytest.mark.parametrize("value", [None, b"", b"abc", bytes(8)])
def test_without_the_sums_of_its_pieces_a_block_comes_as_a_whole(
    opened: Open, value: bytes | None
) -> None:
    """As those that older versions stored, and those whose row was made again."""
    cache = opened()
    store(cache, ONE, 0)
    with sqlite3.connect(cache.path / "cache.db") as index:
        index.execute("UPDATE Cache SET value = ?", (value,))
    assert cache.load_part(ONE, 0, 0, 10) is None
    assert cache.load(ONE, 0) == block(0)
    assert cache.counters == CacheCounters(hits=1)


def test_a_check_of_blocks_counts_as_no_use(opened: Open) -> None:
    cache = opened()
    store(cache, ONE, 0, 1)
    assert cache.verify(ONE, 0)
    assert cache.verify(ONE, 7), "nothing is wrong with what is not here"
    files(cache)[0].write_bytes(bytes(FILE_BYTES))
    assert [cache.verify(ONE, number) for number in (0, 1)].count(False) == 1
    assert len(cache.present(ONE)) == len(files(cache)) == 1
    assert cache.counters == CacheCounters(damaged=1)


def test_of_many_damaged_blocks_the_log_names_the_first(
    opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    cache = opened()
    numbers = range(DAMAGED_SHOWN + 5)
    store(cache, ONE, *numbers)
    for path in files(cache):
        path.write_bytes(b"damaged")
    assert not any(cache.load(ONE, number) for number in numbers)
    assert cache.counters.damaged == len(numbers)
    assert caplog.text.count("dropped from the cache") == DAMAGED_SHOWN
    assert files(cache) == []


def test_the_space_is_told_as_it_is(opened: Open) -> None:
    cache = opened(10)
    store(cache, ONE, 0, 1)
    disk = os.statvfs(cache.path)
    told = cache.space()
    assert cache.used_bytes() == told["used_bytes"] == 2 * FILE_BYTES
    assert told["allowed_bytes"] == 10 * FILE_BYTES
    assert told["free_bytes"] == pytest.approx(disk.f_bavail * disk.f_frsize, rel=0.1)
    assert told["reserve_bytes"] == 0
    cache.care([])
    assert cache.filling == (2 * FILE_BYTES, 10 * FILE_BYTES)
    (stored,) = cache.stored()
    assert (stored.tag, stored.blocks, stored.last_number) == (ONE.identity.decode(), 2, 1)
    assert 0 <= time.time() - stored.stored_s < 60


def test_removed_blocks_are_counted_and_their_files_are_gone(opened: Open) -> None:
    cache = opened()
    store(cache, ONE, *range(6))
    store(cache, OTHER, 0)
    assert cache.shrink(100 * FILE_BYTES) == 0
    assert cache.shrink(7 * FILE_BYTES) == 0
    assert cache.shrink(5 * FILE_BYTES + 1) == 2
    assert (len(files(cache)), cache.counters.evicted) == (5, 2)
    cache.drop(ONE)
    assert (cache.present(ONE), cache.present(OTHER), len(files(cache))) == ([], [0], 1)
    assert cache.drop_older(time.time() - 60) == 0
    assert cache.drop_older(time.time() + 60) == 1
    assert (files(cache), cache.counters.evicted) == ([], 3)


def test_a_cache_that_may_have_less_now_is_made_smaller(opened: Open) -> None:
    store(opened(), ONE, *range(6))
    smaller = opened(4)
    smaller.care([])
    assert (len(files(smaller)), smaller.counters.evicted) == (4, 2)
    assert smaller.filling == (6 * FILE_BYTES, 4 * FILE_BYTES)


def test_after_a_block_was_declined_others_are_without_a_look(opened: Open) -> None:
    cache = opened(2)
    assert store(cache, ONE, 0, 1, 2, 3) == [True, True, False, False]
    assert cache.counters == CacheCounters(declined=2)
    assert store(cache, ONE, 0) == [False], "it was not looked for"
    assert cache.counters == CacheCounters(declined=3)
    other = opened(2)
    assert other.claim(ONE, 3)
    assert cache.claim(ONE, 3), "each process fetches its own blocks then"
    other.release(ONE, 3)


def test_blocks_that_were_given_up_make_room_at_once(opened: Open) -> None:
    cache = opened(2)
    store(cache, ONE, 0, 1, 2)
    assert cache.give_up(ONE, [1])
    assert store(cache, ONE, 2) == [True]
    assert cache.present(ONE) == [0, 2]
    assert cache.counters.evicted == 1


def test_blocks_that_were_given_up_while_another_was_declined_make_room_at_once(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = opened(2)
    store(cache, ONE, 0, 1)
    reserve = BlockIndex.reserve

    def reserve_late(*arguments: Any) -> Any:
        result = reserve(*arguments)
        monkeypatch.undo()
        assert cache.give_up(ONE, [0, 1])
        return result

    monkeypatch.setattr(BlockIndex, "reserve", reserve_late)
    assert store(cache, ONE, 2) == [False]
    assert store(cache, ONE, 2, 3) == [True, True]
    assert cache.present(ONE) == [2, 3]


def test_blocks_that_were_read_before_they_were_given_up_make_room_at_any_time(
    opened: Open,
) -> None:
    cache = opened(2)
    store(cache, ONE, 0, 1)
    cache.announce([ONE])
    assert cache.load(ONE, 0) is not None
    assert cache.give_up(ONE, [0])
    cache.care([ONE])
    assert store(cache, ONE, 2) == [True]
    assert cache.present(ONE) == [1, 2]


def test_what_another_process_loads_is_not_given_up(opened: Open) -> None:
    cache, other = opened(2), opened(2)
    store(cache, ONE, 0, 1)
    other.set_loading(OTHER)
    assert cache.give_up(ONE, [])
    other.set_loading(ONE)
    assert not cache.give_up(ONE, [0, 1])
    assert store(cache, ONE, 2) == [False]
    assert cache.present(ONE) == [0, 1]


def test_a_block_that_was_given_up_and_read_again_is_announced_again(opened: Open) -> None:
    cache = opened(3)
    store(cache, ONE, 0, 1, 2)
    assert cache.give_up(ONE, [0, 1, 2])
    assert cache.load(ONE, 2) is not None
    cache.announce([ONE])
    assert store(opened(3), OTHER, 0) == [True]
    assert cache.present(ONE) != [0, 1], "what was given up goes first"
    assert 2 in cache.present(ONE)


def test_claims_of_another_process_are_seen(opened: Open) -> None:
    cache, other = opened(), opened()
    assert other.claim(ONE, 0)
    assert (cache.claim(ONE, 0), cache.claim(ONE, 1)) == (False, True)
    assert (cache.is_claimed(ONE, 0), cache.is_claimed(ONE, 1)) == (True, False)
    other.release(ONE, 0)
    assert not cache.is_claimed(ONE, 0)
    assert cache.claim(ONE, 0)


def test_others_that_wait_are_seen(opened: Open) -> None:
    cache, other = opened(), opened()
    assert not cache.others_wait()
    other.set_waiting(ONE, 0, True)
    time.sleep(0.03)
    assert cache.others_wait()
    other.set_waiting(ONE, 0, False)
    time.sleep(0.03)
    assert not cache.others_wait()


def test_a_directory_is_swept_once_an_hour_by_one_process(opened: Open) -> None:
    cache = opened()
    cache.care([])
    orphan = cache.path / "00" / ("a" * 30)
    care = cache.path / "care"

    def is_swept(age_s: float) -> bool:
        orphan.write_bytes(b"nobody's")
        os.utime(orphan, (0, 0))
        moment_s = time.time() - age_s
        os.utime(care, (moment_s, moment_s))
        cache.care([])
        return not orphan.exists()

    assert not is_swept(SWEEP_S - 60)
    assert is_swept(SWEEP_S + 60)
    assert not is_swept(0)
    assert is_swept(-60), "the clock was set back"
    with module.locked(care, wait=False) as held:
        assert held is not None
        assert not is_swept(SWEEP_S + 60)


def test_a_file_that_was_not_written_leaves_no_row(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, cache = block_io.write_file, opened()
    written: list[Path] = []

    def write_one(path: Path, *rest: Any) -> None:
        if written:
            path.write_bytes(b"half")
            raise OSError(errno.EIO, "bad disk")
        written.append(path)
        write(path, *rest)

    monkeypatch.setattr(block_io, "write_file", write_one)
    assert store(cache, ONE, 0, 1, 2) == [True, False, False]
    assert files(cache) == written
    assert cache.used_bytes() == FILE_BYTES
    assert cache.counters == CacheCounters(failed_writes=2)
    monkeypatch.undo()
    assert opened().load(ONE, 0) == block(0)


def test_a_block_that_another_process_stored_meanwhile_is_kept_once(opened: Open) -> None:
    first, second = opened(), opened()
    assert store(first, ONE, 0) == [True]
    assert store(second, ONE, 1, 0) == [True, True]
    assert second.counters == CacheCounters()
    assert len(files(second)) == 2
    assert second.used_bytes() == 2 * FILE_BYTES


def test_rows_that_vanish_while_files_are_written_leave_no_files(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = opened()
    complete = BlockIndex.complete

    def complete_late(index: BlockIndex, entries: Any) -> Any:
        for entry, _ in entries[:1]:
            index.discard(entry.key, entry.filename)
        return complete(index, entries)

    monkeypatch.setattr(BlockIndex, "complete", complete_late)
    assert store(cache, ONE, 0, 1) == [False, True]
    assert cache.present(ONE) == [1]
    assert len(files(cache)) == 1
    assert cache.used_bytes() == FILE_BYTES


class Elsewhere:
    """A mover in this process."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def call(self, function: Callable[..., Any], *arguments: Any, buffer: Any) -> Any:
        self.called.append(function.__name__)
        return function(*arguments, *(buffer if isinstance(buffer, list) else [buffer]))


def test_movers_write_and_read_the_files(opened: Open) -> None:
    cache, mover = opened(), Elsewhere()
    cache.use(cast(Movers, mover))
    assert store(cache, ONE, 0, 1) == [True, True]
    assert cache.load(ONE, 1) == block(1)
    assert mover.called == ["write", "read"], "all files of a batch by one call"


@pytest.mark.parametrize(
    ("action", "side"),
    [
        (lambda cache: cache.present(ONE), "read"),
        (lambda cache: cache.holds(ONE, 0), "read"),
        (lambda cache: cache.load(ONE, 0), "read"),
        (lambda cache: cache.verify(ONE, 0), "read"),
        (lambda cache: cache.stored(), "read"),
        (lambda cache: cache.hits_and_misses(), "read"),
        (lambda cache: cache.used_bytes(), "read"),
        (lambda cache: store(cache, ONE, 0), "written"),
        (lambda cache: cache.drop(ONE), "written"),
        (lambda cache: cache.drop_older(0.0), "written"),
        (lambda cache: cache.shrink(0), "written"),
        (lambda cache: cache.announce([ONE]), "written"),
        (lambda cache: cache.give_up(ONE, [0]), "written"),
        (lambda cache: cache.care([]), "written"),
    ],
)
def test_whatever_fails_on_a_disk_is_told_and_raises_nothing(
    opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    action: Callable[[CacheDirectory], object], side: str,
) -> None:  # fmt: skip
    def fail(*_: object, **__: object) -> None:
        raise IndexFailedError("the disk is odd")

    cache = opened()
    for name, method in vars(BlockIndex).items():
        if callable(method) and not name.startswith("_"):
            monkeypatch.setattr(BlockIndex, name, fail)
    found = action(cache)
    assert f"cannot be {side}: the disk is odd" in caplog.text
    monkeypatch.undo()
    assert action(cache) == found, "it rests"
    other_side = cache.used_bytes() if side == "written" else len(store(cache, ONE, 0))
    assert other_side in (0, 1)
    assert caplog.text.count("the disk is odd") == 1


def test_nothing_is_here_while_an_index_is_made_again(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise IndexCorruptError("damaged")

    cache = opened()
    store(cache, ONE, 0)
    for name in ("used_bytes", "numbers", "hits_and_misses"):
        monkeypatch.setattr(BlockIndex, name, fail)
    assert (cache.used_bytes(), cache.present(ONE), cache.hits_and_misses()) == (0, [], (0, 0))
    assert store(cache, ONE, 0) == [False]
    monkeypatch.undo()
    assert store(cache, ONE, 0) == [True]


def test_nothing_is_here_on_a_disk_that_fails(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise IndexFailedError("the disk is odd")

    cache = opened()
    store(cache, ONE, 0)
    monkeypatch.setattr(BlockIndex, "filename", fail)
    assert cache.load(ONE, 0) is None
    assert cache.present(ONE) == []
    assert not cache.holds(ONE, 0)
    assert cache.stored() == []
    assert cache.hits_and_misses() == (0, 0)
    assert cache.used_bytes() == 0
    assert cache.verify(ONE, 0)
    monkeypatch.setattr(BlockIndex, "used_bytes", fail)
    assert store(cache, ONE, 1, 2) == [False, False]
    assert cache.counters == CacheCounters(misses=1, failed_writes=2)
    assert cache.drop_older(time.time() + 60) == 0
    assert cache.shrink(0) == 0
    other = opened()
    assert other.claim(ONE, 3)
    assert cache.claim(ONE, 3), "each process fetches its own blocks then"


def test_rows_are_made_again_from_files_but_for_those_that_are_known(
    opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    cache = opened()
    store(cache, ONE, *range(4))
    cache.load(ONE, 0)
    (cache.path / "cache.db").unlink()
    for path in files(cache):
        os.utime(path, (5000, 5000))
    caplog.set_level(logging.INFO)
    again = opened()
    store(again, ONE, 3)
    again.care([])
    assert again.counters.adopted == 3
    assert again.stored()[0].stored_s == 5000, "that was when it was written"
    assert again.present(ONE) == [0, 1, 2, 3]
    assert [again.load(ONE, number) for number in range(4)] == [block(n) for n in range(4)]
    assert len(files(again)) == 4, "the second file of block 3 is gone"


def test_before_it_is_opened_a_directory_claims_nothing_of_others(tmp_path: Path) -> None:
    cache = CacheDirectory(tmp_path / "cache", Limits(1 << 30))
    assert cache.claim(ONE, 0), "each process fetches its own blocks then"
    assert not cache.claim_alone(ONE, 0)
    assert not cache.is_claimed(ONE, 0)
    assert not cache.others_wait()
    assert not cache.give_up(ONE, [0])
    cache.release(ONE, 0)
    cache.set_waiting(ONE, 0, True)
    cache.set_loading(ONE)
    assert not cache.path.exists()
    assert store(cache, ONE, 0) == [True], "its first use opens it"
    assert cache.load(ONE, 0) == block(0)


def test_an_absent_block_is_claimed_and_counts_as_missed(opened: Open) -> None:
    cache, other = opened(), opened()
    store(cache, ONE, 0)
    assert not cache.claim_absent(ONE, 0), "it is here"
    assert not other.is_claimed(ONE, 0)
    assert cache.claim_absent(ONE, 1)
    assert other.is_claimed(ONE, 1)
    assert not other.claim_absent(ONE, 1), "another process fetches it"
    assert (cache.counters, other.counters) == (CacheCounters(misses=1), CacheCounters())


def test_a_process_that_is_alone_claims_without_a_look_and_that_counts_as_missed(
    opened: Open,
) -> None:
    cache, other = opened(), opened()
    assert cache.claim_alone(ONE, 1)
    assert other.is_claimed(ONE, 1)
    assert not other.claim_alone(ONE, 1)
    assert not other.claim_alone(ONE, 2), "it is not alone"
    assert not cache.is_claimed(ONE, 2)
    assert (cache.counters, other.counters) == (CacheCounters(misses=1), CacheCounters())


def grow_old(cache: CacheDirectory, seconds: float = 5000) -> None:
    """Let all blocks have been used that long ago."""
    with sqlite3.connect(cache.path / "cache.db") as connection:
        connection.execute("UPDATE Cache SET access_time = access_time - ?", [seconds])
    connection.close()


def used_lately(cache: CacheDirectory) -> set[tuple[str, int]]:
    """Contents and numbers of the blocks that were used, or announced, a moment ago."""
    with sqlite3.connect(cache.path / "cache.db") as connection:
        rows = connection.execute("SELECT key, access_time FROM Cache").fetchall()
    connection.close()
    digests = {ONE.digest: ONE.key, OTHER.digest: OTHER.key}
    return {
        (digests[key.partition(":")[0]], int(key.partition(":")[2]))
        for key, used_s in rows
        if time.time() - 60 < used_s <= time.time()
    }


def test_uses_are_recorded_once_when_the_directory_is_cared_for(opened: Open) -> None:
    cache = opened()
    store(cache, ONE, 0, 1, 2)
    grow_old(cache)
    cache.load(ONE, 1)
    assert used_lately(cache) == set(), "a read writes nothing"
    cache.care([])
    assert used_lately(cache) == {(ONE.key, 1)}
    grow_old(cache)
    cache.care([])
    assert used_lately(cache) == set()


def test_a_check_of_a_block_is_no_use_of_it(opened: Open) -> None:
    cache = opened()
    store(cache, ONE, 0)
    grow_old(cache)
    assert cache.verify(ONE, 0)
    assert cache.holds(ONE, 0)
    cache.care([])
    assert used_lately(cache) == set()


class Clock:
    """That of a load."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def time(self) -> float:
        return time.time()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(current_load, "time", made)
    return made


@pytest.mark.parametrize(
    "use",
    [
        lambda cache: cache.load(ONE, 0),
        lambda cache: cache.load(ONE, 9),
        lambda cache: cache.put(ONE, 0, block(0)),
        lambda cache: cache.claim_alone(ONE, 9),
        lambda cache: cache.announce([]),
    ],
)
def test_what_a_load_needs_is_announced_now_and_then_while_it_goes_on(
    opened: Open, clock: Clock, use: Callable[[CacheDirectory], object]
) -> None:
    cache = opened()
    store(cache, ONE, 0, 1)
    store(cache, OTHER, 5)
    grow_old(cache)
    cache.care([OTHER])
    assert used_lately(cache) == {(OTHER.key, 5)}
    cache.care([ONE, OTHER])
    assert used_lately(cache) == {(OTHER.key, 5)}, "a moment later nothing else is needed"
    clock.now_s += ANNOUNCE_S
    grow_old(cache)
    cache.care([ONE])
    assert used_lately(cache) == {(ONE.key, 0), (ONE.key, 1)}
    clock.now_s += IDLE_S + 1
    grow_old(cache)
    cache.care([ONE])
    assert used_lately(cache) == set(), "the load has ended"
    use(cache)
    cache.care([OTHER])
    assert (OTHER.key, 5) in used_lately(cache), "this is another one"


def test_what_is_announced_first_is_evicted_last(opened: Open) -> None:
    cache = opened()
    store(cache, OTHER, 0, 1)
    store(cache, ONE, 0, 1)
    cache.announce([ONE, OTHER])
    present = []
    for size in (3, 2, 1, 0):
        assert cache.shrink(size * FILE_BYTES) == 1
        present.append((cache.present(ONE), cache.present(OTHER)))
    assert present == [([0, 1], [0]), ([0, 1], []), ([0], []), ([], [])]


def test_blocks_of_a_former_load_make_room_for_another_one(opened: Open, clock: Clock) -> None:
    cache = opened(2)
    store(cache, ONE, 0, 1)
    cache.care([ONE])
    assert store(cache, OTHER, 0) == [False]
    clock.now_s += IDLE_S + 1
    cache.announce([OTHER])
    cache.care([OTHER])
    grow_old(cache, 60)
    assert store(cache, OTHER, 0) == [True]
    assert (len(cache.present(ONE)), cache.present(OTHER)) == (1, [0])
    assert cache.counters.evicted == 1


def test_a_cache_that_is_full_to_the_last_byte_is_left_as_it_is(opened: Open) -> None:
    cache = opened(3)
    store(cache, ONE, 0, 1, 2)
    cache.care([])
    assert cache.present(ONE) == [0, 1, 2]
    assert cache.counters.evicted == 0


def test_a_block_whose_file_was_deleted_is_forgotten(opened: Open) -> None:
    cache = opened()
    store(cache, ONE, 0, 1)
    files(cache)[0].unlink()
    found = [cache.load(ONE, number) for number in (0, 1)]
    assert found.count(None) == 1
    assert len(cache.present(ONE)) == 1
    assert cache.used_bytes() == FILE_BYTES
    assert cache.counters == CacheCounters(hits=1, misses=1), "that is no damage"


def test_a_file_that_cannot_be_read_stays(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "bad disk")

    cache = opened()
    store(cache, ONE, 0)
    monkeypatch.setattr(block_io, "read_file", fail)
    assert cache.load(ONE, 0) is None
    monkeypatch.undo()
    assert cache.load(ONE, 0) is None, "the disk is left alone"
    assert opened().load(ONE, 0) == block(0)
    assert cache.counters == CacheCounters(misses=2)


def test_a_damaged_block_is_named_with_what_is_wrong(
    opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    cache = opened()
    store(cache, ONE, 0)
    (path,) = files(cache)
    path.write_bytes(bytes(FILE_BYTES - 1))
    assert cache.load(ONE, 0) is None
    assert f"dropped from the cache: {path} has a wrong length" in caplog.text
    assert cache.used_bytes() == 0


def test_of_a_lost_index_only_what_fits_is_made_again(opened: Open) -> None:
    cache = opened()
    store(cache, ONE, *range(8))
    (cache.path / "cache.db").unlink()
    smaller = opened(4)
    smaller.care([])
    smaller.care([])
    assert smaller.counters.adopted >= 4
    assert len(files(smaller)) == len(smaller.present(ONE)) == 4
    assert smaller.used_bytes() == 4 * FILE_BYTES


def test_files_that_were_used_in_the_place_of_a_lost_index_are_evicted_by_age(opened: Open) -> None:
    cache = opened()
    store(cache, ONE, *range(4))
    (cache.path / "cache.db").unlink()
    for age, path in enumerate(files(cache)):
        moment_s = time.time() - 5000 - age
        os.utime(path, (moment_s, moment_s))
    newest = files(cache)[:2]
    again = opened()
    again.care([])
    assert again.shrink(2 * FILE_BYTES) == 2
    assert files(again) == newest


def test_a_file_that_comes_from_elsewhere_is_no_block_of_an_index_that_was_not_lost(
    opened: Open, tmp_path: Path
) -> None:
    cache = opened()
    cache.care([])
    elsewhere = CacheDirectory(tmp_path / "elsewhere", Limits(1 << 30))
    store(elsewhere, ONE, 0)
    (path,) = files(elsewhere)
    copied = cache.path / path.relative_to(elsewhere.path)
    copied.write_bytes(path.read_bytes())
    os.utime(cache.path / "care", (0, 0))
    cache.care([])
    assert not copied.exists()
    assert cache.counters == CacheCounters()


def test_blocks_of_one_call_are_stored_as_far_as_there_is_room(opened: Open) -> None:
    cache = opened(3)
    store(cache, OTHER, 0)
    blocks = [(OTHER, 0, block(0)), (ONE, 0, block(0)), (ONE, 1, block(1)), (ONE, 2, block(2))]
    assert cache.put_all(blocks) == [True, True, True, False]
    assert cache.counters == CacheCounters(declined=1)
    assert cache.put_all([]) == []
    assert [cache.load(ONE, number) for number in (0, 1)] == [block(0), block(1)]
