"""Measures a plain client: the limit of an origin, and the download that lazyfs replaces.

    python bench/fetch.py raw ENDPOINT SOURCE_DIRECTORY CONCURRENCY
    python bench/fetch.py download ENDPOINT SOURCE_DIRECTORY CONCURRENCY TARGET_DIRECTORY

`raw` fetches every byte of the model with ranged GETs of 8 MiB and throws it away. `download`
writes it to local disk. Both use obstore, a client in Rust.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import obstore
from obstore.store import S3Store

BLOCK = 8 << 20


def main() -> None:
    """Fetch once and print one line of JSON."""
    mode, endpoint, source, concurrency = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4]
    target = Path(sys.argv[5]) if mode == "download" else None
    options: dict[str, Any] = {"allow_http": True, "timeout": "10 minutes"}
    if authority := os.environ.get("AWS_CA_BUNDLE"):
        options["root_certificate"] = Path(authority).read_bytes()
    store = S3Store(
        "bench", endpoint=endpoint, region="us-east-1", skip_signature=True, client_options=options
    )
    descriptors = {}
    jobs = []
    for path in sorted(source.iterdir()):
        size = path.stat().st_size
        jobs += [(path, at, min(at + BLOCK, size)) for at in range(0, size, BLOCK)]
        if target is not None:
            target.mkdir(exist_ok=True)
            flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
            descriptors[path] = os.open(target / path.name, flags)

    def fetch(job: tuple[Path, int, int]) -> int:
        path, begin, end = job
        key = f"{source.name}/{path.name}"
        data = obstore.get(store, key, options={"range": (begin, end)}).bytes()
        if target is not None:
            os.pwrite(descriptors[path], data, begin)
        return len(data)

    start_cpu_s, began = _cpu_seconds(), time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(int(concurrency)) as pool:
        size = sum(pool.map(fetch, jobs))
    for descriptor in descriptors.values():
        os.close(descriptor)
    seconds = time.perf_counter() - began
    print(json.dumps({
        "seconds": seconds,
        "bytes": size,
        "cpu_s": _cpu_seconds(),
        "start_cpu_s": start_cpu_s,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }))  # fmt: skip


def _cpu_seconds() -> float:
    """User and system time of this process since its start, including its imports."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
