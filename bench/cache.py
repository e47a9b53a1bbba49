"""Measures what the disk cache costs and saves. Needs nginx and root, like `run.py`.

python bench/cache.py [--directory /var/tmp] [--size 1GiB] [--parts blocks,shared,evict]

blocks   put and get of an 8 MiB block, compared with writing and reading a file; claims; the index
shared   bytes that two mounts fetch which load one model at the same time, over the model's size
evict    `lazyfs warm` into a cache with room, and into one that has to evict everything for it
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import origin as origins
from model import write_model

from lazyfs.cache.block_format import Content
from lazyfs.cache.direct_io import read_file, write_file
from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.space import Limits
from lazyfs.options.option_types import MIB, parse_size

BLOCK = 8 * MIB
BLOCKS = 48
TAIL = bytes(300)
HERE = Path(__file__).parent


def blocks(base: Path) -> dict[str, float]:
    """Milliseconds per block, and microseconds for small operations."""
    raw = base / "raw"
    raw.mkdir()
    directory = CacheDirectory(base / "cache", Limits(1 << 40))
    directory.open()
    content = Content("http://s3", "b", "m/a", '"1"', BLOCKS * BLOCK, BLOCK)
    data = memoryview(os.urandom(BLOCK))
    numbers = range(BLOCKS)
    result = {
        "write_file_ms": _each(lambda n: write_file(raw / str(n), data, TAIL), numbers) * 1e3,
        "put_ms": _each(lambda n: directory.put(content, n, data), numbers) * 1e3,
    }
    result |= {
        "read_file_ms": _each(lambda n: read_file(raw / str(n), BLOCK, len(TAIL)), numbers) * 1e3,
        "get_ms": _each(lambda n: directory.load(content, n), numbers) * 1e3,
        "miss_us": _each(lambda n: directory.load(content, n + BLOCKS), numbers) * 1e6,
        "claim_us": _each(lambda n: directory.claim(content, n), numbers) * 1e6,
        "release_us": _each(lambda n: directory.release(content, n), numbers) * 1e6,
    }
    many = Content("http://s3", "b", "m/many", '"1"', 10_000 * BLOCK, BLOCK)
    with contextlib.closing(sqlite3.connect(base / "cache/cache.db")) as index, index:
        index.executemany(
            "INSERT INTO Cache (key, raw, store_time, access_time, access_count, size, mode,"
            " filename) VALUES (?, 1, 0, 0, 0, 0, 2, ?)",
            [(f"{many.digest}:{n}", f"00/{n:030x}") for n in range(10_000)],
        )
    result["present_of_10000_ms"] = _each(lambda n: directory.present(many), range(5)) * 1e3
    result["announce_10000_ms"] = _each(lambda n: directory.announce([many]), range(5)) * 1e3
    return {name: round(value, 3) for name, value in result.items()}


def _each(action: Callable[[int], object], numbers: range) -> float:
    """Median of the seconds per call."""
    times = []
    for number in numbers:
        began = time.perf_counter()
        action(number)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def shared(base: Path, origin: origins.Origin, size: int) -> dict[str, float]:
    """Two mounts that start and load at the same time."""
    with contextlib.ExitStack() as stack:
        places = [base / "mnt1", base / "mnt2"]
        began = time.perf_counter()
        starts = [_start("mount", origin, base / "cache", place) for place in places]
        for place, start in zip(places, starts, strict=True):
            assert start.wait(timeout=60) == 0
            stack.callback(_umount, place)
        readers = [
            subprocess.Popen(
                [sys.executable, HERE / "load.py", "vllm", place],
                stdout=subprocess.PIPE, env=origins.environment(),
            )
            for place in places
        ]  # fmt: skip
        for reader in readers:
            output, _ = reader.communicate(timeout=240)
            assert json.loads(output)["bytes"] >= 0.98 * size
        seconds = time.perf_counter() - began
        second_requests = sum(_status(place)["second_requests"] for place in places)
        shed = sum(_status(place)["shed_blocks"] for place in places)
    return {
        "fetched_over_size": round(origin.requests().bytes / _size(origin), 4),
        "second_requests": second_requests,
        "shed_blocks": shed,
        "seconds": round(seconds, 3),
    }


def _status(place: Path) -> dict[str, int]:
    answer = subprocess.run(
        [sys.executable, "-m", "lazyfs", "status", "--json", place], check=True, timeout=60,
        env=origins.environment(), capture_output=True,
    )  # fmt: skip
    status: dict[str, int] = json.loads(answer.stdout)
    return status


def evict(base: Path, origin: origins.Origin) -> dict[str, float]:
    """Throughput of filling a cache: with room, and with an eviction for each block."""
    cache = base / "cache"
    limit = f"--cache-size={_size(origin) + 8 * BLOCK}"
    times: dict[str, list[float]] = {"with_room": [], "evicting": []}
    for _ in range(3):
        shutil.rmtree(cache, ignore_errors=True)
        for case in times:
            began = time.perf_counter()
            warm = _start("warm", origin, cache, None, limit)
            assert warm.wait(timeout=240) == 0
            times[case].append(time.perf_counter() - began)
            _make_strange(cache)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        **{f"{name}_gb_s": round(_size(origin) / s / 1e9, 3) for name, s in medians.items()},
        "cost": round(medians["evicting"] / medians["with_room"] - 1, 3),
    }


def _make_strange(cache: Path) -> None:
    """Turn the cached blocks into old blocks of another model."""
    with contextlib.closing(sqlite3.connect(cache / "cache.db")) as index, index:
        index.execute("UPDATE Cache SET key = 'x' || rowid || ':0', access_time = 0")


def _size(origin: origins.Origin) -> int:
    return sum(path.stat().st_size for path in origin.directory.rglob("*") if path.is_file())


def _start(
    command: str, origin: origins.Origin, cache: Path, place: Path | None, *options: str
) -> subprocess.Popen[bytes]:
    if place is not None:
        place.mkdir(exist_ok=True)
    mounting = [place, f"--log-file={place}.log"] if place else []
    return subprocess.Popen(
        [sys.executable, "-m", "lazyfs", command, f"s3://{origins.BUCKET}/m", *mounting,
         f"--endpoint-url={origin.url}", f"--cache-dir={cache}", *options],
        env=origins.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _umount(place: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "lazyfs", "umount", place], check=True, timeout=60,
        env=origins.environment(),
    )  # fmt: skip


@contextlib.contextmanager
def _scratch(directory: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lazyfs-cache-", dir=directory) as path:
        yield Path(path)


def main() -> None:
    """Run the parts; one line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--size", type=parse_size, default=parse_size("1GiB"))
    parser.add_argument("--parts", default="blocks,shared,evict")
    parser.add_argument("--profile", choices=origins.PROFILES, default="s3like")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if "blocks" in parts:
        with _scratch(arguments.directory) as base:
            print(json.dumps({"blocks": blocks(base)}), flush=True)
    if not {"shared", "evict"} & set(parts):
        return
    with _scratch(arguments.directory) as model:
        model.chmod(0o755)
        size = write_model(model / "m", arguments.size, 4)
        for part in [part for part in parts if part != "blocks"]:
            with (
                origins.serve(model, arguments.profile) as origin,
                _scratch(arguments.directory) as base,
            ):
                result = shared(base, origin, size) if part == "shared" else evict(base, origin)
            print(json.dumps({part: result}), flush=True)


if __name__ == "__main__":
    main()
