"""The limit of open files (`ulimit -n`), and how many requests a worker can make within it.

A process starts with a soft limit, often 1,024, which it may raise to the hard limit. A low
hard limit must be respected: each request to S3 needs a connection, and a worker that cannot open
one more file fails in ways that are hard to recognise.
"""

from __future__ import annotations

import dataclasses
import logging
import resource
import sys

from lazyfs.errors import MountError
from lazyfs.options.mount_options import MountOptions

log = logging.getLogger(__name__)

# Apart from requests: 36 when idle, and up to 44 of threads that write, push and load, of helper
# processes, and of clients of the control socket.
FIXED = 80
# A connection, a block's file, and the index of the cache, which each thread opens (SQLite: the
# database and its log).
PER_REQUEST = 4
# Requests beyond `max_concurrency`: of waiting readers (8), second ones (4), headers (16).
EXTRA_REQUESTS = 28
# For each mover: it may push, write and load at once, and each of these takes a line to the mover,
# a file or connection, and the index.
PER_MOVER = 12
LEAST_REQUESTS = 4


def fit(options: MountOptions) -> MountOptions:
    """Raise the limit of open files; returns options with which a worker stays within it.

    Raises:
        MountError: the hard limit is too low for a worker.
    """
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    if limit == resource.RLIM_INFINITY:
        return options
    spare = max(0, limit - needed(LEAST_REQUESTS))
    options = dataclasses.replace(options, movers=min(options.movers, spare // 2 // PER_MOVER))
    requests = most_requests(options.movers)
    if requests < LEAST_REQUESTS:
        raise MountError(
            f"only {limit} open files are allowed here (ulimit -Hn), too few for lazyfs; allow at "
            f"least {needed(LEAST_REQUESTS)}, or {needed(options.max_concurrency)} for "
            f"--max-concurrency {options.max_concurrency}"
        )
    if requests >= options.max_concurrency:
        return options
    log.warning(
        "only %d open files are allowed here (ulimit -Hn): at most %d requests at once instead of "
        "%d; allow %d open files", limit, requests, options.max_concurrency,
        needed(options.max_concurrency, options.movers),
    )  # fmt: skip
    return dataclasses.replace(options, max_concurrency=requests)


def most_requests(movers: int) -> int:
    """How many requests a worker with this many movers can make at once; may be negative."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    return (limit - FIXED - PER_MOVER * movers) // PER_REQUEST - EXTRA_REQUESTS


def needed(requests: int, movers: int = 0) -> int:
    """The number of open files that a worker needs for this many concurrent requests and movers."""
    return FIXED + PER_REQUEST * (requests + EXTRA_REQUESTS) + PER_MOVER * movers
