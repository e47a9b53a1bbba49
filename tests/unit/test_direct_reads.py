"""When direct reads are answered with no bytes."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing

from lazyfs.errors import SourceError
from lazyfs.helper_process import HelperProcesses
from lazyfs.listed_object import File
from lazyfs.pagecache.direct_probe import (
    PROBE_FLAGS,
    SIZE,
    YES,
    continues_in_page_cache,
    read_asynchronously,
)
from lazyfs.pagecache.direct_reads import DirectReads

FILE = File(2, 1, "f", "f", 10_000, "e", 0)
DIRECT = os.O_DIRECT


class Desk:
    """Direct reads of a file, a helper that says what a test wants, and what both were asked."""

    def __init__(self, *, enabled: bool = True) -> None:
        self.says: bytes | OSError = YES
        self.fails = False
        self.fetched: list[int] = []
        self.probed: list[bytes] = []
        helpers = cast(HelperProcesses, self)
        self.reads = DirectReads(lambda file: "m/f", helpers, self._fetch, enabled=enabled)

    async def run(self, helper: str, wanted: bytes) -> bytes:
        assert helper == "direct" and self.fetched
        self.probed.append(wanted)
        if isinstance(self.says, OSError):
            raise self.says
        return self.says

    async def _fetch(self, file: File, offset: int) -> None:
        self.fetched.append(offset)
        if self.fails:
            raise SourceError("away")

    def asks(self, offset: int = 0, flags: int = DIRECT) -> bool:
        return self.reads.answers_empty(FILE, offset, flags)


def play(scenario: Callable[[Desk], Awaitable[None]], desk: Desk | None = None) -> None:
    """Run a scenario beside the task that tests the kernel."""

    async def main() -> None:
        played = desk or Desk()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(played.reads.run)
            await scenario(played)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_the_first_reads_get_their_bytes_and_later_ones_are_continued() -> None:
    async def scenario(desk: Desk) -> None:
        assert not desk.asks(8192)
        await trio.testing.wait_all_tasks_blocked()
        assert desk.fetched == [8192], "the helper must not wait for S3"
        assert desk.probed == [b"2 8192 1808 m/f"]
        assert desk.asks() and desk.asks(8192)
        assert len(desk.probed) == 1

    play(scenario)


def test_while_the_kernel_is_tested_only_the_test_is_answered_empty() -> None:
    async def scenario(desk: Desk) -> None:
        assert desk.asks(flags=PROBE_FLAGS)
        assert not desk.asks()

    play(scenario)


@pytest.mark.parametrize("says", [b"a direct read ended early\n", b"", OSError(1, "no")])
def test_where_the_kernel_does_not_continue_reads_get_their_bytes(says: bytes | OSError) -> None:
    async def scenario(desk: Desk) -> None:
        desk.says = says
        assert not desk.asks()
        await trio.testing.wait_all_tasks_blocked()
        assert desk.reads.continued is False
        assert not desk.asks() and not desk.asks(flags=PROBE_FLAGS)

    play(scenario)


def test_a_read_that_fails_tests_nothing_and_the_next_one_does() -> None:
    async def scenario(desk: Desk) -> None:
        desk.fails = True
        desk.asks()
        await trio.testing.wait_all_tasks_blocked()
        assert desk.reads.continued is None and not desk.probed
        desk.fails = False
        desk.asks(SIZE)
        await trio.testing.wait_all_tasks_blocked()
        assert desk.reads.continued

    play(scenario)


def test_without_a_page_cache_nothing_is_tested() -> None:
    async def scenario(desk: Desk) -> None:
        assert not desk.asks()
        await trio.testing.wait_all_tasks_blocked()
        assert not desk.probed

    play(scenario, Desk(enabled=False))


def test_the_probe_reads_both_ways(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(2 * SIZE))
    inode = path.stat().st_ino
    assert continues_in_page_cache(tmp_path, path.name, inode, SIZE, SIZE)
    assert not continues_in_page_cache(tmp_path, path.name, inode, SIZE, SIZE + 1), (
        "fewer bytes than there are"
    )
    assert not continues_in_page_cache(tmp_path, path.name, inode + 1, 0, SIZE), "another file"


def test_an_asynchronous_read_that_cannot_be_made_is_an_error() -> None:
    import mmap

    with pytest.raises(OSError, match="Bad file descriptor"):
        read_asynchronously(-1, mmap.mmap(-1, SIZE), 0)
