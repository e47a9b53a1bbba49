"""The checks of `lazyfs doctor`: what may keep a mount from working well, and what to do about it.

A check yields findings. No check changes anything, except for a file in the cache directory, which
is removed again. All checks block.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from lazyfs import cache_place
from lazyfs.blocks.buffers import take_buffer
from lazyfs.cache.direct_io import read_file, write_file
from lazyfs.cli.inspecting import models_of_source
from lazyfs.errors import LazyfsError
from lazyfs.fuse import mount_syscalls
from lazyfs.listed_object import ListedObject
from lazyfs.machine import free_memory
from lazyfs.options.mount_options import MountOptions
from lazyfs.options.option_types import GIB, MIB, format_duration, format_size
from lazyfs.store._receive import knows_tls
from lazyfs.store.protocol import Source
from lazyfs.store.stores import open_source
from lazyfs.store.url import SourceUrl

T = TypeVar("T")

# linux/capability.h
CAP_SYS_ADMIN = 21
TEST_BYTES = 64 * MIB
SLOW_DISK = 200 * 10**6
SLOW_FIRST_BYTE_S = 0.5
AT_ONCE = 8
# S3 rejects requests whose time is 15 minutes off (RequestTimeTooSkewed).
SKEW_REFUSED_S, SKEW_NOTICED_S = 900.0, 60.0


class Outcome(StrEnum):
    """The outcome of a check."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check. Its fields are those of `lazyfs doctor --json`.

    Attributes:
        what: the thing that was checked.
        state: the outcome.
        words: what was found.
        advice: what to do about it; empty if there is nothing to do.
    """

    what: str
    state: Outcome
    words: str
    advice: str = ""


def examine(options: MountOptions, source: SourceUrl | None) -> Iterator[Finding]:
    """Run all checks, and yield each finding as soon as it is known."""
    for check in (_device, _permission, _kernel, _settings, _memory):
        yield from check(options)
    yield from _cache(options)
    if source is not None:
        yield from _source(source, options)


def _device(options: MountOptions) -> Iterator[Finding]:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        yield Finding(
            "FUSE", Outcome.FAILED, "/dev/fuse is missing",
            "load the kernel module (modprobe fuse), or give the container the device "
            "(--device /dev/fuse)",
        )  # fmt: skip
    except OSError as error:
        yield Finding(
            "FUSE", Outcome.FAILED, f"/dev/fuse cannot be opened: {error.strerror}",
            "give this user access to it (usually mode 666), or pass the device to the container",
        )  # fmt: skip
    else:
        yield Finding("FUSE", Outcome.OK, "/dev/fuse can be opened")


def _permission(options: MountOptions) -> Iterator[Finding]:
    """Whether this user can mount."""
    if os.geteuid() == 0:
        if _capabilities() >> CAP_SYS_ADMIN & 1:
            yield Finding("mounting", Outcome.OK, "as root")
        else:
            yield Finding(
                "mounting", Outcome.FAILED, "root cannot mount without CAP_SYS_ADMIN",
                "give the container this capability (--cap-add SYS_ADMIN), or use the CSI driver",
            )  # fmt: skip
        return
    if path := shutil.which("fusermount3"):
        yield Finding("mounting", Outcome.OK, f"through {path}")
    else:
        yield Finding(
            "mounting", Outcome.FAILED, "fusermount3 is missing; ordinary users need it to mount",
            "install the package fuse3, or mount as root",
        )  # fmt: skip
    if options.allow_other and not _allows_others():
        yield Finding(
            "--allow-other", Outcome.FAILED, "not permitted for ordinary users on this machine",
            "add the line user_allow_other to /etc/fuse.conf",
        )  # fmt: skip


def _capabilities() -> int:
    found = re.search(r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1], 16) if found else 0


def _allows_others() -> bool:
    try:
        lines = Path("/etc/fuse.conf").read_text().splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def _kernel(options: MountOptions) -> Iterator[Finding]:
    release = platform.release()
    numbers = tuple(int(number) for number in re.findall(r"\d+", release)[:2])
    if numbers >= mount_syscalls.RESEND_SINCE:
        yield Finding("kernel", Outcome.OK, f"{release}: a mount survives the death of its worker")
    else:
        yield Finding(
            "kernel", Outcome.WARNING,
            f"{release}: if a worker dies, the source is mounted again, and open files fail",
            "Linux 6.9 and newer keep them open",
        )  # fmt: skip


def _settings(options: MountOptions) -> Iterator[Finding]:
    """Whether the kernel's read-ahead for a mount can be raised (`set_read_ahead`)."""
    read_only = os.statvfs("/sys").f_flag & os.ST_RDONLY
    if os.geteuid() == 0 and not read_only:
        yield Finding("read-ahead", Outcome.OK, f"can be set to {format_size(options.read_ahead)}")
    else:
        why = "/sys is read-only" if read_only else "only root may set it"
        yield Finding(
            "read-ahead", Outcome.WARNING, f"cannot be changed: {why}",
            "reads of data that is not in the page cache yet are slower; mount as root to raise it",
        )  # fmt: skip


