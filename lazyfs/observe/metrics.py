"""The metrics of a mount, declared once; pure.

A worker measures (`control/measure.py`) and gives the values as plain JSON at its control socket.
Whoever is scraped, the worker itself (`--metrics-address`) or the CSI node plugin for all its
volumes, makes text of such values (`exposition.py`). So a scrape takes no lock that a read could
wait for.

Names and units follow https://prometheus.io/docs/practices/naming/: base units, `_total` for what
only grows. The table in `docs/OBSERVABILITY.md` is made from `METRICS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lazyfs.observe.histogram import Histogram

# Of each metric, values with their labels, as JSON can say them.
Values = dict[str, list[tuple[dict[str, str], Any]]]


@dataclass(frozen=True, slots=True)
class Declared:
    """One metric.

    Attributes:
        labels: its own; those that say which mount it is are added.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


METRICS = (
    # Is it there?
    Declared("lazyfs_up", "gauge", "1 if the worker of the mount answered, else 0."),
    Declared("lazyfs_mount_info", "gauge", "Always 1.", ("source", "mountpoint", "version")),
    Declared(
        "lazyfs_volume_pod_info", "gauge", "Always 1; one for each pod that has the volume. From "
        "node plugins.", ("namespace", "pod"),
    ),
    Declared("lazyfs_mount_start_time_seconds", "gauge", "When it was mounted, since the epoch."),
    Declared(
        "lazyfs_worker_start_time_seconds", "gauge", "When its present worker began, since the "
        "epoch; counters begin anew then.",
    ),
    Declared(
        "lazyfs_worker_restarts_total", "counter", "Workers that ended before the present one and "
        "were replaced.",
    ),
    Declared(
        "lazyfs_mount_resumes_total", "counter", "Times that a worker took the mount up from "
        "another, since it was mounted.",
    ),
    Declared("lazyfs_trouble", "gauge", "1 while S3 does not give some object."),
    # The model
    Declared("lazyfs_size_bytes", "gauge", "All files that are listed so far."),
    Declared("lazyfs_model_bytes", "gauge", "What is to be fetched ahead: the model's files."),
    Declared("lazyfs_model_present_bytes", "gauge", "How much of that is or was on this node."),
    Declared(
        "lazyfs_model_near_bytes", "gauge", "How much of that is in the page cache or was read.",
    ),
    Declared("lazyfs_ready", "gauge", "1 when the level is reached.", ("level",)),
    Declared(
        "lazyfs_prefetch_activity", "gauge", "1 for what prefetching does now.", ("activity",),
    ),
    # S3
    Declared(
        "lazyfs_s3_request_duration_seconds", "histogram", "Requests to S3 that ended, the failed "
        "and the superseded ones among them.", ("operation",),
    ),
    Declared("lazyfs_s3_request_failures_total", "counter", "Those that failed.", ("operation",)),
    Declared("lazyfs_s3_requests_in_flight", "gauge", "Requests under way.", ("operation",)),
    Declared("lazyfs_s3_requests_limit", "gauge", "Ranged GETs that should be under way now."),
    Declared("lazyfs_s3_received_bytes_total", "counter", "Bytes of objects that S3 sent."),
    Declared("lazyfs_s3_retries_total", "counter", "Times that S3 was asked again.", ("cause",)),
    Declared(
        "lazyfs_s3_second_requests_total", "counter", "Second requests for slow ones (hedges).",
    ),
    # Blocks
    Declared(
        "lazyfs_block_bytes_total", "counter", "Bytes of blocks that came, by where from (s3, "
        "disk) and what for (ahead, demand).", ("source", "purpose"),
    ),
    Declared("lazyfs_blocks_total", "counter", "Their number.", ("source", "purpose")),
    Declared("lazyfs_block_failures_total", "counter", "Blocks that could not be had.", ("cause",)),
    Declared(
        "lazyfs_prefetch_wasted_bytes_total", "counter", "Bytes from S3 that served nobody: the "
        "slower of two requests (duplicate), and what was let go before it was read (dropped).",
        ("reason",),
    ),
    Declared(
        "lazyfs_prefetch_passed_over_bytes", "gauge", "Fetched, and passed over by a reader, as "
        "far as requests show; of what is in the page cache nothing shows whether it was read.",
    ),
    Declared("lazyfs_page_cache_pushed_bytes_total", "counter", "Put into the page cache."),
    # Readers
    Declared(
        "lazyfs_read_duration_seconds", "histogram", "Reads that came to the daemon, by where "
        "their bytes were (memory, disk, s3). Reads of pages in the page cache do not come to it.",
        ("tier",),
    ),
    Declared("lazyfs_read_bytes_total", "counter", "Bytes of those reads.", ("tier",)),
    Declared(
        "lazyfs_stall_seconds_total", "counter", "Seconds in which at least one reader waited, "
        "by what for.", ("cause",),
    ),
    Declared("lazyfs_readers_waiting", "gauge", "Reads that wait now."),
    Declared("lazyfs_longest_wait_seconds", "gauge", "How long the oldest of them waits."),
    Declared("lazyfs_open_files", "gauge", "Handles that are open."),
    # Cache and memory
    Declared(
        "lazyfs_cache_size_bytes", "gauge", "What the cache directory holds, of all mounts; "
        "measured every ten seconds.", ("directory",),
    ),
    Declared("lazyfs_cache_limit_bytes", "gauge", "What it may hold now.", ("directory",)),
    Declared("lazyfs_cache_hits_total", "counter", "Blocks that were found.", ("directory",)),
    Declared("lazyfs_cache_misses_total", "counter", "Blocks that were not.", ("directory",)),
    Declared(
        "lazyfs_cache_evicted_blocks_total", "counter", "Blocks that left for others.",
        ("directory",),
    ),
    Declared(
        "lazyfs_cache_declined_blocks_total", "counter", "Blocks not kept, because what is there "
        "is needed sooner.", ("directory",),
    ),
    Declared(
        "lazyfs_cache_damaged_blocks_total", "counter", "Blocks whose checksum was wrong; they are "
        "fetched again.", ("directory",),
    ),
    Declared(
        "lazyfs_cache_failed_writes_total", "counter", "Blocks that a full or failing disk did not "
        "take.", ("directory",),
    ),
    Declared("lazyfs_cache_written_bytes_total", "counter", "Blocks written to the cache."),
    Declared(
        "lazyfs_cache_shed_blocks_total", "counter", "Blocks that a load left no time or memory "
        "to write; what the page cache has of them is written after it.",
    ),
    Declared("lazyfs_memory_blocks_bytes", "gauge", "Blocks in memory and on their way there."),
    Declared("lazyfs_memory_limit_bytes", "gauge", "Most that they may be (--memory-limit)."),
    Declared("lazyfs_resident_memory_bytes", "gauge", "Memory of the worker process."),
)  # fmt: skip


def histogram_value(histogram: Histogram) -> dict[str, Any]:
    """A histogram, as JSON can say it."""
    return {
        "bounds": histogram.bounds_s,
        "counts": histogram.cumulative(),
        "sum": histogram.sum_s,
    }
