"""What is stored into the kernel's page cache, and how much may be there."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import pytest
import trio

from lazyfs.movers.call import MoverFaultError, MoverLostError
from lazyfs.movers.pool import Movers
from lazyfs.pagecache import page_cache
from lazyfs.pagecache.page_cache import (
    BUDGET_AGE_S,
    PIECE,
    SHARE_AHEAD,
    SHARE_FOR_ALL,
    PageCache,
)  # fmt: skip

GIB = 1 << 30
# linux/fuse.h: fuse_out_header, then fuse_notify_store_out.
HEADER = struct.Struct("<IiQQQII")
NOTIFY_STORE = 4


class Kernel:
    """In the place of `os.writev`.

    Attributes:
        stored: device, inode, offset and bytes of each store.
        error: the kernel's answer.
    """

    def __init__(self) -> None:
        self.stored: list[tuple[int, int, int, bytes]] = []
        self.error: int | None = None
        self.on_store: Callable[[], None] = lambda: None

    def writev(self, device: int, parts: list[bytes | memoryview]) -> int:
        head, data = parts
        size, code, unique, inode, offset, length, _ = HEADER.unpack(head)
        assert (size, length) == (HEADER.size + len(data), len(data))
        assert (code, unique) == (NOTIFY_STORE, 0)
        self.on_store()
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        self.stored.append((device, inode, offset, bytes(data)))
        return size


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    made = Kernel()
    monkeypatch.setattr(page_cache.os, "writev", made.writev)
    return made


def opened(setting: int | str = "auto") -> PageCache:
    made = PageCache(setting)
    made.device = 77
    return made


class TestPush:
    def test_a_block_is_stored_in_pieces(self, kernel: Kernel) -> None:
        made, data = opened(), os.urandom(2 * PIECE + 5)
        assert made.push(9, 1000, memoryview(data))
        assert [(device, inode, at) for device, inode, at, _ in kernel.stored] == [
            (77, 9, 1000), (77, 9, 1000 + PIECE), (77, 9, 1000 + 2 * PIECE),
        ]  # fmt: skip
        assert b"".join(part for *_, part in kernel.stored) == data
        assert made.pushed_bytes == len(data)
        assert made.push(9, 0, memoryview(b"more"))
        assert made.pushed_bytes == len(data) + 4

    def test_nothing_is_stored_before_the_mount_begins_and_after_it_ends(
        self, kernel: Kernel
    ) -> None:
        made = PageCache("auto")
        assert not made.push(9, 0, memoryview(b"x"))
        made.device = 77
        made.stop()
        assert not made.push(9, 0, memoryview(b"x"))
        assert kernel.stored == []

    def test_the_end_of_a_mount_ends_a_push(self, kernel: Kernel) -> None:
        made = opened()
        kernel.on_store = made.stop
        assert not made.push(9, 0, memoryview(bytes(3 * PIECE)))
        assert len(kernel.stored) == 1
        assert made.pushed_bytes == 0

    def test_it_is_busy_while_it_pushes(self, kernel: Kernel) -> None:
        made = opened()
        seen = []
        kernel.on_store = lambda: seen.append(made.busy)
        made.push(9, 0, memoryview(b"x"))
        kernel.error = errno.ENOENT
        made.push(9, 0, memoryview(b"x"))
        assert seen == [True, True]
        assert not made.busy

    @pytest.mark.parametrize("code", [errno.ENOENT, errno.ENODEV, errno.EINTR, errno.EBADF])
    def test_an_inode_that_the_kernel_does_not_know_is_no_trouble(
        self, kernel: Kernel, code: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        made = opened()
        kernel.error = code
        assert not made.push(9, 0, memoryview(b"x"))
        assert made.supported
        assert made.pushed_bytes == 0
        assert caplog.messages == []

    def test_other_errors_are_logged(
        self, kernel: Kernel, caplog: pytest.LogCaptureFixture
    ) -> None:
        made = opened()
        kernel.error = errno.ENOMEM
        assert not made.push(9, 0, memoryview(b"x"))
        assert made.supported
        (message,) = caplog.messages
        assert "pages of inode 9" in message
        assert "Cannot allocate memory" in message

    def test_a_kernel_without_this_is_not_asked_again(self, kernel: Kernel) -> None:
        made = opened()
        kernel.error = errno.ENOSYS
        assert not made.push(9, 0, memoryview(b"x"))
        assert not made.supported
        assert made.budget(lambda: 1, 0) == 0

    def test_movers_store_large_blocks(self, kernel: Kernel) -> None:
        class FakeMovers:
            def __init__(self) -> None:
                self.calls: list[tuple[object, ...]] = []
                self.error: Exception | None = None

            async def run(
                self, function: object, *arguments: object,
                buffer: Sequence[memoryview], ended: Callable[[], None],
            ) -> None:  # fmt: skip
                self.calls.append((function, *arguments, [len(part) for part in buffer]))
                assert made.busy
                ended()
                if self.error is not None:
                    raise self.error

        made, movers = opened(), FakeMovers()

        def push(offset: int, *sizes: int) -> bool | None:
            parts = [
                (offset + number, memoryview(bytes(size))) for number, size in enumerate(sizes)
            ]
            return trio.run(made.push_elsewhere, 9, parts)

        assert push(0, 2 * PIECE) is None, "there are no movers"
        made.movers = cast(Movers, movers)
        assert push(0, PIECE) is None, "a call costs more than that"
        assert movers.calls == []
        assert push(4096, PIECE, 1)
        assert movers.calls == [(page_cache.store_pieces, 9, [4096, 4097], [PIECE, 1])]
        assert made.pushed_bytes == PIECE + 1
        for error in (MoverLostError("died"), MoverFaultError("fault")):
            movers.error = error
            assert push(0, 2 * PIECE) is None, "the worker stores it"
        movers.error = OSError(errno.ENOENT, "unknown")
        assert push(0, 2 * PIECE) is False, "the mover had the kernel's answer"
        assert not made.busy
        assert made.pushed_bytes == PIECE + 1
        made.stop()
        assert push(0, 2 * PIECE) is None
        assert len(movers.calls) == 4, "the mount ends"
        assert kernel.stored == []

    def test_what_a_mover_does(self, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(page_cache, "lent", {page_cache.DEVICE: 5}.__getitem__)
        data = os.urandom(PIECE + 7)
        page_cache.store_pieces(9, [100, 5 * PIECE], memoryview(data), memoryview(b"more"))
        assert kernel.stored == [
            (5, 9, 100, data[:PIECE]), (5, 9, 100 + PIECE, data[PIECE:]),
            (5, 9, 5 * PIECE, b"more"),
        ]  # fmt: skip


class TestBudget:
    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine with 10 GiB of free memory, at a time that tests set."""
        self.free, self.now_s = 10 * GIB, 100.0
        monkeypatch.setattr(page_cache, "free_memory", lambda: self.free)
        monkeypatch.setattr(page_cache.time, "monotonic", lambda: self.now_s)

    def test_a_setting_in_bytes_is_taken(self) -> None:
        assert opened(5).budget(lambda: GIB, 0) == 5

    def test_there_is_none_without_a_device_or_if_it_is_off(self) -> None:
        assert PageCache("auto").budget(lambda: 1, 0) == 0
        assert PageCache(5).budget(lambda: 1, 0) == 0
        assert opened("off").budget(lambda: 1, 0) == 0
        assert not opened("off").supported

    def test_all_of_a_model_that_fits_may_be_there(self) -> None:
        room = int(8 * GIB * SHARE_FOR_ALL)
        assert opened().budget(lambda: room, 2 * GIB) == room

    @pytest.mark.parametrize(
        ("free", "inactive"),
        [(GIB // 2, GIB // 4), (GIB, GIB // 4), (8 * GIB, 8 * GIB // 9), (24 * GIB, 24 * GIB // 16),
         (256 * GIB, 256 * GIB // 51)],
    )  # fmt: skip
    def test_of_a_larger_model_unread_pages_take_half_of_the_inactive_ones(
        self, free: int, inactive: int
    ) -> None:
        """The kernel keeps the pages that were read, and drops inactive ones."""
        self.free = free
        assert opened().budget(lambda: free, 0) == int(inactive * SHARE_AHEAD)

    def test_memory_that_is_short_leaves_none(self) -> None:
        assert opened().budget(lambda: GIB, 11 * GIB) == 0

    def test_the_memory_is_looked_at_once_in_a_while(self) -> None:
        made = opened()
        first = made.budget(lambda: GIB, 0)
        self.free = GIB
        self.now_s += BUDGET_AGE_S - 0.01
        assert made.budget(lambda: GIB, 0) == first
        self.now_s += 0.01
        assert made.budget(lambda: GIB, 0) == GIB // 4 * SHARE_AHEAD

    def test_the_first_question_is_answered_at_once(self) -> None:
        self.now_s = 0.0
        assert opened().budget(lambda: GIB, 0) == int(10 * GIB * SHARE_FOR_ALL)
