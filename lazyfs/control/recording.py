"""A worker's record of its load, `GET /report`; `observe/load.py` interprets it."""

from __future__ import annotations

import base64
from typing import Any

from lazyfs import __version__, machine
from lazyfs.control.status import Status


def recording(status: Status) -> dict[str, Any]:
    """The record, as values that JSON supports."""
    recorder, options = status.recorder, status.options
    path = status.catalog.tree.path
    worker_s, movers_s = recorder.processor_s
    directories = [str(one.path) for one in status.cache.directories] if status.cache else []
    return {
        "about": {
            "source": status.source,
            "mountpoint": status.mountpoint,
            "version": __version__,
            "mounted_at_s": status.mounted_ns / 10**9,
            "processors": machine.usable_processors(),
            "processor_s": worker_s,
            "movers_s": movers_s,
            # None: no file was read with O_DIRECT.
            "direct_reads_use_page_cache": status.filesystem.direct.continued,
            "options": {
                "prefetch": options.prefetch,
                "block_size": options.block_size,
                "memory_limit": options.memory_limit,
                "page_cache": options.page_cache,
                "cache_dir": ":".join(directories) or "none",
                "max_concurrency": options.max_concurrency,
                "requests_limit": status.fetcher.requests_limit,
                "bandwidth_limit": options.bandwidth_limit,
                "movers": options.movers,
            },
        },
        "now_s": recorder.uptime_s,
        "recorded": recorder.events.recorded,
        "files": [(path(file), file.size_bytes) for file in recorder.files],
        "events": base64.b64encode(recorder.events.dump()).decode(),
    }
