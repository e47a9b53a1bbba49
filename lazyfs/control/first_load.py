"""Logs one line after the first load of a model: duration, sources, and what limited it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import trio

from lazyfs.control.recording import recording
from lazyfs.control.status import Status
from lazyfs.listed_object import File
from lazyfs.options.option_types import format_duration, format_size

if TYPE_CHECKING:
    from lazyfs.observe.load import Load
    from lazyfs.observe.verdict import Verdict

log = logging.getLogger(__name__)

LOOK_S = 1.0


async def tell_first_load(status: Status) -> None:
    """Wait until all files of the model were opened and closed again, and log a summary."""
    while not _is_over(status):
        await trio.sleep(LOOK_S)
    recorded = recording(status)
    load, verdict = await trio.to_thread.run_sync(_judged, recorded)
    total = sum(life.size for life in load.lives)
    log.info(
        "first load: %s in %s; %s (more: lazyfs report %s)",
        format_size(total), format_duration(load.duration_s), verdict.headline,
        status.mountpoint,
    )  # fmt: skip
    if load.start_s is not None and load.end_s is not None:
        facts: dict[str, str | float] = {
            "lazyfs.limit": verdict.limit,
            "lazyfs.bytes": total,
            "lazyfs.stalled_s": round(sum(load.stalled_s.values()), 3),
        }
        status.recorder.loaded(load.start_s, load.end_s, facts)


def _judged(recorded: dict[str, Any]) -> tuple[Load, Verdict]:
    from lazyfs.observe.load import Load, Recording  # only after a load
    from lazyfs.observe.verdict import judge

    load = Load.of(Recording.parse(recorded))
    return load, judge(load)


def _is_over(status: Status) -> bool:
    if not status.planner.planned or status.recorder.open_files:
        return False
    nodes = [status.catalog.tree.get(inode) for inode in status.prefetcher.blocks.order]
    files = [node for node in nodes if isinstance(node, File)]
    # Some loaders do not read all small files.
    shards = [file for file in files if file.name.endswith(".safetensors")] or files
    return bool(shards) and all(map(status.recorder.was_opened, shards))
