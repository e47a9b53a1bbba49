"""The metrics of a mount, declared once; pure.

A worker measures (`control/measure.py`) and serves the values as plain JSON at its control socket.
The worker itself (`--metrics-address`) and the CSI node plugin, for all its volumes, turn such
values into text (`exposition.py`). A scrape therefore takes no lock that a read could wait for.

Names and units follow https://prometheus.io/docs/practices/naming/: base units, and `_total` for
counters. The table in `docs/OBSERVABILITY.md` is generated from `METRICS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lazyfs.observe.histogram import Histogram

# For each metric its values, each with its labels, in types that JSON has.
Values = dict[str, list[tuple[dict[str, str], Any]]]


@dataclass(frozen=True, slots=True)
class Declared:
    """One metric.

    Attributes:
        labels: its own labels; those that identify the mount are added.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


METRICS = (
    # The mount
    Declared("lazyfs_up", "gauge", "1 if the worker of the mount answered the scrape, else 0."),
    Declared(
        "lazyfs_mount_info", "gauge", "Always 1; the labels describe the "
        "mount.", ("source", "mountpoint", "version"),
    ),
    Declared(
        "lazyfs_volume_pod_info", "gauge", "Always 1; one series for each pod that uses the "
        "volume. Served by node plugins only.", ("namespace", "pod"),
    ),
    Declared("lazyfs_mount_start_time_seconds", "gauge", "Unix time of the mount."),
    Declared(
        "lazyfs_worker_start_time_seconds", "gauge", "Unix time at which the current worker "
        "started; counters start from 0 then.",
    ),
    Declared(
        "lazyfs_worker_restarts_total", "counter", "Workers of the mount that ended unexpectedly "
        "and were replaced.",
    ),
    Declared(
        "lazyfs_mount_resumes_total", "counter", "Times that a new worker took over the mount from "
        "another one.",
    ),
    Declared("lazyfs_trouble", "gauge", "1 while at least one object cannot be read from S3."),
    # The model
    Declared("lazyfs_size_bytes", "gauge", "Total size of the files listed so far."),
    Declared("lazyfs_model_bytes", "gauge", "Total size of the files to be prefetched."),
    Declared(
        "lazyfs_model_present_bytes", "gauge", "Bytes of the files to be prefetched that are or "
        "were on this node.",
    ),
    Declared(
        "lazyfs_model_near_bytes", "gauge", "Bytes of the files to be prefetched that are in the "
        "page cache or were read.",
    ),
    Declared(
        "lazyfs_ready", "gauge", "1 once the mount has reached this level of "
        "readiness.", ("level",),
    ),
    Declared(
        "lazyfs_prefetch_activity", "gauge", "1 for the current activity of the prefetcher, 0 for "
        "the others.", ("activity",),
    ),
    # S3
    Declared(
        "lazyfs_s3_request_duration_seconds", "histogram", "Duration of requests to S3, including "
        "failed and superseded ones.", ("operation",),
    ),
    Declared(
        "lazyfs_s3_request_failures_total", "counter", "Requests to S3 that "
        "failed.", ("operation",),
    ),
    Declared("lazyfs_s3_requests_in_flight", "gauge", "Requests to S3 in flight.", ("operation",)),
    Declared("lazyfs_s3_requests_limit", "gauge", "Most ranged GETs that may be in flight now."),
    Declared("lazyfs_s3_received_bytes_total", "counter", "Bytes of objects received from S3."),
    Declared(
        "lazyfs_s3_retries_total", "counter", "Requests to S3 that were retried, by "
        "cause.", ("cause",),
    ),
    Declared(
        "lazyfs_s3_second_requests_total", "counter", "Second requests sent because the first was "
        "slow (hedges).",
    ),
    # Blocks
    Declared(
        "lazyfs_block_bytes_total", "counter", "Bytes of blocks obtained, by source (s3, disk) and "
        "purpose (ahead, demand).", ("source", "purpose"),
    ),
    Declared(
        "lazyfs_blocks_total", "counter", "Blocks obtained, by source (s3, disk) and purpose "
        "(ahead, demand).", ("source", "purpose"),
    ),
    Declared(
        "lazyfs_block_failures_total", "counter", "Blocks that could not be obtained, by "
        "cause.", ("cause",),
    ),
    Declared(
        "lazyfs_prefetch_wasted_bytes_total", "counter", "Bytes received from S3 for nothing: by "
        "the slower of two requests (duplicate), or dropped before they were read "
        "(dropped).", ("reason",),
    ),
    Declared(
        "lazyfs_prefetch_passed_over_bytes", "gauge", "Fetched bytes that a reader skipped, as far "
        "as its requests show; reads from the page cache are not visible.",
    ),
    Declared(
        "lazyfs_page_cache_pushed_bytes_total", "counter", "Bytes put into the page cache ahead of "
        "reads.",
    ),
    # Readers
    Declared(
        "lazyfs_read_duration_seconds", "histogram", "Duration of reads that reached the daemon, "
        "by where the bytes were (memory, disk, s3). Reads from the page cache do not reach "
        "it.", ("tier",),
    ),
    Declared(
        "lazyfs_read_bytes_total", "counter", "Bytes of reads that reached the daemon, by "
        "tier.", ("tier",),
    ),
    Declared(
        "lazyfs_stall_seconds_total", "counter", "Seconds in which at least one reader waited, by "
        "cause.", ("cause",),
    ),
    Declared("lazyfs_readers_waiting", "gauge", "Reads that are waiting now."),
    Declared(
        "lazyfs_longest_wait_seconds", "gauge", "Seconds that the oldest waiting read has waited.",
    ),
    Declared("lazyfs_open_files", "gauge", "Open file handles."),
    # Cache and memory
    Declared(
        "lazyfs_cache_size_bytes", "gauge", "Bytes in the cache directory, of all mounts; measured "
        "every ten seconds.", ("directory",),
    ),
    Declared(
        "lazyfs_cache_limit_bytes", "gauge", "Bytes that the cache directory may hold "
        "now.", ("directory",),
    ),
    Declared("lazyfs_cache_hits_total", "counter", "Blocks found in the cache.", ("directory",)),
    Declared(
        "lazyfs_cache_misses_total", "counter", "Blocks not found in the cache.", ("directory",),
    ),
    Declared(
        "lazyfs_cache_evicted_blocks_total", "counter", "Blocks removed to make room for "
        "others.", ("directory",),
    ),
    Declared(
        "lazyfs_cache_declined_blocks_total", "counter", "Blocks not written because the cached "
        "ones are needed sooner.", ("directory",),
    ),
    Declared(
        "lazyfs_cache_damaged_blocks_total", "counter", "Cached blocks with a wrong checksum; they "
        "are fetched again.", ("directory",),
    ),
    Declared(
        "lazyfs_cache_failed_writes_total", "counter", "Block writes that failed, for instance "
        "because the disk was full.", ("directory",),
    ),
    Declared("lazyfs_cache_written_bytes_total", "counter", "Bytes written to the cache."),
    Declared(
        "lazyfs_cache_shed_blocks_total", "counter", "Blocks that a load left no time or memory to "
        "write; what the page cache has of them is written after it.",
    ),
    Declared(
        "lazyfs_memory_blocks_bytes", "gauge", "Bytes of blocks in memory, requests in flight "
        "included.",
    ),
    Declared(
        "lazyfs_memory_limit_bytes", "gauge", "Most bytes of blocks in memory (--memory-limit).",
    ),
    Declared("lazyfs_resident_memory_bytes", "gauge", "Memory of the worker process."),
)  # fmt: skip


def histogram_value(histogram: Histogram) -> dict[str, Any]:
    """A histogram, as JSON can say it."""
    return {
        "bounds": histogram.bounds_s,
        "counts": histogram.cumulative(),
        "sum": histogram.sum_s,
    }
