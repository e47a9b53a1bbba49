"""The values of a mount's metrics, `GET /metrics.json`; `observe/metrics.py` declares them."""

from __future__ import annotations

import time
from collections.abc import Callable

from lazyfs import __version__
from lazyfs.cache.directory import CacheDirectory
from lazyfs.control.status import Status, resident_bytes
from lazyfs.faults import FAULTS
from lazyfs.fetch.fleet_policy import State
from lazyfs.observe.events import Activity, Purpose
from lazyfs.observe.metrics import Values, histogram_value
from lazyfs.observe.recorder import Tier


def measure(status: Status) -> Values:
    """All values that need no disk access."""
    return {
        "lazyfs_up": [({}, 1)],
        **_mount(status),
        **_model(status),
        **_s3(status),
        **_fleet(status),
        **_blocks(status),
        **_readers(status),
        **_cache(status),
    }


def _mount(status: Status) -> Values:
    about = {
        "source": status.source,
        "mountpoint": status.mountpoint,
        "version": __version__,
    }
    fetcher = status.fetcher
    return {
        "lazyfs_mount_info": [(about, 1)],
        "lazyfs_mount_start_time_seconds": [({}, status.mounted_ns / 10**9)],
        "lazyfs_worker_start_time_seconds": [({}, time.time() - status.recorder.uptime_s)],
        "lazyfs_worker_restarts_total": [({}, status.restarts)],
        "lazyfs_mount_resumes_total": [({}, status.carried.resumes)],
        "lazyfs_faults_total": [({}, FAULTS.count)],
        "lazyfs_trouble": [({}, int(fetcher.trouble is not None))],
        "lazyfs_memory_blocks_bytes": [({}, fetcher.memory_bytes)],
        "lazyfs_memory_limit_bytes": [({}, status.options.memory_limit)],
        "lazyfs_resident_memory_bytes": [({}, resident_bytes())],
    }


def _model(status: Status) -> Values:
    wanted, there = status.prefetcher.blocks.progress()
    now = status.recorder.activity
    return {
        "lazyfs_size_bytes": [({}, status.catalog.tree.total_bytes)],
        "lazyfs_model_bytes": [({}, wanted)],
        "lazyfs_model_present_bytes": [({}, there)],
        "lazyfs_model_near_bytes": [({}, status.prefetcher.blocks.near_bytes())],
        "lazyfs_ready": [({"level": level}, int(is_so)) for level, is_so in status.ready().items()],
        "lazyfs_prefetch_activity": [
            ({"activity": activity.label}, int(activity is now)) for activity in Activity
        ],
    }


def _s3(status: Status) -> Values:
    recorder = status.recorder
    by_operation = sorted(recorder.requests | recorder.in_flight)
    return {
        "lazyfs_s3_request_duration_seconds": [
            ({"operation": name}, histogram_value(recorder.requests[name])) for name in by_operation
        ],
        "lazyfs_s3_request_failures_total": [
            ({"operation": name}, recorder.failed_requests[name]) for name in by_operation
        ],
        "lazyfs_s3_requests_in_flight": [
            ({"operation": name}, recorder.in_flight[name]) for name in by_operation
        ],
        "lazyfs_s3_requests_limit": [({}, status.fetcher.requests_limit)],
        "lazyfs_movers": [({}, status.movers.running)],
        "lazyfs_movers_lost_total": [({}, status.movers.lost)],
        "lazyfs_cpu_seconds_total": [
            ({"process": "worker"}, time.process_time()),
            ({"process": "movers"}, status.movers.processor_s),
        ],
        "lazyfs_s3_received_bytes_total": [({}, recorder.received_bytes)],
        "lazyfs_s3_retries_total": [
            ({"cause": cause.label}, count) for cause, count in recorder.retries.items()
        ],
        "lazyfs_s3_second_requests_total": [({}, recorder.hedges)],
        "lazyfs_hidden_objects_total": [({}, recorder.hidden_objects)],
    }