def _memory(options: MountOptions) -> Iterator[Finding]:
    free = free_memory()
    words = f"{format_size(free)} free for blocks and the page cache"
    if free < options.memory_limit + GIB:
        yield Finding(
            "memory", Outcome.WARNING, words,
            "little can be prefetched into the page cache; raise the limit of the cgroup",
        )  # fmt: skip
    else:
        yield Finding("memory", Outcome.OK, words)


def _cache(options: MountOptions) -> Iterator[Finding]:
    if options.cache_dir == "none":
        yield Finding("cache", Outcome.OK, "disabled (--cache-dir none)")
        return
    for directory in cache_place.directories(options.cache_dir):
        yield _cache_directory(directory)


def _cache_directory(directory: Path) -> Finding:
    what = f"cache {directory}"
    try:
        cache_place.check_disks([directory])
        cache_place.check(directory)
    except LazyfsError as error:
        return Finding(what, Outcome.FAILED, str(error))
    disk = os.statvfs(directory)
    free = disk.f_bavail * disk.f_frsize
    if free < 4 * TEST_BYTES:
        return Finding(
            what, Outcome.WARNING, f"{format_size(free)} free",
            "free some space, or choose another --cache-dir",
        )  # fmt: skip
    try:
        written, read = _disk_rates(directory)
    except OSError as error:
        return Finding(
            what, Outcome.FAILED, f"not writable: {error.strerror}", "choose another --cache-dir"
        )
    words = (
        f"{format_size(free)} free, writes {format_size(written)}/s, reads {format_size(read)}/s"
    )
    if min(written, read) < SLOW_DISK:
        return Finding(
            what, Outcome.WARNING, words,
            "slower than a fast network; use a local NVMe disk, or try --cache-dir none",
        )  # fmt: skip
    return Finding(what, Outcome.OK, words)


