"""One line of the log when a model was loaded for the first time: how long, from where, why."""

from __future__ import annotations

import logging

import trio

from lazyfs.control.recording import recording
from lazyfs.control.status import Status
from lazyfs.kinds import format_duration, format_size
from lazyfs.observe.load import Load, Recording
from lazyfs.observe.verdict import judge
from lazyfs.tree import File

log = logging.getLogger(__name__)

LOOK_S = 1.0


async def tell_first_load(status: Status) -> None:
    """Wait until every file of the model was opened and closed again, and say how that went."""
    while not _is_over(status):
        await trio.sleep(LOOK_S)
    recorded = recording(status)
    load = await trio.to_thread.run_sync(lambda: Load.of(Recording.parse(recorded)))
    total = sum(life.size for life in load.lives)
    verdict = judge(load)
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


def _is_over(status: Status) -> bool:
    if not status.planner.planned or status.recorder.open_files:
        return False
    nodes = [status.catalog.tree.get(inode) for inode in status.prefetcher.order]
    files = [node for node in nodes if isinstance(node, File)]
    # Not every loader reads all the small files.
    shards = [file for file in files if file.name.endswith(".safetensors")] or files
    return bool(shards) and all(map(status.recorder.was_opened, shards))
