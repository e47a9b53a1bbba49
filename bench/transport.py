"""Compares the costs of clients: ranged GETs of 8 MiB, thrown away.

    python bench/transport.py [--size 2GiB] [--repeat 3] [--tls]

Each client runs in a process of its own, with 1, 8 and 16 requests in flight, against the unlimited
origin of `origin.py`. The output has medians: GB/s, processor seconds per GB (user and system), and
the peak of resident memory.

    lazyfs            the client of lazyfs: bodies by `_receive.c`, into buffers that are reused
    obstore           in Rust: a new buffer for each range, filled outside the interpreter
    boto3, read       the body as one bytes object
    boto3, readinto   the body into one buffer per thread, which is reused
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import origin as origins

from lazyfs.blocks.buffers import take_buffer
from lazyfs.options.option_types import parse_size
from lazyfs.store.cancel import Cancel
from lazyfs.store.http import Transport, tls_context

BLOCK = 8 << 20
KEY = "model/file"


def obstore_client(url: str, ca: str) -> Callable[[int, memoryview], None]:
    import obstore
    from obstore.store import S3Store

    options: dict[str, Any] = {"allow_http": True}
    if ca:
        options["root_certificate"] = Path(ca).read_bytes()
    store = S3Store(origins.BUCKET, config={"endpoint": url, "region": "us-east-1"},
                    client_options=options)  # fmt: skip

    def get(start: int, buffer: memoryview) -> None:
        assert len(obstore.get_range(store, KEY, start=start, length=BLOCK)) == BLOCK

    return get


def lazyfs_client(url: str, ca: str) -> Callable[[int, memoryview], None]:
    client = Transport(url, tls_context(ca) if ca else None)

    def get(start: int, buffer: memoryview) -> None:
        span = {"Range": f"bytes={start}-{start + BLOCK - 1}"}
        into = take_buffer(BLOCK)
        client.exchange(
            "GET", f"/{origins.BUCKET}/{KEY}", span, lambda answer: answer.body.read_into(into),
            Cancel(),
        )  # fmt: skip

    return get


def boto3_client(url: str, ca: str) -> Any:
    import boto3
    import botocore.config

    return boto3.client("s3", endpoint_url=url, verify=ca or None, config=botocore.config.Config(
        max_pool_connections=64, s3={"addressing_style": "path"}))  # fmt: skip


def boto3_body(client: Any, start: int) -> Any:
    span = f"bytes={start}-{start + BLOCK - 1}"
    return client.get_object(Bucket=origins.BUCKET, Key=KEY, Range=span)["Body"]


def boto3_read(url: str, ca: str) -> Callable[[int, memoryview], None]:
    client = boto3_client(url, ca)

    def get(start: int, buffer: memoryview) -> None:
        assert len(boto3_body(client, start).read()) == BLOCK

    return get


def boto3_readinto(url: str, ca: str) -> Callable[[int, memoryview], None]:
    client = boto3_client(url, ca)

    def get(start: int, buffer: memoryview) -> None:
        body, done = boto3_body(client, start), 0
        while done < BLOCK:
            done += body.readinto(buffer[done:])

    return get


CLIENTS = {
    "lazyfs": lazyfs_client,
    "obstore": obstore_client,
    "boto3, read": boto3_read,
    "boto3, readinto": boto3_readinto,
}


def measure(client: str, url: str, size: int, threads: int, ca: str) -> dict[str, float]:
    """Fetch all blocks of the object once."""
    get = CLIENTS[client](url, ca)
    get(0, memoryview(bytearray(BLOCK)))
    starts = itertools.chain(range(0, size - BLOCK + 1, BLOCK))
    lock = threading.Lock()

    def work() -> None:
        buffer = memoryview(bytearray(BLOCK))
        while True:
            with lock:
                start = next(starts, None)
            if start is None:
                return
            get(start, buffer)

    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    gigabytes = size / 1e9
    return {
        "GB/s": gigabytes / seconds,
        "user s/GB": (after.ru_utime - before.ru_utime) / gigabytes,
        "system s/GB": (after.ru_stime - before.ru_stime) / gigabytes,
        "peak MiB": after.ru_maxrss / 1024,
    }


def main() -> None:
    """Compare all clients; as a child process, measure one."""
    parser = argparse.ArgumentParser(description="compare the costs of clients")
    parser.add_argument("--size", default="2GiB", type=parse_size)
    parser.add_argument("--repeat", default=3, type=int)
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--child", nargs=4, metavar=("CLIENT", "URL", "THREADS", "CA"))
    arguments = parser.parse_args()
    if arguments.child:
        client, url, threads, ca = arguments.child
        print(json.dumps(measure(client, url, arguments.size, int(threads), ca)))
        return
    runs: defaultdict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="lazyfs-bench-", dir="/var/tmp") as temporary:
        file = Path(temporary, KEY)
        file.parent.mkdir()
        with open(file, "wb") as output:
            output.truncate(arguments.size)
        with origins.serve(Path(temporary), "tls" if arguments.tls else "unlimited") as origin:
            for _, client, threads in itertools.product(
                range(arguments.repeat), CLIENTS, (1, 8, 16)
            ):
                child = [client, origin.url, str(threads), str(origin.certificate or "")]
                answer = subprocess.run(
                    [sys.executable, __file__, f"--size={arguments.size}", "--child", *child],
                    capture_output=True, text=True, timeout=600, env=origins.environment(),
                    check=True,
                )  # fmt: skip
                runs[client, threads].append(json.loads(answer.stdout))
    print("| client | in flight | GB/s | user s/GB | system s/GB | peak MiB |")
    print("|---|---|---|---|---|---|")
    for (client, threads), many in runs.items():
        cells = [f"{statistics.median(run[key] for run in many):.2f}" for key in many[0]]
        print(f"| {client} | {threads} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