def _disk_rates(directory: Path) -> tuple[float, float]:
    """Write and read rates in bytes per second, bypassing the page cache. Raises OSError."""
    path = directory / f"doctor-{os.getpid()}"
    try:
        began = time.perf_counter()
        write_file(path, memoryview(os.urandom(MIB) * (TEST_BYTES // MIB)), b"doctor")
        written = time.perf_counter()
        read_file(path, take_buffer(TEST_BYTES), len(b"doctor"))
        ended = time.perf_counter()
    finally:
        path.unlink(missing_ok=True)
    return TEST_BYTES / (written - began), TEST_BYTES / (ended - written)


def _source(url: SourceUrl, options: MountOptions) -> Iterator[Finding]:
    """Check the source. Each step needs the one before."""
    if options.endpoint_url:
        yield _transport(options.endpoint_url)
    try:
        source, took_s = _timed(lambda: open_source(url, options))
        yield Finding(
            "credentials", Outcome.OK, f"found; region {source.region} ({format_duration(took_s)})"
        )
        yield _clock(source)
        page, took_s = _timed(lambda: source.list_page(url.prefix, None))
    except LazyfsError as error:
        yield Finding("source", Outcome.FAILED, str(error), _hint(error))
        return
    if not page.objects:
        yield Finding(
            "listing", Outcome.FAILED, f"{url}: no objects below this prefix", "check its spelling"
        )
        return
    more = " and more" if page.next_token else ""
    yield Finding(
        "listing", Outcome.OK,
        f"{len(page.objects)} objects{more} in {format_duration(took_s)}",
    )  # fmt: skip
    readable = [one for one in page.objects if one.size_bytes]
    if readable:
        yield from _ranges(source, max(readable, key=lambda one: one.size_bytes), options)
    yield from _models(source, options, is_large=page.next_token is not None)


def _models(source: Source, options: MountOptions, *, is_large: bool) -> Iterator[Finding]:
    """Whether the models are whole. Each file of weights is read at its beginning."""
    if is_large:
        yield Finding(
            "models", Outcome.OK, "not checked: there are more than 1,000 objects; give the prefix "
            "of one model, or use lazyfs inspect",
        )  # fmt: skip
        return
    try:
        _, found = models_of_source(source, options)
    except LazyfsError as error:
        yield Finding("models", Outcome.FAILED, str(error), _hint(error))
        return
    for model in found:
        what = f"model {model.layout.directory}".strip()
        for why in model.broken:
            words, _, advice = why.partition("; ")
            yield Finding(what, Outcome.FAILED, words, advice)
        for shard in model.shards:
            if shard.trouble and not any(shard.path in why for why in model.broken):
                yield Finding(what, Outcome.WARNING, f"{shard.path}: {shard.trouble}")
    whole = sum(bool(model.shards) and not model.broken for model in found)
    if whole:
        yield Finding("models", Outcome.OK, f"{whole}: nothing is missing or cut off")


def _transport(endpoint: str) -> Finding:
    parts = urlsplit(endpoint)
    if parts.scheme == "https" and not knows_tls():
        return Finding(
            "endpoint", Outcome.WARNING,
            f"{endpoint}: TLS takes more processor time with this Python, whose OpenSSL lazyfs "
            "cannot call",
            "use the Python of the distribution, or the package or the archive of lazyfs",
        )  # fmt: skip
    if parts.scheme == "https" or parts.hostname in ("127.0.0.1", "localhost", "::1"):
        return Finding("endpoint", Outcome.OK, endpoint)
    return Finding(
        "endpoint", Outcome.WARNING, f"{endpoint} is not encrypted",
        "use https:// unless the network is trusted",
    )  # fmt: skip


def _clock(source: Source) -> Finding:
    skew_s = source.clock_skew_s()
    if skew_s is None:
        return Finding("clock", Outcome.OK, "not checked: S3 did not send a date")
    words = f"{abs(skew_s):.0f} s {'behind' if skew_s > 0 else 'ahead of'} the clock of S3"
    if abs(skew_s) < SKEW_NOTICED_S:
        return Finding("clock", Outcome.OK, words)
    return Finding(
        "clock", Outcome.FAILED if abs(skew_s) >= SKEW_REFUSED_S else Outcome.WARNING, words,
        "synchronise it with NTP; S3 rejects requests that are 15 minutes off",
    )  # fmt: skip


def _ranges(source: Source, one: ListedObject, options: MountOptions) -> Iterator[Finding]:
    """Whether ranges of an object can be read, with latency and throughput."""
    length = min(options.block_size, one.size_bytes)
    starts = range(0, one.size_bytes - length + 1, length)[:AT_ONCE]

    def get(start: int) -> int:
        return len(source.ranges.read(one, start, length))

    try:
        source.ranges.read(one, 0, 1)  # connects
        _, first_s = _timed(lambda: source.ranges.read(one, 0, 1))
        with ThreadPoolExecutor(AT_ONCE) as threads:
            sizes, took_s = _timed(lambda: list(threads.map(get, starts)))
    except LazyfsError as error:
        yield Finding("reading", Outcome.FAILED, str(error), _hint(error))
        return
    words = (
        f"first byte after {format_duration(first_s)}; {format_size(sum(sizes) / took_s)}/s "
        f"with {len(starts)} requests of {format_size(length)}"
    )
    if first_s > SLOW_FIRST_BYTE_S:
        yield Finding(
            "reading", Outcome.WARNING, words,
            "the endpoint is far away or busy; a larger --block-size sends fewer requests",
        )  # fmt: skip
    else:
        yield Finding("reading", Outcome.OK, words)


def _hint(error: LazyfsError) -> str:
    return _HINTS.get(type(error).__name__, "")


_HINTS = {
    "AccessDeniedError": "the role or user needs s3:ListBucket on the bucket and s3:GetObject on "
    "its objects, and kms:Decrypt if they are encrypted with a customer-managed key",
    "CredentialsExpiredError": "renew them (aws sso login), or find out why they are not renewed",
    "NoSuchBucketError": "check the name of the bucket and --endpoint-url",
    "WrongRegionError": "set --region to the region of the bucket, or leave it out to ask S3",
    "UnavailableError": "check --endpoint-url, DNS, proxies and firewalls from this machine",
    "UntrustedError": "pass the CA certificate with --ca-bundle",
    "ThrottledError": "S3 asks for fewer requests; try again later",
}


def _timed(action: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    return action(), time.perf_counter() - began
