"""What a mount plans to fetch, and which headers it reads, as files are opened and read."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from lazyfs.blocks import BlockId, Span
from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.file_blocks import Place
from lazyfs.errors import AccessDeniedError
from lazyfs.listed_object import File, ListedObject
from lazyfs.namespace.catalog import Catalog
from lazyfs.namespace.listing_log import ListingLog
from lazyfs.observe.events import EventKind
from lazyfs.observe.recorder import Recorder
from lazyfs.options.mount_options import MountOptions
from lazyfs.prefetch import model_contents
from lazyfs.prefetch.planner import MOST_BLOCKS, TABLES_AHEAD, Planner
from lazyfs.prefetch.prefetcher import Prefetcher
from lazyfs.store.listing_page import Page
from lazyfs.store.protocol import Store

MIB = 1 << 20
OPTIONS = replace(MountOptions(), block_size=MIB, memory_limit=4 * MIB)
SHARD_BYTES = 40 * MIB
CONFIG = {"config.json": b"{}"}
DENIED = AccessDeniedError("denied")


def header(count: int = 2, size_bytes: int = SHARD_BYTES) -> bytes:
    """The header of a shard with so many tensors."""
    length = 100 * count
    bounds = [at * (size_bytes - 8 - length) // count for at in range(count + 1)]
    table = {
        f"t.{at}": {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for at, (begin, end) in enumerate(pairwise(bounds))
    }
    return length.to_bytes(8, "little") + json.dumps(table).encode().ljust(length)


def shards(count: int, directory: str = "") -> list[str]:
    return [f"{directory}model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]


class Listing:
    """A store that lists one page, or refuses to."""

    url = SimpleNamespace(bucket="b", prefix="")

    def __init__(self, sizes: dict[str, int]) -> None:
        self.page = Page([ListedObject(key, sizes[key], "e", 0, key) for key in sizes], [], None)
        self.error: Exception | None = None

    def name(self, key: str) -> str:
        return key

    def list_page(self, prefix: str, token: str | None, **_: object) -> Page:
        if self.error is not None:
            raise self.error
        return self.page


class Blocks:
    """What a planner asks of a fetcher.

    Attributes:
        headers: of shards; None: it is too long. Shards that are not named have a valid one.
        errors: by key, raised instead of an answer.
        asked: the files whose headers were read, in order.
        abandoned: files whose requests were ended.
        read: the files of which blocks were read for the plan.
        scans: the files of each plan.
        coming: files whose headers are on their way.
        here: files whose headers are in memory.
    """

    block_size = MIB

    def __init__(self, blocks: BlockMap, contents: dict[str, bytes]) -> None:
        self._blocks = blocks
        self._contents = contents
        self.headers: dict[str, bytes | None] = {}
        self.errors: dict[str, Exception] = {}
        self.asked: list[str] = []
        self.read_blocks: list[str] = []
        self.scans: list[list[str]] = []
        self.coming: set[str] = set()
        self.here: set[str] = set()
        self.pumps = 0
        self.abandoned: list[str] = []

    def add_file(self, file: File) -> None:
        self._blocks.add_file(file.inode, file.size_bytes)

    async def scan(self, files: Sequence[File]) -> None:
        for file in files:
            self.add_file(file)
        self.scans.append([file.key for file in files])

    def pump(self) -> None:
        self.pumps += 1

    def abandon(self, files: Iterable[File]) -> None:
        self.abandoned += (file.key for file in files)

    def has_header(self, file: File) -> bool:
        return file.key in self.here

    def is_coming(self, file: File) -> bool:
        return file.key in self.coming

    async def header(self, file: File) -> memoryview | None:
        self.asked.append(file.key)
        await trio.lowlevel.checkpoint()
        if file.key in self.errors:
            raise self.errors[file.key]
        found = self.headers.get(file.key, header())
        return None if found is None else memoryview(found)

    async def read(self, file: File, span: Span, *, reader: bool = True) -> memoryview:
        assert not reader, "what is read for the plan is not a read of a loader"
        self.read_blocks.append(file.key)
        await trio.lowlevel.checkpoint()
        if file.key in self.errors:
            raise self.errors[file.key]
        begin = span.number * MIB
        return memoryview(self._contents[file.key])[begin + span.start : begin + span.stop]


class Mount:
    """A planner over listed files.

    Args:
        files: the contents of each, or its size.
        wanted: the tensors that may be fetched ahead.

    Attributes:
        wanted: what `on_wanted` was told.
    """

    def __init__(
        self,
        files: dict[str, Any],
        options: MountOptions = OPTIONS,
        wanted: Callable[[str], bool] | None = None,
    ) -> None:
        contents = {key: each for key, each in files.items() if isinstance(each, bytes)}
        sizes = {key: len(contents[key]) if key in contents else files[key] for key in files}
        self.listing = Listing(sizes)
        self.recorder = Recorder()
        self.catalog = Catalog(cast(Store, self.listing), options, ListingLog(), self.recorder)
        self.prefetcher = Prefetcher(options.prefetch, BlockMap(MIB), wanted=wanted)
        self.blocks = Blocks(self.prefetcher.blocks, contents)
        self.planner = Planner(self.catalog, self.blocks, self.prefetcher, self.recorder, options)
        self.wanted: list[list[str]] = []
        self.planner.on_wanted = lambda files: self.wanted.append([file.key for file in files])

    def file(self, key: str) -> File:
        return next(file for file in self.catalog.tree.files() if file.key == key)

    async def open(self, key: str) -> None:
        """A reader opens a file."""
        self.blocks.add_file(self.file(key))
        self.planner.opened(self.file(key))
        await trio.testing.wait_all_tasks_blocked()

    async def load(self, key: str) -> None:
        """A reader opens a file and reads the middle of it."""
        await self.open(key)
        for number in (20, 21):
            self.prefetcher.was_read(self.file(key).inode, number * MIB, MIB)
        await trio.testing.wait_all_tasks_blocked()

    async def header_comes(self, key: str) -> None:
        """The header of a shard has been fetched."""
        self.prefetcher.head_came(self.file(key).inode)
        await trio.testing.wait_all_tasks_blocked()

    def knows(self, key: str) -> bool:
        """Whether it is known what tensors are in a shard, if any."""
        return self.prefetcher.knows_tensors(self.file(key).inode)

    def has_tensors(self, key: str) -> bool:
        """Whether a shard is fetched tensor by tensor."""
        return bool(self.prefetcher.blocks.files[self.file(key).inode].roles)


async def run_inline(
    work: Callable[..., object], *arguments: object, limiter: Any = None, **_: object
) -> object:
    """In the place of `trio.to_thread.run_sync`: what is done is done before tasks are idle."""
    await trio.lowlevel.checkpoint()
    return work(*arguments)


@asynccontextmanager
async def planned(mount: Mount) -> AsyncIterator[Mount]:
    """The mount, after its first plan and while its planner runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trio.to_thread, "run_sync", run_inline)
        if mount.listing.error is None:
            await mount.catalog.open()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mount.planner.run)
            await trio.testing.wait_all_tasks_blocked()
            yield mount
            nursery.cancel_scope.cancel()