def _fleet(status: Status) -> Values:
    fleet = status.fetcher.fleet
    if fleet is None:
        return {}
    return {
        "lazyfs_fleet_up": [({}, int(fleet.state is State.USED))],
        "lazyfs_fleet_requests_total": [
            ({"result": result}, count) for result, count in fleet.results.items()
        ],
        "lazyfs_fleet_received_bytes_total": [({}, status.recorder.fleet_received_bytes)],
    }


def _blocks(status: Status) -> Values:
    recorder = status.recorder
    sources = (
        ("s3", recorder.fetched_bytes, recorder.fetched_blocks),
        ("fleet", recorder.shared_bytes, recorder.shared_blocks),
        ("disk", recorder.loaded_bytes, recorder.loaded_blocks),
    )
    labels = [
        ({"source": source, "purpose": purpose.name.lower()}, sizes[purpose], blocks[purpose])
        for source, sizes, blocks in sources
        for purpose in Purpose
    ]
    duplicate = max(0, recorder.received_bytes - recorder.fetched_bytes.total())
    return {
        "lazyfs_block_bytes_total": [(label, size) for label, size, _ in labels],
        "lazyfs_blocks_total": [(label, count) for label, _, count in labels],
        "lazyfs_block_failures_total": [
            ({"cause": cause.label}, count) for cause, count in recorder.failures.items()
        ],
        "lazyfs_prefetch_wasted_bytes_total": [
            ({"reason": "duplicate"}, duplicate),
            ({"reason": "dropped"}, status.fetcher.dropped_bytes),
        ],
        "lazyfs_prefetch_passed_over_bytes": [({}, status.prefetcher.passed_over_bytes)],
        "lazyfs_page_cache_pushed_bytes_total": [({}, status.page_cache.pushed_bytes)],
        "lazyfs_cache_written_bytes_total": [({}, recorder.written_bytes)],
        "lazyfs_cache_shed_blocks_total": [({}, status.fetcher.shed_blocks)],
    }


def _cache(status: Status) -> Values:
    directories = status.cache.directories if status.cache else []
    labels = [{"directory": str(directory.path)} for directory in directories]

    def each(value: Callable[[CacheDirectory], int]) -> list[tuple[dict[str, str], int]]:
        return list(zip(labels, map(value, directories), strict=True))

    hanging = status.fetcher.hanging_disks
    return {
        "lazyfs_cache_up": each(lambda directory: int(str(directory.path) not in hanging)),
        "lazyfs_cache_size_bytes": each(lambda directory: directory.filling[0]),
        "lazyfs_cache_limit_bytes": each(lambda directory: directory.filling[1]),
        "lazyfs_cache_hits_total": each(lambda directory: directory.counters.hits),
        "lazyfs_cache_misses_total": each(lambda directory: directory.counters.misses),
        "lazyfs_cache_evicted_blocks_total": each(lambda directory: directory.counters.evicted),
        "lazyfs_cache_declined_blocks_total": each(lambda directory: directory.counters.declined),
        "lazyfs_cache_damaged_blocks_total": each(lambda directory: directory.counters.damaged),
        "lazyfs_cache_failed_writes_total": each(
            lambda directory: directory.counters.failed_writes
        ),
    }


def _readers(status: Status) -> Values:
    recorder = status.recorder
    longest_s = max(map(recorder.wait_s, recorder.waits), default=0.0)
    return {
        "lazyfs_read_duration_seconds": [
            ({"tier": tier.value}, histogram_value(recorder.reads[tier])) for tier in Tier
        ],
        "lazyfs_read_bytes_total": [
            ({"tier": tier.value}, recorder.read_bytes[tier]) for tier in Tier
        ],
        "lazyfs_stall_seconds_total": [
            ({"cause": cause.label}, seconds) for cause, seconds in recorder.stalled_s.items()
        ],
        "lazyfs_readers_waiting": [({}, len(recorder.waits))],
        "lazyfs_longest_wait_seconds": [({}, longest_s)],
        "lazyfs_open_files": [({}, recorder.open_files)],
    }
