"""The metrics of a mount, declared once. Pure.

A worker takes the values (`control/measure.py`) and serves them as JSON at its control socket. The
process that Prometheus scrapes turns them into text (`exposition.py`): the worker itself
(`--metrics-address`), or the CSI node plugin for all its volumes. A scrape takes no lock that could
delay a read.

Names and units follow https://prometheus.io/docs/practices/naming/: base units, and `_total` for
counters. `make docs` writes the table in `docs/OBSERVABILITY.md` from `METRICS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lazyfs.observe.histogram import Histogram

# The samples of each metric by its name: labels and value, in types that JSON has.
Values = dict[str, list[tuple[dict[str, str], Any]]]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        help: the HELP text; it must make sense without the names of other metrics.
        labels: names of its own labels; the labels that identify the mount are added.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


METRICS = (
    # The mount
    Metric("lazyfs_up", "gauge", "1 if the worker of the mount answered the scrape, else 0."),
    Metric(
        "lazyfs_mount_info", "gauge", "Always 1; the labels describe the "
        "mount.", ("source", "mountpoint", "version"),
    ),
    Metric(
        "lazyfs_volume_pod_info", "gauge", "Always 1; one series for each pod that uses the "
        "volume. Served by node plugins only.", ("namespace", "pod"),
    ),
    Metric("lazyfs_mount_start_time_seconds", "gauge", "Unix time of the mount."),
    Metric(
        "lazyfs_worker_start_time_seconds", "gauge", "Unix time at which the current worker "
        "started; counters start from 0 then.",
    ),
    Metric(
        "lazyfs_worker_restarts_total", "counter", "Workers of the mount that ended unexpectedly "
        "and were replaced.",
    ),
    Metric(
        "lazyfs_mount_resumes_total", "counter", "Times that a new worker took over the mount from "
        "another one.",
    ),
    Metric(
        "lazyfs_faults_total", "counter", "Unexpected exceptions that the worker survived; the log "
        "has a traceback of each kind.",
    ),
    Metric(
        "lazyfs_trouble",
        "gauge",
        "1 while the last answer for at least one object was an error.",
    ),
    # The model
    Metric("lazyfs_size_bytes", "gauge", "Total size of the files listed so far."),
    Metric("lazyfs_model_bytes", "gauge", "Total size of the files to be prefetched."),
    Metric(
        "lazyfs_model_present_bytes", "gauge", "Bytes of the files to be prefetched that are or "
        "were on this node.",
    ),
    Metric(
        "lazyfs_model_near_bytes", "gauge", "Bytes of the files to be prefetched that are in the "
        "page cache or were read.",
    ),
    Metric(
        "lazyfs_ready", "gauge", "1 once the mount has reached this level of "
        "readiness.", ("level",),
    ),
    Metric(
        "lazyfs_prefetch_activity", "gauge", "1 for the current activity of the prefetcher, 0 for "
        "the others.", ("activity",),
    ),
    # S3
    Metric(
        "lazyfs_s3_request_duration_seconds", "histogram", "Duration of requests to S3, including "
        "failed and superseded ones, and of those to the fleet's cache (operation "
        "fleet).", ("operation",),
    ),
    Metric(
        "lazyfs_s3_request_failures_total", "counter", "Requests to S3 that "
        "failed.", ("operation",),
    ),
    Metric("lazyfs_s3_requests_in_flight", "gauge", "Requests to S3 in flight.", ("operation",)),
    Metric("lazyfs_s3_requests_limit", "gauge", "Ranged GETs that may be in flight at present."),
    Metric("lazyfs_movers", "gauge", "Processes that move bytes for the mount now (`--movers`)."),
    Metric(
        "lazyfs_movers_lost_total", "counter", "Calls lost because a process that moves bytes "
        "ended; the worker made each of them itself.",
    ),
    Metric(
        "lazyfs_cpu_seconds_total", "counter", "Processor time of the mount's present worker, and "
        "of the processes that move bytes for it.", ("process",),
    ),
    Metric("lazyfs_s3_received_bytes_total", "counter", "Bytes of objects received from S3."),
    Metric(
        "lazyfs_s3_retries_total", "counter", "Requests to S3 that were retried, by "
        "cause.", ("cause",),
    ),
    Metric(
        "lazyfs_hidden_objects_total", "counter", "Listed objects that cannot be shown as files; "
        "the log names the first five of each listing.",
    ),
    Metric(
        "lazyfs_s3_second_requests_total", "counter", "Second requests sent because the first was "
        "slow (hedges).",
    ),
    # The fleet's cache
    Metric(
        "lazyfs_fleet_up", "gauge", "1 while the fleet's cache is asked before S3, 0 while it "
        "is left out because of trouble. Only with --fleet-cache.",
    ),
    Metric(
        "lazyfs_fleet_requests_total", "counter", "Requests to the fleet's cache, by result "
        "(served, away, cut_off, silent, failed, s3_trouble, refused, wrong).", ("result",),
    ),
    Metric(
        "lazyfs_fleet_received_bytes_total", "counter", "Bytes of objects received from the "
        "fleet's cache.",
    ),
    # Blocks
    Metric(
        "lazyfs_block_bytes_total", "counter", "Bytes of blocks obtained, by source (s3, fleet, "
        "disk) and purpose (ahead, demand).", ("source", "purpose"),
    ),
    Metric(
        "lazyfs_blocks_total", "counter", "Blocks obtained, by source (s3, fleet, disk) and "
        "purpose (ahead, demand).", ("source", "purpose"),
    ),
    Metric(
        "lazyfs_block_failures_total", "counter", "Blocks that could not be obtained, by "
        "cause.", ("cause",),
    ),
    Metric(
        "lazyfs_prefetch_wasted_bytes_total", "counter", "Bytes received from S3 and not used: by "
        "the slower of two requests (duplicate), or dropped before they were read "
        "(dropped).", ("reason",),
    ),
    Metric(
        "lazyfs_prefetch_passed_over_bytes", "gauge", "Fetched bytes that a reader skipped, as far "
        "as its requests show; reads from the page cache are not visible.",
    ),
    Metric(
        "lazyfs_page_cache_pushed_bytes_total", "counter", "Bytes put into the page cache ahead of "
        "reads.",
    ),
    # Readers
    Metric(
        "lazyfs_read_duration_seconds", "histogram", "Duration of reads that reached the worker, "
        "by where the bytes were (memory, disk, fleet, s3). Reads from the page cache do not reach "
        "it.", ("tier",),
    ),
    Metric(
        "lazyfs_read_bytes_total", "counter", "Bytes of reads that reached the worker, by "
        "tier.", ("tier",),
    ),
    Metric(
        "lazyfs_stall_seconds_total", "counter", "Seconds in which at least one reader waited, by "
        "cause.", ("cause",),
    ),
    Metric("lazyfs_readers_waiting", "gauge", "Reads that are waiting now."),
    Metric(
        "lazyfs_longest_wait_seconds", "gauge", "Seconds that the oldest waiting read has waited.",
    ),
    Metric("lazyfs_open_files", "gauge", "Open file handles."),
    # Cache and memory
    Metric(
        "lazyfs_cache_size_bytes", "gauge", "Bytes in the cache directory, of all mounts; measured "
        "every ten seconds.", ("directory",),
    ),
    Metric(
        "lazyfs_cache_limit_bytes", "gauge", "Bytes that the cache directory may hold "
        "now.", ("directory",),
    ),
    Metric(
        "lazyfs_cache_up", "gauge", "1 while the disk of the cache directory answers, 0 while it "
        "hangs and its blocks come from S3.", ("directory",),
    ),
    Metric("lazyfs_cache_hits_total", "counter", "Blocks found in the cache.", ("directory",)),
    Metric(
        "lazyfs_cache_misses_total", "counter", "Blocks not found in the cache.", ("directory",),
    ),
    Metric(
        "lazyfs_cache_evicted_blocks_total", "counter", "Blocks removed to make room for "
        "others.", ("directory",),
    ),
    Metric(
        "lazyfs_cache_declined_blocks_total", "counter", "Blocks not written because the cached "
        "ones are needed sooner.", ("directory",),
    ),
    Metric(
        "lazyfs_cache_damaged_blocks_total", "counter", "Cached blocks with a wrong checksum; they "
        "are fetched again.", ("directory",),
    ),
    Metric(
        "lazyfs_cache_failed_writes_total", "counter", "Block writes that failed, for instance "
        "because the disk was full.", ("directory",),
    ),
    Metric("lazyfs_cache_written_bytes_total", "counter", "Bytes written to the cache."),
    Metric(
        "lazyfs_cache_shed_blocks_total", "counter", "Blocks not written to the cache because the "
        "disk was slower than the link while a reader waited.",
    ),
    Metric(
        "lazyfs_memory_blocks_bytes", "gauge", "Bytes of blocks in memory, requests in flight "
        "included.",
    ),
    Metric(
        "lazyfs_memory_limit_bytes", "gauge", "Maximum bytes of blocks in memory (--memory-limit).",
    ),
    Metric("lazyfs_resident_memory_bytes", "gauge", "Memory of the worker process."),
)  # fmt: skip


def histogram_value(histogram: Histogram) -> dict[str, Any]:
    """A histogram in types that JSON has."""
    return {
        "bounds": histogram.bounds_s,
        "counts": histogram.cumulative(),
        "sum": histogram.sum_s,
    }
