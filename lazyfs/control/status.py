"""The status of a worker, `GET /status` on its control socket.

Names of numbers end in their unit. Counts begin at zero with each worker; `restarts` is the number
of workers that ended before this one.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lazyfs import __version__
from lazyfs.cache import BlockCache
from lazyfs.control.snapshot import Snapshot
from lazyfs.fetch.fetcher import BlockFetcher
from lazyfs.fuse.filesystem import Filesystem
from lazyfs.handover.runtime_changes import RuntimeChanges
from lazyfs.movers.pool import Movers
from lazyfs.namespace.catalog import Catalog
from lazyfs.observe.events import Purpose
from lazyfs.observe.recorder import Recorder, Tier, Wait
from lazyfs.options.mount_options import MountOptions
from lazyfs.pagecache.page_cache import PageCache
from lazyfs.prefetch.planner import Planner
from lazyfs.prefetch.prefetcher import Prefetcher

# How many readers are described: those that have waited longest.
WAITS_SHOWN = 20


@dataclass(slots=True)
class Status:
    """The state of one mount.

    Attributes:
        source: as a URL.
        mountpoint: as a path.
        mounted_ns: when it was mounted, in nanoseconds since the epoch.
        restarts: how many workers ended before this one.
    """

    source: str
    mountpoint: str
    mounted_ns: int
    restarts: int
    options: MountOptions
    catalog: Catalog
    snapshot: Snapshot
    filesystem: Filesystem
    fetcher: BlockFetcher
    page_cache: PageCache
    prefetcher: Prefetcher
    planner: Planner
    recorder: Recorder
    cache: BlockCache | None
    carried: RuntimeChanges
    movers: Movers

    def describe(self) -> dict[str, Any]:
        """The status, as values that JSON supports."""
        return {
            "version": __version__,
            "pid": os.getpid(),
            "source": self.source,
            "mountpoint": self.mountpoint,
            "mounted_at_s": self.mounted_ns / 10**9,
            "mounted_for_s": round(time.time() - self.mounted_ns / 10**9, 3),
            "worker_uptime_s": round(self.recorder.uptime_s, 3),
            "restarts": self.restarts,
            "resumes": self.carried.resumes,
            "changed": dict(self.carried.options),
            "snapshot": self.snapshot.describe(),
            "trouble": self.fetcher.trouble,
            **self._model(),
            **self._traffic(),
            **self._cache(),
            **self._reads(),
            **self._errors(),
        }

    def _model(self) -> dict[str, Any]:
        planned = self.planner.planned
        wanted, there = self.prefetcher.blocks.progress()
        return {
            "files": self.catalog.tree.file_count,
            "size_bytes": self.catalog.tree.total_bytes,
            "prefetch": {
                "policy": self.options.prefetch,
                "planned": planned,
                "activity": self.recorder.activity.label,
                "wanted_bytes": wanted,
                "there_bytes": there,
                "near_bytes": self.prefetcher.blocks.near_bytes(),
                "passed_over_bytes": self.prefetcher.passed_over_bytes,
                "dropped_bytes": self.fetcher.dropped_bytes,
            },
            "ready": self.ready(),
        }

    def ready(self) -> dict[str, bool]:
        """Whether the beginnings of all shards, and the whole model, are on this machine."""
        planned = self.planner.planned
        wanted, there = self.prefetcher.blocks.progress()
        return {
            "headers": planned and self.prefetcher.blocks.beginnings_are_here(),
            "model": planned and there >= wanted,
        }

    def _traffic(self) -> dict[str, Any]:
        recorder, fetcher = self.recorder, self.fetcher
        return {
            "rate_bytes_per_s": round(recorder.rate()),
            "requests_in_flight": recorder.in_flight["get"] + recorder.in_flight["fleet"],
            "requests_limit": fetcher.requests_limit,
            "in_flight": fetcher.in_flight,
            "movers": {
                "limit": self.movers.count,
                "running": self.movers.running,
                "lost": self.movers.lost,
            },
            "fetched_bytes": recorder.fetched_bytes.total(),
            "fetched_blocks": recorder.fetched_blocks.total(),
            "fetched_on_demand_bytes": recorder.fetched_bytes[Purpose.DEMAND],
            "from_fleet_bytes": recorder.shared_bytes.total(),
            "from_fleet_blocks": recorder.shared_blocks.total(),
            "fleet": self._fleet(),
            "from_disk_bytes": recorder.loaded_bytes.total(),
            "to_disk_bytes": recorder.written_bytes,
            "shed_blocks": fetcher.shed_blocks,
            "pushed_bytes": self.page_cache.pushed_bytes,
            "pushed_blocks": recorder.pushed_blocks,
            "memory_bytes": fetcher.memory_bytes,
            "memory_limit_bytes": self.options.memory_limit,
            "resident_bytes": resident_bytes(),
        }

    def _fleet(self) -> dict[str, Any] | None:
        fleet = self.fetcher.fleet
        if fleet is None:
            return None
        return {
            "url": fleet.cache.url,
            "state": fleet.state.value,
            "trouble": fleet.trouble,
            "requests": dict(fleet.results),
        }

    def _cache(self) -> dict[str, Any]:
        return {
            "hanging_disks": self.fetcher.hanging_disks,
            "cache": [
                {
                    "directory": str(directory.path),
                    "used_bytes": directory.filling[0],
                    "limit_bytes": directory.filling[1],
                    **asdict(directory.counters),
                }
                for directory in (self.cache.directories if self.cache else ())
            ],
        }

    def _reads(self) -> dict[str, Any]:
        recorder = self.recorder
        waits = sorted(recorder.waits, key=lambda wait: wait.since_s)
        return {
            "reads": self.filesystem.reads,
            "read_bytes": {tier.value: recorder.read_bytes[tier] for tier in Tier},
            "hits": {tier.value: recorder.reads[tier].count for tier in Tier},
            "stalled_s": {
                cause.label: round(seconds, 3) for cause, seconds in recorder.stalled_s.items()
            },
            "readers_waiting": len(waits),
            "waiting": [self._waiting(wait) for wait in waits[:WAITS_SHOWN]],
        }

    def _waiting(self, wait: Wait) -> dict[str, Any]:
        return {
            "file": self.catalog.tree.path(wait.file),
            "offset": wait.span.number * self.options.block_size + wait.span.start,
            "bytes": wait.span.stop - wait.span.start,
            "for_s": round(self.recorder.wait_s(wait), 3),
            "opened_by": [
                {"pid": pid, "command": command}
                for pid in self.recorder.openers(wait.file)
                if (command := _command(pid))
            ],
        }

    def _errors(self) -> dict[str, Any]:
        recorder = self.recorder
        return {
            "retries": {cause.label: count for cause, count in recorder.retries.items()},
            "second_requests": recorder.hedges,
            "failed_blocks": recorder.failures.total(),
            "last_error": recorder.last_error or None,
            "last_error_at_s": recorder.last_error_at_s or None,
        }


def _command(pid: int) -> str | None:
    """The name of a process; None if it ended or is in another PID namespace (0)."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() if pid else None
    except OSError:
        return None


def resident_bytes() -> int:
    """Resident memory of this process (proc(5), statm)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
