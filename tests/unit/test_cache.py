"""The block cache: what it keeps, what it refuses to serve, what it forgets."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from lazyfs.cache import BlockCache, Claim, block_io
from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.space import Limits
from lazyfs.errors import CacheError
from lazyfs.listed_object import File
from lazyfs.movers.pool import Movers
from lazyfs.options.mount_options import MountOptions

BLOCK = 256 << 10
# A block's file has a tail of some hundred bytes.
ROOM = BLOCK + 1024


def file(key: str = "m/a.safetensors", blocks: float = 4, etag: str = '"1"') -> File:
    return File(
        hash((key, etag, blocks)), 1, key.rpartition("/")[2], key, int(blocks * BLOCK), etag, 0
    )


def body(file: File, number: int) -> bytes:
    length = min(BLOCK, file.size_bytes - number * BLOCK)
    return random.Random(f"{file.key}{file.etag}{number}").randbytes(length)


@pytest.fixture
def open_cache(tmp_path: Path) -> Callable[..., BlockCache]:
    def make(*names: str, size: float = 1 << 30, bucket: str = "b", **more: float) -> BlockCache:
        paths = [tmp_path / name for name in names or ("cache",)]
        cache = BlockCache(paths, Limits(size, **more), "http://s3", bucket, BLOCK)
        cache.open()
        return cache

    return make


def fill(cache: BlockCache, file: File, numbers: range) -> list[bool]:
    return [cache.put(file, number, body(file, number)) for number in numbers]


def load(cache: BlockCache, file: File, number: int) -> bytes | None:
    """A block, or None if it would have to be fetched."""
    found = cache.load_or_claim(file, number)
    if isinstance(found, Claim):
        cache.release(file, number)
        return None
    return bytes(found)


def block_files(path: Path) -> list[Path]:
    return sorted(path.glob("[0-9a-f][0-9a-f]/*"))


def grow_old(cache: BlockCache, seconds: float) -> None:
    """Let all blocks have been used that long ago."""
    for directory in cache.directories:
        with sqlite3.connect(directory.path / "cache.db") as connection:
            connection.execute("UPDATE Cache SET access_time = access_time - ?", [seconds])
        connection.close()


@pytest.mark.parametrize("size", [1.0, 2.5, 1.0000038, 0.001])
def test_a_block_comes_back_as_it_was(open_cache: Callable[..., BlockCache], size: float) -> None:
    cache, one = open_cache(), file(blocks=size)
    numbers = range(-(-one.size_bytes // BLOCK))
    assert load(cache, one, 0) is None
    assert all(fill(cache, one, numbers))
    for again in (cache, open_cache()):
        assert [load(again, one, number) for number in numbers] == [
            body(one, number) for number in numbers
        ]
        assert again.present(one) == list(numbers)


@pytest.mark.parametrize(
    "other", [file(key="m/b.safetensors"), file(etag='"2"'), file(blocks=4.5)], ids=lambda f: f.key
)
def test_other_objects_are_not_served(open_cache: Callable[..., BlockCache], other: File) -> None:
    cache = open_cache()
    fill(cache, file(), range(4))
    assert cache.present(other) == []
    assert load(cache, other, 0) is None
    assert load(open_cache(bucket="c"), file(), 0) is None


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(where: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[where] ^= 4
        path.write_bytes(content)

    return damage


@pytest.mark.parametrize(
    "damage",
    [truncate, flip(0), flip(BLOCK - 1), flip(-1), flip(-30), flip(-100), Path.unlink,
     lambda path: path.write_bytes(b""), lambda path: path.write_bytes(bytes(path.stat().st_size))],
)  # fmt: skip
def test_a_damaged_block_is_dropped_and_can_be_stored_again(
    open_cache: Callable[..., BlockCache], tmp_path: Path, damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    cache, one = open_cache(), file(blocks=1)
    fill(cache, one, range(1))
    (stored,) = block_files(tmp_path / "cache")
    damage(stored)
    was_there = stored.exists()
    assert load(cache, one, 0) is None
    assert cache.present(one) == []
    assert block_files(tmp_path / "cache") == []
    assert cache.directories[0].counters.damaged == was_there
    assert len(caplog.records) == was_there
    assert fill(cache, one, range(1)) == [True]
    assert load(cache, one, 0) == body(one, 0)


def test_files_that_were_exchanged_are_not_served(
    open_cache: Callable[..., BlockCache], tmp_path: Path
) -> None:
    cache, one = open_cache(), file(blocks=2)
    fill(cache, one, range(2))
    first, second = block_files(tmp_path / "cache")
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    assert [load(cache, one, number) for number in range(2)] == [None, None]
    assert cache.directories[0].counters.damaged == 2


def test_the_oldest_blocks_are_evicted_first(
    open_cache: Callable[..., BlockCache], tmp_path: Path
) -> None:
    cache = open_cache(size=8 * ROOM)
    old, older, new = (file(name) for name in ("old", "older", "new"))
    fill(cache, older, range(4))
    grow_old(cache, 5000)
    fill(cache, old, range(4))
    grow_old(cache, 5000)
    assert all(fill(cache, new, range(2)))
    assert [len(cache.present(each)) for each in (older, old, new)] == [2, 4, 2]
    assert all(fill(cache, new, range(2, 4)))
    assert [len(cache.present(each)) for each in (older, old, new)] == [0, 4, 4]
    assert len(block_files(tmp_path / "cache")) == 8


def test_a_load_does_not_evict_its_own_blocks(
    open_cache: Callable[..., BlockCache],
) -> None:
    cache, one = open_cache(size=4 * ROOM), file(blocks=10)
    assert fill(cache, one, range(10)) == [True] * 4 + [False] * 6
    for _ in range(3):
        cache = open_cache(size=4 * ROOM)
        grow_old(cache, 5000)
        cache.announce([one])
        found = [load(cache, one, number) is not None for number in range(10)]
        assert found == [True] * 4 + [False] * 6
        fill(cache, one, range(4, 10))


def test_blocks_that_were_read_make_room_for_others_of_the_same_load(
    open_cache: Callable[..., BlockCache],
) -> None:
    cache, one = open_cache(size=4 * ROOM), file(blocks=10)
    fill(cache, one, range(4))
    cache.announce([one])
    assert fill(cache, one, range(4, 6)) == [False, False]
    assert cache.give_up(one, [0, 1])
    cache.announce([one])
    assert fill(cache, one, range(4, 7)) == [True, True, False]
    assert cache.present(one) == [2, 3, 4, 5]


def test_blocks_that_another_mount_loads_are_not_given_up(
    open_cache: Callable[..., BlockCache],
) -> None:
    cache, other, one = open_cache(size=4 * ROOM), open_cache(size=4 * ROOM), file(blocks=10)
    other.set_loading(one)
    fill(cache, one, range(4))
    cache.announce([one])
    assert not cache.give_up(one, [0, 1])
    assert fill(cache, one, range(4, 6)) == [False, False]


def test_blocks_needed_last_are_evicted_first(open_cache: Callable[..., BlockCache]) -> None:
    cache = open_cache(size=8 * ROOM)
    first, second = file("1"), file("2")
    fill(cache, second, range(4))
    fill(cache, first, range(4))
    cache.announce([first, second])
    grow_old(cache, 5000)
    fill(cache, file("other"), range(3))
    assert cache.present(first) == [0, 1, 2, 3]
    assert cache.present(second) == [0]


def test_reserved_space_stays_free(open_cache: Callable[..., BlockCache], tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    free = disk.f_bavail * disk.f_frsize
    cache = open_cache(reserve=free * 2)
    assert fill(cache, file(), range(2)) == [False, False]
    assert block_files(tmp_path / "cache") == []
    roomy = open_cache()
    fill(roomy, file(), range(4))
    cache.care([])
    assert roomy.present(file()) == []
    assert block_files(tmp_path / "cache") == []


def test_no_block_is_allowed_where_less_is_free_than_reserved(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    more = disk.f_bavail * disk.f_frsize + (1 << 40)
    assert Limits(1 << 50, reserve=more).allowed_bytes(disk, 0) == 0
    assert Limits(0).allowed_bytes(disk, 0) == 0


def test_processes_see_of_each_other_which_block_they_fetch_and_wait_for(
    open_cache: Callable[..., BlockCache],
) -> None:
    ours, other, one = open_cache(), open_cache(), file()
    assert other.load_or_claim(one, 0) is Claim.OURS
    assert ours.load_or_claim(one, 0) is Claim.THEIRS
    assert (ours.is_claimed(one, 0), ours.is_claimed(one, 1)) == (True, False)
    assert ours.load_or_claim(one, 1) is Claim.OURS
    ours.set_waiting(one, 0, True)
    assert other.others_wait()
    assert other.put(one, 0, body(one, 0))
    assert not ours.is_claimed(one, 0)
    ours.set_waiting(one, 0, False)
    time.sleep(0.03)
    assert not other.others_wait()
    assert ours.load_or_claim(one, 0) == body(one, 0)
    ours.release(one, 1)
    assert other.load_or_claim(one, 1) is Claim.OURS


def test_a_process_is_alone_until_another_one_claims_blocks_of_the_same_file(
    open_cache: Callable[..., BlockCache],
) -> None:
    ours, other, one = open_cache(), open_cache(), file()
    assert ours.claim_alone(one, 0)
    assert ours.claim_alone(one, 1)
    ours.release(one, 1)
    assert other.load_or_claim(one, 1) is Claim.OURS
    assert other.put(one, 1, body(one, 1))
    assert not ours.claim_alone(one, 1), "it is there"
    assert not ours.claim_alone(one, 2), "it may be there"
    assert not other.is_claimed(one, 2), "and no claim is left"
    assert other.is_claimed(one, 0)
    del other
    assert ours.claim_alone(one, 2), "what had come before, the caller has seen"


def test_a_block_that_is_stored_between_a_look_and_a_claim_is_taken(
    open_cache: Callable[..., BlockCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, other, one = open_cache(), open_cache(), file()
    load = CacheDirectory.load

    def load_early(directory: CacheDirectory, *which: object) -> memoryview | None:
        found = load(directory, *which)  # type: ignore[arg-type]
        if found is None:
            other.put(one, 0, body(one, 0))
        return found

    monkeypatch.setattr(CacheDirectory, "load", load_early)
    assert ours.load_or_claim(one, 0) == body(one, 0)
    assert not other.is_claimed(one, 0), "and its claim is released"


def test_limits() -> None:
    disk = os.statvfs_result((4096, 4096, 1000, 400, 300, 0, 0, 0, 0, 255))
    assert Limits(0.5, 0).allowed_bytes(disk, 100 * 4096) == 200 * 4096
    assert Limits(1 << 40, 0.1).allowed_bytes(disk, 0) == 200 * 4096
    assert Limits(4096, 0.1).allowed_bytes(disk, 0) == 4096
    assert Limits(1 << 40, 350 * 4096).allowed_bytes(disk, 100 * 4096) == 50 * 4096


def test_a_lost_index_is_made_anew_from_the_files(
    open_cache: Callable[..., BlockCache], tmp_path: Path
) -> None:
    cache, one = open_cache(), file(blocks=4)
    fill(cache, one, range(4))
    flip(5)(block_files(tmp_path / "cache")[0])
    truncate(block_files(tmp_path / "cache")[1])
    for name in ("cache.db", "cache.db-wal", "cache.db-shm"):
        (tmp_path / "cache" / name).unlink(missing_ok=True)
    cache.care([])
    assert len(cache.present(one)) == 3
    found = [load(cache, one, number) for number in range(4)]
    assert len(block_files(tmp_path / "cache")) == 2
    assert sum(found[number] == body(one, number) for number in range(4)) == 2


@pytest.mark.parametrize("garbage", [b"", b"not a database" * 1000, os.urandom(40960)])
def test_a_corrupt_index_is_replaced(
    open_cache: Callable[..., BlockCache], tmp_path: Path, garbage: bytes
) -> None:
    cache, one = open_cache(), file()
    fill(cache, one, range(2))
    for name in ("cache.db-wal", "cache.db-shm"):
        (tmp_path / "cache" / name).unlink(missing_ok=True)
    (tmp_path / "cache/cache.db").write_bytes(garbage)
    again = open_cache()
    again.care([])
    assert [load(again, one, number) for number in range(2)] == [body(one, n) for n in range(2)]
    # The one that had opened the former index goes on with the new one.
    fill(cache, one, range(2, 4))
    cache.care([])
    assert again.present(one) == [0, 1, 2, 3]


def test_a_removed_directory_is_made_again(
    open_cache: Callable[..., BlockCache], tmp_path: Path
) -> None:
    cache, one = open_cache(), file()
    fill(cache, one, range(2))
    shutil.rmtree(tmp_path / "cache")
    assert load(cache, one, 0) is None
    assert fill(cache, one, range(4)) == [True] * 4
    assert load(cache, one, 3) == body(one, 3)


def test_a_failing_directory_is_left_alone_and_tried_again(
    open_cache: Callable[..., BlockCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    cache, one = open_cache(), file()
    fill(cache, one, range(1))
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").touch()
    assert fill(cache, one, range(4)) == [False] * 4
    assert [load(cache, one, number) for number in range(4)] == [None] * 4
    assert len(caplog.records) == 2  # for reading and for writing
    (tmp_path / "cache").unlink()
    assert fill(cache, one, range(1)) == [False]
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + 31)
    assert fill(cache, one, range(1)) == [True]


def test_a_disk_that_fails_in_the_middle_keeps_what_was_written(
    open_cache: Callable[..., BlockCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, one = open_cache(), file()
    write, written = block_io.write_file, 0

    def write_two(path: Path, *arguments: object) -> None:
        nonlocal written
        written += 1
        if written == 3:
            path.write_bytes(b"a part")
            raise OSError(errno.EIO, "broken")
        write(path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(block_io, "write_file", write_two)
    blocks = [(one, number, memoryview(body(one, number))) for number in range(4)]
    assert cache.put_all(blocks) == [True, True, False, False]
    assert [cache.holds(one, number) for number in range(4)] == [True, True, False, False]
    assert len(block_files(tmp_path / "cache")) == 2
    monkeypatch.undo()
    again = open_cache()
    assert fill(again, one, range(2, 4)) == [True, True]
    assert [load(again, one, number) for number in range(4)] == [
        body(one, number) for number in range(4)
    ]
    again.drop(one)
    assert again.present(one) == []
    assert block_files(tmp_path / "cache") == []


def test_orphans_do_not_stay(open_cache: Callable[..., BlockCache], tmp_path: Path) -> None:
    cache, one = open_cache(), file()
    fill(cache, one, range(2))
    cache.care([])
    block_files(tmp_path / "cache")[-1].unlink()
    stray = tmp_path / f"cache/00/{'0' * 30}"
    stray.write_bytes(b"x" * 5000)
    others = tmp_path / "cache/00/not-ours"
    others.touch()
    cache.care([])
    assert stray.exists()  # looked for once an hour
    os.utime(tmp_path / "cache/care", (0, 0))
    cache.care([])
    assert not stray.exists()
    others.unlink()
    assert len(cache.present(one)) == len(block_files(tmp_path / "cache")) == 1


def test_a_writer_that_was_killed_leaves_nothing(
    open_cache: Callable[..., BlockCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    def half(path: Path, data: memoryview, tail: bytes) -> None:
        path.write_bytes(data[:1000])
        raise KilledError

    cache, one = open_cache(), file()
    cache.care([])
    with monkeypatch.context() as patch:
        patch.setattr(block_io, "write_file", half)
        for number in range(2):
            with pytest.raises(KilledError):
                cache.put(one, number, body(one, number))
    assert cache.present(one) == []
    assert len(block_files(tmp_path / "cache")) == 2
    assert fill(cache, one, range(1)) == [True]
    os.utime(tmp_path / "cache/care", (0, 0))
    cache.care([])
    assert cache.present(one) == [0]
    assert len(block_files(tmp_path / "cache")) == 1


def test_a_clock_that_jumps_changes_nothing(
    open_cache: Callable[..., BlockCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = file("1"), file("2")
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 10**6)
    fill(open_cache(size=4 * ROOM), one, range(4))
    monkeypatch.undo()
    cache = open_cache(size=4 * ROOM)
    assert load(cache, one, 0) == body(one, 0)
    cache.care([])
    assert fill(cache, two, range(3)) == [True] * 3
    assert cache.present(two) == [0, 1, 2]


def test_several_directories_share_the_blocks(
    open_cache: Callable[..., BlockCache], tmp_path: Path
) -> None:
    cache, one = open_cache("a", "b", "c"), file(blocks=60)
    assert all(fill(cache, one, range(60)))
    assert cache.present(one) == list(range(60))
    assert all(len(block_files(tmp_path / name)) > 1 for name in "abc")  # 20 by chance
    fewer = open_cache("c", "a")
    assert sum(load(fewer, one, number) == body(one, number) for number in range(60)) > 20
    shutil.rmtree(tmp_path / "b")
    assert {load(cache, one, number) for number in cache.present(one)} <= {
        body(one, number) for number in range(60)
    }


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o755 | 0o002])
def test_untrusted_directories_are_refused(
    open_cache: Callable[..., BlockCache], tmp_path: Path, mode: int
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    with pytest.raises(CacheError, match="chmod go-w"):
        open_cache()


def test_only_its_user_can_read_the_cache(
    open_cache: Callable[..., BlockCache], tmp_path: Path
) -> None:
    directory = tmp_path / "cache"
    directory.mkdir(mode=0o755)
    (directory / "cache.db").touch(mode=0o644)  # as a former version made it
    cache = open_cache()
    fill(cache, file(blocks=2), range(2))
    files = [each for each in directory.rglob("*") if each.is_file()]
    assert {"cache.db", "cache.db-wal"} <= {each.name for each in files}
    assert {each.name for each in files if each.stat().st_mode & 0o077} == set()


def test_a_pickle_in_the_index_is_not_read(
    open_cache: Callable[..., BlockCache], tmp_path: Path
) -> None:
    """diskcache would unpickle it (CVE-2025-69872)."""
    cache, one = open_cache(), file(blocks=1)
    fill(cache, one, range(1))
    pickle = b"cos\nmkdir\n(V%s\ntR." % str(tmp_path / "unpickled").encode()
    with sqlite3.connect(tmp_path / "cache/cache.db") as connection:
        connection.execute("UPDATE Cache SET mode = 4, value = ?, filename = NULL", [pickle])
    connection.close()
    assert load(cache, one, 0) is None
    assert not (tmp_path / "unpickled").exists()
    assert isinstance(cache.directories[0], CacheDirectory)


def test_another_process_uses_the_cache_that_the_options_name(tmp_path: Path) -> None:
    directories = tmp_path / "one", tmp_path / "two"
    options = MountOptions(
        cache_dir=directories, cache_size=1 << 30, cache_reserve=0.001, block_size=BLOCK
    )
    cache = BlockCache.of(options, "http://s3", "b")
    assert cache is not None
    other = BlockCache.described(json.loads(json.dumps(cache.description())))
    assert other.description() == cache.description()
    assert [each.path for each in other.directories] == list(directories)
    assert {each.limits for each in other.directories} == {Limits(1 << 30, 0.001)}
    one = file()
    assert cache.put(one, 0, body(one, 0))
    assert load(other, one, 0) == body(one, 0)
    assert BlockCache.of(MountOptions(cache_dir="none"), "http://s3", "b") is None


def test_blocks_that_are_absent_are_claimed_once(open_cache: Callable[..., BlockCache]) -> None:
    ours, theirs, one = open_cache("a", "b"), open_cache("a", "b"), file(blocks=8)
    assert fill(ours, one, range(2)) == [True, True]
    assert theirs.claim_absent(one, [2, 3]) == {2, 3}
    assert ours.claim_absent(one, range(6)) == {4, 5}
    assert theirs.claim_absent(one, [0, 4, 5, 6]) == {6}, "the claim to what is there has ended"
    assert not theirs.is_claimed(one, 0)
    counters = [directory.counters for directory in ours.directories]
    assert sum(each.misses for each in counters) == 2, "what others fetch is not missing"
    ours.release(one, 4)
    assert theirs.claim_absent(one, [4]) == {4}


def test_a_block_is_loaded_without_a_claim(open_cache: Callable[..., BlockCache]) -> None:
    cache, other, one = open_cache("a", "b"), open_cache("a", "b"), file(blocks=8)
    fill(cache, one, range(8))
    assert [cache.load(one, number) for number in range(8)] == [body(one, n) for n in range(8)]
    assert cache.load(one, 9) is None
    assert other.load_or_claim(one, 9) is Claim.OURS


def test_each_directory_is_a_part_with_its_own_blocks(
    open_cache: Callable[..., BlockCache], tmp_path: Path
) -> None:
    cache, one, numbers = open_cache("a", "b", "c"), file(blocks=30), range(30)
    parts = cache.parts()
    assert [part.name for part in parts] == [str(tmp_path / name) for name in "abc"]
    assert cache.name == ":".join(part.name for part in parts)
    for number in numbers:
        (home,) = (part for part in parts if part.has_place_for(one, number))
        assert home.put(one, number, body(one, number))
        assert cache.has_place_for(one, number)
    present = [part.present(one) for part in parts]
    assert all(present)
    assert sorted(itertools.chain(*present)) == list(numbers) == cache.present(one)
    assert [load(cache, one, number) for number in numbers] == [body(one, n) for n in numbers]
    assert [len(cache.directories), *(len(part.directories) for part in parts)] == [3, 1, 1, 1]


def test_blocks_are_looked_for_where_earlier_versions_stored_them() -> None:
    paths = [Path("/a"), Path("/b"), Path("/c")]
    cache = BlockCache(paths, Limits(0), "http://s3", "b", BLOCK)
    one = File(2, 1, "w", "m/w", 24 * BLOCK, '"1"', 0)
    homes = [
        next(part.name for part in cache.parts() if part.has_place_for(one, number))
        for number in range(24)
    ]
    assert "".join(homes).replace("/", "") == "cbbbaccbcbaaccccabccabac"


def test_blocks_of_one_call_come_to_their_directories(
    open_cache: Callable[..., BlockCache],
) -> None:
    cache, other = open_cache("a", "b"), open_cache("a", "b")
    one, two = file("1", blocks=8), file("2", blocks=8)
    assert cache.claim_absent(one, range(8)) == set(range(8))
    blocks = [(each, number, body(each, number)) for number in range(8) for each in (one, two)]
    assert cache.put_all(blocks) == [True] * 16
    for each in (one, two):
        assert [load(other, each, number) for number in range(8)] == [
            body(each, number) for number in range(8)
        ]
    assert not any(other.is_claimed(one, number) for number in range(8))
    assert all(directory.counters.hits for directory in other.directories)


def test_what_a_full_directory_refuses_others_still_store(
    open_cache: Callable[..., BlockCache],
) -> None:
    cache, other, one = open_cache("a", "b"), open_cache("a", "b"), file(blocks=16)
    full, roomy = cache.parts()
    full.directories[0].limits = Limits(0)
    assert cache.claim_absent(one, range(16)) == set(range(16))
    kept = cache.put_all([(one, number, body(one, number)) for number in range(16)])
    assert kept == [roomy.has_place_for(one, number) for number in range(16)]
    assert 0 < kept.count(True) < 16
    assert not any(other.is_claimed(one, number) for number in range(16))


def test_claims_end_also_if_blocks_cannot_be_stored_for_an_unforeseen_reason(
    open_cache: Callable[..., BlockCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, other, one = open_cache(), open_cache(), file()
    assert cache.claim_absent(one, range(3)) == {0, 1, 2}
    monkeypatch.setattr(CacheDirectory, "put_all", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cache.put_all([(one, number, body(one, number)) for number in range(2)])
    assert [other.is_claimed(one, number) for number in range(3)] == [False, False, True]


def test_a_file_is_dropped_from_all_directories(open_cache: Callable[..., BlockCache]) -> None:
    cache, one, two = open_cache("a", "b"), file("1", blocks=16), file("2", blocks=16)
    fill(cache, one, range(16))
    fill(cache, two, range(16))
    cache.drop(one)
    assert (cache.present(one), cache.present(two)) == ([], list(range(16)))
    assert not cache.holds(one, 3)
    assert cache.holds(two, 3)


def test_blocks_are_given_up_in_the_directories_that_have_them(
    open_cache: Callable[..., BlockCache],
) -> None:
    cache, one = open_cache("a", "b"), file(blocks=16)
    first, second = (
        [number for number in range(16) if part.has_place_for(one, number)]
        for part in cache.parts()
    )
    other, another = open_cache("a"), file("2")
    other.set_loading(one)
    assert cache.give_up(one, second), "whoever loads it has no blocks there"
    assert not cache.give_up(one, first)
    assert not cache.give_up(one, range(16))
    assert cache.give_up(another, range(4))
    assert cache.give_up(one, [])
    both = open_cache("a", "b")
    both.set_loading(another)
    assert not cache.give_up(another, range(16))
    assert not any(part.give_up(another, range(16)) for part in cache.parts())


def test_whoever_waits_in_one_of_the_directories_is_seen(
    open_cache: Callable[..., BlockCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = file(blocks=16)
    now_s = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    cache, other = open_cache("a", "b"), open_cache("a", "b")
    for part in other.parts():
        number = next(number for number in range(16) if part.has_place_for(one, number))
        other.set_waiting(one, number, True)
        now_s += 1
        assert cache.others_wait()
        other.set_waiting(one, number, False)
        now_s += 1
        assert not cache.others_wait()


def test_all_directories_are_cared_for_and_know_what_is_needed(
    open_cache: Callable[..., BlockCache],
) -> None:
    cache, one, two = open_cache("a", "b"), file("1", blocks=16), file("2", blocks=16)
    fill(cache, one, range(16))
    fill(cache, two, range(16))
    grow_old(cache, 5000)
    cache.care([one])
    assert all(directory.filling[0] > 0 for directory in cache.directories)
    used = sum(directory.drop_older(time.time() - 4000) for directory in cache.directories)
    assert used == 16
    assert (cache.present(one), cache.present(two)) == (list(range(16)), [])
    grow_old(cache, 5000)
    cache.announce([one])
    assert sum(each.drop_older(time.time() - 4000) for each in cache.directories) == 0


def test_directories_are_opened_at_once_and_each_tells_its_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    places = [tmp_path / "a", tmp_path / "file" / "cache", tmp_path / "b"]
    cache = BlockCache(places, Limits(1 << 20), "http://s3", "b", BLOCK)
    opened = cache.begin_to_open()
    assert [opened[at].result(60) for at in (0, 2)] == [None, None]
    with pytest.raises(CacheError, match="file/cache: cannot be made"):
        opened[1].result(60)
    assert all((places[at] / "cache.db").exists() for at in (0, 2))


class Mover:
    """A mover in this process."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def call(self, function: Callable[..., Any], *arguments: Any, buffer: Any) -> Any:
        self.called.append(function.__name__)
        return function(*arguments, *(buffer if isinstance(buffer, list) else [buffer]))


def test_movers_are_used_for_all_directories(open_cache: Callable[..., BlockCache]) -> None:
    cache, mover, one = open_cache("a", "b"), Mover(), file(blocks=16)
    cache.use(cast(Movers, mover))
    blocks = [(one, number, body(one, number)) for number in range(16)]
    assert cache.put_all(blocks) == [True] * 16
    assert mover.called == ["write", "write"], "one call for each directory"
    assert all(load(cache, one, number) == body(one, number) for number in range(16))
    assert mover.called[2:] == ["read"] * 16


def test_the_endpoint_may_be_known_later(open_cache: Callable[..., BlockCache]) -> None:
    cache, one = open_cache(), file()
    fill(cache, one, range(1))
    other = BlockCache([cache.directories[0].path], Limits(1 << 30), "", "b", BLOCK)
    other.endpoint = "http://s3"
    assert load(other, one, 0) == body(one, 0)
