"""What `lazyfs warm` brings into the cache, and what it says when something is missing."""

from __future__ import annotations

import json
import zlib
from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing
from memory_store import MemoryStore

from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.memory import BlockMemory
from lazyfs.cache import BlockCache, Claim
from lazyfs.cache.disk_calls import MOST_OTHERS, DiskCalls
from lazyfs.errors import AccessDeniedError, SourceError
from lazyfs.fetch import warm
from lazyfs.fetch.warm import IncompleteError, Warmer
from lazyfs.listed_object import File
from lazyfs.namespace.catalog import Catalog
from lazyfs.namespace.listing_log import ListingLog
from lazyfs.observe.recorder import Recorder
from lazyfs.options.mount_options import MountOptions
from lazyfs.store.cancel import Cancel
from lazyfs.store.checksum import ObjectSum
from lazyfs.store.listing_page import Pinned
from lazyfs.threads import Threads

BLOCK = 64 << 10
OPTIONS = MountOptions(block_size=BLOCK, memory_limit=64 * BLOCK, cache_size=1 << 30)


def shard(size: int = 3 * BLOCK) -> bytes:
    """A valid safetensors file of about that size."""
    table = {"t": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
MODEL = {"config.json": b"{}", FIRST: shard(), SECOND: shard(), "model.ckpt": b"x" * 100}
READ = ["config.json", FIRST, SECOND]


class CheckedStore(MemoryStore):
    """Has checksums, and may refuse.

    Attributes:
        refused: keys that may not be read.
        sums: the checksum that is told of a key, or an error; else the right one.
    """

    def __init__(self, objects: dict[str, bytes]) -> None:
        super().__init__(dict(objects))
        self.refused: set[str] = set()
        self.sums: dict[str, str | SourceError] = {}

    def read(
        self, pin: Pinned, start: int, length: int, cancel: Cancel | None = None
    ) -> memoryview:
        if pin.key in self.refused:
            raise AccessDeniedError(f"{self.name(pin.key)}: denied")
        return super().read(pin, start, length, cancel)

    def checksum(self, pin: Pinned) -> ObjectSum | None:
        super().checksum(pin)
        right = b64encode(zlib.crc32(self.objects[pin.key]).to_bytes(4, "big")).decode()
        told = self.sums.get(pin.key, right)
        if isinstance(told, SourceError):
            raise told
        return ObjectSum("CRC32", told)

    def fetched(self) -> dict[str, int]:
        """How many bytes of each object were fetched."""
        sizes: dict[str, int] = {}
        for key, _, length in self.asked:
            sizes[key] = sizes.get(key, 0) + length
        return sizes


class Place:
    """A store, and a cache beside it."""

    def __init__(self, path: Path, objects: dict[str, bytes], **options: object) -> None:
        self.store = CheckedStore(objects)
        self.options = replace(OPTIONS, cache_dir=(path,), **options)  # type: ignore[arg-type]
        cache = BlockCache.of(self.options, self.store.endpoint, self.store.url.bucket)
        assert cache is not None
        self.cache = cache
        self.cache.open()
        catalog = Catalog(self.store, self.options, ListingLog(None), Recorder("off"))
        self.catalog = catalog
        self.warmer = Warmer(self.store, catalog, self.cache, self.options)

    def warm(self, *include: str, verify: bool = False) -> None:
        async def main() -> None:
            with trio.fail_after(60):
                await self.warmer.run(include, verify=verify)

        trio.run(main)

    def file(self, key: str) -> File:
        return next(file for file in self.catalog.tree.files() if file.key == key)

    def holds_all(self, key: str) -> bool:
        numbers = range(-(-self.file(key).size_bytes // BLOCK))
        return self.cache.present(self.file(key)) == list(numbers)


@pytest.fixture
def place(tmp_path: Path) -> Callable[..., Place]:
    def make(objects: dict[str, bytes] = MODEL, **options: object) -> Place:
        return Place(tmp_path, objects, **options)

    return make


def test_what_a_loader_reads_is_brought_once(place: Callable[..., Place]) -> None:
    there = place()
    there.warm()
    wanted = {key: len(MODEL[key]) for key in READ}
    assert there.store.fetched() == wanted
    assert all(map(there.holds_all, READ))
    progress, total = there.warmer.progress, sum(wanted.values())
    assert (progress.files, progress.total_bytes) == (3, total)
    assert (progress.done_bytes, progress.fetched_bytes) == (total, total)
    assert progress.problems == []
    there.warm()
    assert there.store.fetched() == wanted, "nothing is missing the second time"
    assert progress.done_bytes == total


def test_patterns_choose_files(place: Callable[..., Place]) -> None:
    there = place({**MODEL, "sub/notes.txt": b"n"})
    there.warm("*.ckpt", "sub/*")
    assert set(there.store.fetched()) == {"model.ckpt", "sub/notes.txt"}
    with pytest.raises(IncompleteError, match=r"no file matches '\*\.gguf' or 'x'"):
        there.warm("*.gguf", "x")


def test_all_projectors_of_a_model_are_brought(place: Callable[..., Place]) -> None:
    """One of them is loaded, and the listing does not say which."""
    names = ("m-Q4_K_M.gguf", "mmproj-BF16.gguf", "mmproj-F16.gguf")
    there = place({name: b"GGUF" + bytes(2 * BLOCK) for name in names})
    there.warm()
    assert set(there.store.fetched()) == set(names)


def test_without_a_model_everything_is_brought(place: Callable[..., Place]) -> None:
    there = place({"a.txt": b"a", "b/c.txt": b"bc"})
    there.warm()
    assert there.store.fetched() == {"a.txt": 1, "b/c.txt": 2}


def test_an_index_is_kept_and_says_what_is_missing(place: Callable[..., Place]) -> None:
    index = json.dumps({"weight_map": {"t": FIRST, "u": "model-00003-of-00003.safetensors"}})
    there = place({"model.safetensors.index.json": index.encode(), FIRST: shard()})
    with pytest.raises(IncompleteError, match=r"but the model is broken: .*00003-of-00003"):
        there.warm()
    assert there.store.fetched()["model.safetensors.index.json"] == len(index)


def test_small_files_come_before_weights(place: Callable[..., Place]) -> None:
    there = place(memory_limit=4 * BLOCK, max_concurrency=1)
    there.warm()
    keys = [key for key, _, _ in there.store.asked]
    assert keys == ["config.json", *[FIRST] * 4, *[SECOND] * 4]


def test_files_that_no_loader_can_read_are_named(place: Callable[..., Place]) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
    there = place({"config.json": pointer, "model.safetensors": shard()[:-9]})
    with pytest.raises(IncompleteError, match=r"but the model is broken: .* \(and 1 more\)"):
        there.warm()
    there.warm("*"), "what was asked for by name is brought as it is"


def test_a_header_that_spans_blocks_is_read_whole(place: Callable[..., Place]) -> None:
    table = {
        f"layer.{n}": {"dtype": "U8", "shape": [1], "data_offsets": [n, n + 1]} for n in range(3000)
    }
    text = json.dumps(table).encode()
    assert len(text) > 2 * BLOCK
    content = len(text).to_bytes(8, "little") + text + bytes(3000)
    place({"model.safetensors": content}).warm()
    with pytest.raises(IncompleteError, match="the model is broken"):
        place({"model.safetensors": content[:-1]}).warm()


def test_a_file_that_may_not_be_read_is_named_once_and_others_come(
    place: Callable[..., Place],
) -> None:
    there = place()
    there.store.refused.add(FIRST)
    size = len(MODEL[FIRST])
    with pytest.raises(IncompleteError, match=f"{size // 1024}.* are not in the cache: .*denied$"):
        there.warm()
    assert there.warmer.progress.problems == [f"memory/{FIRST}: denied"]
    assert there.holds_all(SECOND)
    assert not any(there.cache.is_claimed(there.file(FIRST), number) for number in range(4))


def test_a_cache_without_room_ends_it(place: Callable[..., Place]) -> None:
    there = place(cache_size=2 * BLOCK, memory_limit=4 * BLOCK, max_concurrency=1)
    with pytest.raises(IncompleteError, match="not in the cache: there is no room for them; see"):
        there.warm()
    assert len(there.store.asked) < 8


def test_blocks_that_another_process_fetches_are_left_to_it(
    place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    there, looks = place(), 0
    claim = there.cache.load_or_claim

    def load_or_claim(file: File, number: int) -> memoryview | Claim:
        nonlocal looks
        if file.key == FIRST and number == 1:
            looks += 1
            if looks < 3:
                return Claim.THEIRS
            there.cache.put(file, number, MODEL[FIRST][BLOCK : 2 * BLOCK])
        return claim(file, number)

    monkeypatch.setattr(there.cache, "load_or_claim", load_or_claim)
    monkeypatch.setattr(warm, "LOOK_S", 0.001)
    there.warm()
    assert there.store.fetched()[FIRST] == len(MODEL[FIRST]) - BLOCK
    assert there.holds_all(FIRST)
    assert there.warmer.progress.done_bytes == there.warmer.progress.total_bytes


def test_a_block_that_another_process_never_brings_is_brought(
    place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = place()
    monkeypatch.setattr(warm, "LOOK_S", 0.001)
    monkeypatch.setattr(warm, "LEASE_S", 0.01)
    monkeypatch.setattr(there.cache, "load_or_claim", lambda file, number: Claim.THEIRS)
    there.warm("*.ckpt")
    assert there.store.fetched() == {"model.ckpt": 100}


class TestVerify:
    def test_all_is_read_back_and_compared(self, place: Callable[..., Place]) -> None:
        there = place()
        there.warm(verify=True)
        progress = there.warmer.progress
        assert progress.verified_bytes == progress.total_bytes
        assert progress.compared_files == 3
        assert progress.damaged_blocks == 0

    def test_damaged_blocks_are_brought_again(
        self, place: Callable[..., Place], tmp_path: Path
    ) -> None:
        there = place()
        there.warm()
        damaged = next(path for path in tmp_path.glob("??/*") if path.stat().st_size > BLOCK)
        content = bytearray(damaged.read_bytes())
        content[100] ^= 255
        damaged.write_bytes(content)
        asked = len(there.store.asked)
        there.warm(verify=True)
        assert len(there.store.asked) == asked + 1
        assert there.warmer.progress.damaged_blocks == 1
        assert there.warmer.progress.compared_files == 3, "in the second round"

    def test_without_verification_damage_is_not_looked_for(
        self, place: Callable[..., Place]
    ) -> None:
        there = place()
        there.warm()
        assert there.warmer.progress.verified_bytes == 0
        assert there.warmer.progress.compared_files == 0

    def test_what_has_another_checksum_is_dropped(self, place: Callable[..., Place]) -> None:
        there = place()
        there.store.sums[FIRST] = "AAAAAA=="
        with pytest.raises(IncompleteError, match="has not the CRC32 checksum that S3 keeps"):
            there.warm(verify=True)
        assert there.cache.present(there.file(FIRST)) == []
        assert there.warmer.progress.compared_files == 2

    def test_an_object_that_was_replaced_is_named(self, place: Callable[..., Place]) -> None:
        there = place()
        there.warm()
        there.store.objects[FIRST] = b"other"
        with pytest.raises(IncompleteError, match=r"but not all is verified: .* is another one$"):
            there.warm(verify=True)
        assert there.warmer.progress.compared_files == 2

    def test_without_a_checksum_all_is_still_read_back(self, place: Callable[..., Place]) -> None:
        there = place()
        there.store.sums[FIRST] = AccessDeniedError("no HEAD")
        with pytest.raises(IncompleteError, match="not compared with a checksum of S3: no HEAD"):
            there.warm(verify=True)
        progress = there.warmer.progress
        assert progress.verified_bytes == progress.total_bytes
        assert progress.compared_files == 2


def test_a_slow_disk_does_not_hang_while_blocks_wait_for_it(place: Callable[..., Place]) -> None:
    class Slow:
        async def run(self, function: Callable[..., object], *arguments: object) -> object:
            await trio.sleep(warm.DISK_PATIENCE_S / 10)
            return function(*arguments)

    warmer = place().warmer
    made: list[int] = []
    memory = BlockMemory(1 << 30, BLOCK, BlockMap(BLOCK), lambda: 1)
    warmer._calls = DiskCalls(cast(Threads, Slow()), memory, "/cache")

    async def main() -> None:
        async with trio.open_nursery() as watching:
            watching.start_soon(warmer._calls.watch)
            async with trio.open_nursery() as nursery:
                for number in range(20 * MOST_OTHERS):
                    nursery.start_soon(warmer._on_disk, made.append, number)
            watching.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert len(made) == 20 * MOST_OTHERS
