"""What is chosen for a machine."""

from __future__ import annotations

import resource

import pytest

from lazyfs.machine import all_memory, auto_memory, auto_movers, auto_requests, free_memory

MIB, GIB = 1 << 20, 1 << 30
BLOCK = 8 * MIB


@pytest.mark.parametrize(
    ("processors", "memory", "blocks", "requests", "movers"),
    [
        (1, 2 * GIB, 256 * MIB, 64, 0),
        (2, 24 * GIB, 256 * MIB, 64, 0),
        (4, 64 * GIB, 512 * MIB, 64, 2),
        (16, 64 * GIB, 1632 * MIB, 204, 8),
        (96, 1024 * GIB, 12 * GIB, 1024, 48),
        (192, 2048 * GIB, 16 * GIB, 1024, 96),
    ],
)
def test_limits_grow_with_the_machine(
    processors: int,
    memory: int,
    blocks: int,
    requests: int,
    movers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1 << 20))
    assert auto_memory(BLOCK, processors, memory) == blocks
    assert auto_requests(blocks, BLOCK) == requests
    assert auto_movers(processors) == movers


def test_large_blocks_need_room_for_four() -> None:
    assert auto_memory(128 * MIB, 2, 24 * GIB) == 512 * MIB


def test_there_is_no_more_free_memory_than_memory() -> None:
    assert 0 < free_memory() <= all_memory()


def test_requests_stay_few_where_few_files_may_be_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    assert auto_requests(12 * GIB, BLOCK) == 64