def model(count: int = 2) -> dict[str, Any]:
    return {**CONFIG, **dict.fromkeys(shards(count), SHARD_BYTES)}


def run(steps: Callable[[Mount], Awaitable[None]], mount: Mount) -> Mount:
    """Plan a mount, and do some steps with it."""

    async def main() -> None:
        async with planned(mount):
            await steps(mount)

    trio.run(main)
    return mount


async def nothing(mount: Mount) -> None:
    """No step."""


def index(names: Iterable[str]) -> bytes:
    return json.dumps({"weight_map": {f"t.{at}": name for at, name in enumerate(names)}}).encode()


class TestPlan:
    def test_one_model_is_planned_at_mount_small_files_first(self) -> None:
        mount = run(nothing, Mount(dict(reversed(model().items()))))
        assert mount.blocks.scans == [["config.json", *shards(2)]]
        assert mount.wanted == [["config.json", *shards(2)]]
        order = [mount.file(key).inode for key in ("config.json", *shards(2))]
        assert list(mount.prefetcher.blocks.order) == order
        assert mount.planner.planned
        assert mount.blocks.pumps == 1

    def test_the_recorder_is_told_how_much_there_is(self) -> None:
        mount = run(nothing, Mount(model()))
        plans = [
            event
            for event in mount.recorder.events.newest_first()
            if event.kind == EventKind.PLANNED
        ]
        assert [event.size for event in plans] == [2 * SHARD_BYTES + len(b"{}")]

    def test_headers_of_large_shards_are_wanted_by_themselves(self) -> None:
        files = {**CONFIG, "model.safetensors": SHARD_BYTES, "model-extra.safetensors": 900}
        mount = run(nothing, Mount(files))
        heads = list(iter(mount.prefetcher.next_head, None))
        assert heads == [mount.file("model.safetensors").inode]

    def test_a_listing_that_is_refused_leaves_nothing_to_plan(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        mount = Mount(model())
        mount.listing.error = DENIED
        run(nothing, mount)
        assert mount.blocks.scans == [[]]
        assert mount.planner.planned
        assert caplog.messages == ["prefetching does not begin with the mount: denied"]

    def test_a_shard_of_an_impossible_size_is_left_out(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        first, second = shards(2)
        mount = run(nothing, Mount({first: MOST_BLOCKS * MIB, second: MOST_BLOCKS * MIB + 1}))
        assert mount.blocks.scans == [[first]]
        told = f"{second}: not prefetched, because it has {MOST_BLOCKS * MIB + 1} bytes"
        assert told in caplog.messages

    def test_each_warning_about_a_model_is_logged_once(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def steps(mount: Mount) -> None:
            await mount.load("consolidated.00.pth")

        first, _ = shards(2)
        files = {**CONFIG, first: SHARD_BYTES, "consolidated.00.pth": SHARD_BYTES}
        mount = run(steps, Mount(files))
        assert len(mount.blocks.scans) == 2
        assert sum("00002" in message for message in caplog.messages) == 1


class TestIndex:
    def test_an_index_says_what_belongs_to_a_model(self) -> None:
        files = {
            "a.safetensors": SHARD_BYTES,
            "b.safetensors": SHARD_BYTES,
            "model.safetensors.index.json": index(["b.safetensors", "a.safetensors"]),
        }
        mount = run(nothing, Mount(files))
        assert mount.blocks.read_blocks == ["model.safetensors.index.json"]
        assert len(mount.blocks.scans) == 1, "the index is read before the plan is made"
        assert mount.blocks.scans[0][-2:] == ["a.safetensors", "b.safetensors"]

    def test_an_index_is_read_block_by_block(self) -> None:
        missing = [f"{'x' * 900}-{n}.safetensors" for n in range(2_400)]
        long = index([*missing, "b.safetensors", "a.safetensors"])
        assert len(long) > 2 * MIB
        name = "model.safetensors.index.json"
        files = {"a.safetensors": SHARD_BYTES, "b.safetensors": SHARD_BYTES, name: long}
        mount = run(nothing, Mount(files, replace(OPTIONS, memory_limit=512 * MIB)))
        assert mount.blocks.read_blocks == [name] * 3
        assert mount.blocks.scans[0][-2:] == ["a.safetensors", "b.safetensors"]

    def test_an_index_that_takes_too_much_memory_is_ignored(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        costly = index(f"{n}.safetensors" for n in range(10_000))
        name = "model.safetensors.index.json"
        run(nothing, Mount({**model(), name: costly}))
        assert (
            f"{name} is ignored, because parsing it takes too much of --memory-limit" in caplog.text
        )

    def test_an_index_that_cannot_be_read_leaves_the_names(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        mount = Mount({**model(), "model.safetensors.index.json": index(shards(2))})
        mount.blocks.errors["model.safetensors.index.json"] = DENIED
        run(nothing, mount)
        assert mount.blocks.scans[0][-2:] == shards(2)
        assert "is ignored" not in caplog.text, "its cost is not what is wrong with it"


class TestFollowing:
    def test_one_of_several_models_is_planned_when_a_small_file_of_it_is_opened(self) -> None:
        async def steps(mount: Mount) -> None:
            assert mount.blocks.scans == [[]]
            await mount.open("b/config.json")
            assert mount.blocks.scans[1:] == [["b/config.json", *shards(1, "b/")]]

        run(steps, Mount({f"{name}/{key}": 9 for name in "ab" for key in (*CONFIG, *shards(1))}))

    def test_opening_weights_is_no_reason_to_plan_and_reading_them_is(self) -> None:
        async def steps(mount: Mount) -> None:
            (shard,) = shards(1, "a/")
            await mount.open(shard)
            assert mount.blocks.scans == [[]]
            await mount.load(shard)
            assert mount.blocks.scans[-1] == ["a/config.json", shard]

        sizes = {**CONFIG, **dict.fromkeys(shards(1), SHARD_BYTES)}
        run(steps, Mount({f"{name}/{key}": sizes[key] for name in "ab" for key in sizes}))

    def test_prefetch_on_open_waits_for_any_file_of_the_model(self) -> None:
        async def steps(mount: Mount) -> None:
            assert mount.blocks.scans == [[]]
            await mount.open(shards(2)[1])
            await mount.open("config.json")
            assert mount.blocks.scans[-1] == ["config.json", *shards(2)]

        run(steps, Mount(model(), replace(OPTIONS, prefetch_on="open")))

    def test_files_that_change_nothing_are_not_planned_for(self) -> None:
        async def steps(mount: Mount) -> None:
            for key in ("config.json", shards(2)[0], "notes.bak/x.bin.tmp"):
                await mount.open(key)
                await mount.open(key)
            assert len(mount.blocks.scans) == 1

        run(steps, Mount({**model(), "notes.bak/x.bin.tmp": 5}))

    def test_a_copy_that_is_read_takes_the_place_of_the_model(self) -> None:
        async def steps(mount: Mount) -> None:
            assert mount.blocks.scans == [["config.json", *shards(2)]]
            assert mount.blocks.abandoned == []
            await mount.load("consolidated.00.pth")
            assert mount.blocks.abandoned == shards(2)
            assert mount.blocks.scans[1:] == [["config.json", "consolidated.00.pth"]]
            assert mount.wanted[-1] == ["config.json", "consolidated.00.pth"]

        run(steps, Mount({**model(), "consolidated.00.pth": SHARD_BYTES}))


class TestTensors:
    def test_the_header_of_a_shard_is_read_once_when_it_comes(self) -> None:
        async def steps(mount: Mount) -> None:
            first, second = shards(2)
            await mount.header_comes(second)
            assert mount.blocks.asked == [second]
            assert mount.has_tensors(second)
            assert not mount.knows(first)
            pumps = mount.blocks.pumps
            await mount.header_comes(second)
            await mount.open(second)
            assert mount.blocks.asked == [second]
            await mount.header_comes(first)
            assert mount.blocks.pumps == pumps + 1, "what is fetched next may have changed"

        run(steps, Mount(model()))

    def test_headers_far_behind_the_first_are_read_when_a_reader_comes_near(self) -> None:
        names = shards(2 * TABLES_AHEAD)

        async def steps(mount: Mount) -> None:
            for name in names:
                await mount.header_comes(name)
            assert mount.blocks.asked == names[:TABLES_AHEAD]
            await mount.open(names[1])
            assert sorted(mount.blocks.asked) == names[: TABLES_AHEAD + 2]

        run(steps, Mount(dict.fromkeys(names, SHARD_BYTES)))

    def test_a_header_that_a_reader_came_near_is_read_when_it_comes(self) -> None:
        names = shards(TABLES_AHEAD + 2)

        async def steps(mount: Mount) -> None:
            await mount.header_comes(names[TABLES_AHEAD + 1])
            assert mount.blocks.asked == []
            await mount.open(names[0])
            assert mount.blocks.asked == [names[0]]
            await mount.header_comes(names[TABLES_AHEAD])
            assert mount.blocks.asked == [names[0], names[TABLES_AHEAD]]

        run(steps, Mount(dict.fromkeys(names, SHARD_BYTES)))

    def test_the_header_of_any_shard_is_read_when_it_is_opened(self) -> None:
        async def steps(mount: Mount) -> None:
            await mount.open(shards(2)[1])
            assert mount.blocks.asked == [shards(2)[1]]
            await mount.open("config.json")
            assert mount.blocks.asked == [shards(2)[1]]

        run(steps, Mount(model()))

    def test_a_header_on_its_way_is_read_when_it_has_come(self) -> None:
        async def steps(mount: Mount) -> None:
            first = shards(2)[0]
            mount.blocks.coming.add(first)
            await mount.open(first)
            assert mount.blocks.asked == []
            mount.blocks.coming.clear()
            await mount.header_comes(first)
            assert mount.has_tensors(first)

        run(steps, Mount(model()))

    def test_a_header_that_lies_only_in_the_page_cache_is_not_fetched_again(self) -> None:
        async def steps(mount: Mount) -> None:
            first, second = shards(2)
            for key in (first, second):
                inode = mount.file(key).inode
                for number in range(SHARD_BYTES // MIB):
                    mount.prefetcher.blocks.moved(BlockId(inode, number), Place.NEAR)
            mount.blocks.here.add(second)
            await mount.open(first)
            await mount.open(second)
            assert mount.blocks.asked == [second]

        run(steps, Mount(model()))

    def test_the_policy_headers_has_no_use_for_tensors(self) -> None:
        async def steps(mount: Mount) -> None:
            await mount.open(shards(2)[0])
            await mount.header_comes(shards(2)[1])

        assert run(steps, Mount(model(), replace(OPTIONS, prefetch="headers"))).blocks.asked == []
        chosen = replace(OPTIONS, prefetch="headers", tensors="t.0")
        mount = Mount(model(), chosen, wanted=lambda name: name == "t.0")
        assert run(steps, mount).blocks.asked == shards(2)

    @pytest.mark.parametrize(
        ("found", "reason"),
        [
            (None, "its header is very long"),
            (header(3000), "its header takes much memory"),
            (header().replace(b"U8", b"??"), "its header is not valid"),
        ],
        ids=["long", "costly", "malformed"],
    )
    def test_without_a_usable_header_a_shard_is_fetched_by_offset(
        self, caplog: pytest.LogCaptureFixture, found: bytes | None, reason: str
    ) -> None:
        caplog.set_level("INFO", model_contents.__name__)
        first, second = shards(2)
        mount = Mount(model())
        mount.blocks.headers[first] = found

        async def steps(mount: Mount) -> None:
            for _ in range(2):
                await mount.open(first)
                await mount.header_comes(first)

        run(steps, mount)
        assert mount.knows(first)
        assert not mount.has_tensors(first)
        assert not mount.knows(second)
        assert mount.blocks.asked == [first], "it is not read again and again"
        assert [
            f"{first}: prefetched by offset, because {reason}" in m for m in caplog.messages
        ] == [True]

    def test_an_empty_shard_has_no_header(self, caplog: pytest.LogCaptureFixture) -> None:
        async def steps(mount: Mount) -> None:
            await mount.open("model.safetensors")

        mount = run(steps, Mount({**CONFIG, "model.safetensors": b""}))
        assert mount.blocks.asked == []
        assert "the file is empty" in caplog.text

    def test_a_header_that_cannot_be_fetched_is_tried_again_later(self) -> None:
        async def steps(mount: Mount) -> None:
            first = shards(2)[0]
            mount.blocks.errors[first] = DENIED
            await mount.header_comes(first)
            assert not mount.knows(first)
            mount.blocks.errors.clear()
            await mount.open(first)
            assert mount.has_tensors(first)

        run(steps, Mount(model()))

    def test_only_as_many_tensors_are_known_as_memory_allows(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(model_contents, "TENSORS_PER_MIB", 16)
        first, second = shards(2)

        async def steps(mount: Mount) -> None:
            for key in (first, second):
                mount.blocks.headers[key] = header(count=40)
                await mount.open(key)
            assert mount.has_tensors(first)
            assert mount.knows(second)
            assert not mount.has_tensors(second), "80 of them are more than 64"

        run(steps, Mount(model()))

    def test_where_tensors_are_chosen_all_headers_are_read(self) -> None:
        names = shards(TABLES_AHEAD + 3)
        options = replace(OPTIONS, tensors="t.0")

        async def steps(mount: Mount) -> None:
            await mount.header_comes(names[-1])
            assert mount.blocks.asked == [names[-1]]

        files = dict.fromkeys(names, SHARD_BYTES)
        run(steps, Mount(files, options, wanted=lambda name: name == "t.0"))

    def test_where_tensors_are_chosen_other_formats_are_fetched_whole(self) -> None:
        async def steps(mount: Mount) -> None:
            assert mount.knows("model.gguf")
            assert mount.prefetcher.next_fetch() == (mount.file("model.gguf").inode, 0)

        options = replace(OPTIONS, tensors="t.0")
        run(steps, Mount({"model.gguf": SHARD_BYTES}, options, wanted=lambda name: False))

    def test_where_tensors_are_chosen_a_header_that_came_before_the_plan_is_read(self) -> None:
        first, second = shards(2, "original/")

        async def steps(mount: Mount) -> None:
            mount.blocks.add_file(mount.file(second))
            await mount.header_comes(second)
            assert mount.blocks.asked == [], "it belongs to a copy, which is not loaded"
            await mount.load(first)
            assert mount.blocks.scans[-1] == ["config.json", first, second]
            assert mount.has_tensors(second)

        options = replace(OPTIONS, tensors="t.0")
        files = {**model(), first: SHARD_BYTES, second: SHARD_BYTES}
        run(steps, Mount(files, options, wanted=lambda name: name == "t.0"))
