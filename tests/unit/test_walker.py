"""Which directories the kernel looks up ahead of readers."""

from __future__ import annotations

from typing import cast

import pytest
import trio
import trio.testing

from lazyfs.helper_process import HelperProcesses
from lazyfs.listed_object import File
from lazyfs.pagecache import walker
from lazyfs.pagecache.walker import Walker


class Helpers:
    def __init__(self) -> None:
        self.looked: list[set[bytes]] = []
        self.error: OSError | None = None

    async def run(self, what: str, given: bytes) -> bytes:
        assert what == "look_up"
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        self.looked.append(set(given.split(b"\0")))
        return b""


def file(inode: int, parent: int) -> File:
    return File(inode, parent, f"f{inode}", f"d{parent}/é/f{inode}", 1, "e", 0)


def look(helpers: Helpers, *plans: list[File]) -> None:
    """Look up the files of plans, one after the other."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            made = Walker(lambda each: each.key, cast(HelperProcesses, helpers), nursery)
            for plan in plans:
                made.look_up(plan)
                await trio.testing.wait_all_tasks_blocked()

    trio.run(main)


def test_each_directory_is_looked_up_once() -> None:
    helpers = Helpers()
    first = [file(10, 1), file(11, 1), file(12, 2)]
    look(helpers, first, first, [*first, file(13, 3)], [])
    assert helpers.looked == [{"d1/é".encode(), "d2/é".encode()}, {"d3/é".encode()}]


def test_only_so_many_directories_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walker, "MOST_DIRECTORIES", 2)
    helpers = Helpers()
    look(helpers, [file(inode, inode) for inode in range(5)])
    assert helpers.looked == [{"d0/é".encode(), "d1/é".encode()}]


def test_without_a_helper_process_a_mount_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    helpers = Helpers()
    helpers.error = OSError("no process")
    look(helpers, [file(10, 1)])
    assert "files cannot be looked up ahead" in caplog.text
    assert "no process" in caplog.text
