"""`lazyfs warm`: fill the cache of this node with a model before it is needed."""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from typing import Any

import click
import trio

from lazyfs import cache_place, log
from lazyfs.cache import BlockCache
from lazyfs.cli.messages import tell
from lazyfs.cli.mounts import record_at
from lazyfs.cli.progress import ByteProgress
from lazyfs.cli.settings import settings, with_mount_options
from lazyfs.control.client import ControlClient, ControlError
from lazyfs.errors import LazyfsError, OptionError
from lazyfs.fetch.warm import IncompleteError, Progress, Warmer
from lazyfs.namespace.catalog import Catalog
from lazyfs.namespace.listing_log import ListingLog
from lazyfs.observe.recorder import Recorder
from lazyfs.options.mount_options import MountOptions
from lazyfs.options.option_types import format_size
from lazyfs.process import descriptors, privileges
from lazyfs.process.mount_records import control_socket
from lazyfs.store.stores import open_source
from lazyfs.store.url import SourceUrl, is_url

POLL_S = 0.2


@click.command()
@click.argument("source_or_mountpoint", metavar="SOURCE|MOUNTPOINT")
@click.option(
    "--verify", is_flag=True,
    help="Read everything back, and compare whole objects with the checksums stored in S3.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print progress as JSON lines.")
@with_mount_options
def warm(
    source_or_mountpoint: str, verify: bool, as_json: bool, config: Path | None, **given: Any
) -> None:
    """Fill the cache of this node from SOURCE (s3://BUCKET/PREFIX) or the source of MOUNTPOINT.

    Fetches what a loader of the models will read; with --include, the files that match; without a
    model, everything. A second call resumes where the first one stopped. Mounts may be in use
    meanwhile. For a MOUNTPOINT, its own options and credentials apply.

    \b
    Examples:
      lazyfs warm s3://models/llama --cache-dir /nvme/lazyfs
      lazyfs warm s3://models/llama --include '*.json' --verify
      lazyfs warm /mnt/llama

    Exit code 1: something is missing; the last line says why.
    """
    if is_url(source_or_mountpoint):
        options = descriptors.fit(settings(config, given)[0])
        cache_place.check_disks(cache_place.directories(options.cache_dir))
        privileges.limit_memory(options.memory_limit)
        _warm_source(SourceUrl.parse(source_or_mountpoint), options, verify, as_json)
        return
    include = given.pop("include")
    others = [name for name, value in given.items() if value not in (None, ())]
    if others or config:
        name = others[0].replace("_", "-") if others else "config"
        raise OptionError(
            f"--{name}: cannot be given for a MOUNTPOINT, which is warmed with its own options"
        )
    mountpoint = Path(os.path.realpath(source_or_mountpoint))
    progress = warm_mount(mountpoint, list(include), verify=verify, as_json=as_json)
    _tell(progress, verify, as_json)


# The name of this command in other tools.
warmup = warm


def _warm_source(url: SourceUrl, options: MountOptions, verify: bool, as_json: bool) -> None:
    log.configure(options.log_level, options.log_format, source=str(url))
    trio.run(functools.partial(_run, url, options, verify, as_json))


async def _run(url: SourceUrl, options: MountOptions, verify: bool, as_json: bool) -> None:
    source = await trio.to_thread.run_sync(open_source, url, options)
    catalog = Catalog(source, options, ListingLog(None), Recorder("off"))
    await catalog.open()
    cache = BlockCache.of(options, source.endpoint, url.bucket)
    if cache is None:
        raise OptionError("--cache-dir: none: there is no cache to fill")
    cache_place.share_all(cache_place.directories(options.cache_dir))
    await trio.to_thread.run_sync(cache.open)
    warmer = Warmer(source, catalog, cache, options)
    with ByteProgress("cached", as_json=as_json) as shown:
        failure: LazyfsError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_show, warmer.progress, shown)
            try:
                await warmer.run(options.include, verify=verify)
            except LazyfsError as error:
                failure = error  # raised here, it would become an exception group
            nursery.cancel_scope.cancel()
        shown.update(warmer.progress.done_bytes, warmer.progress.total_bytes)
        if failure is not None:
            raise failure
    _tell(warmer.progress, verify, as_json)


async def _show(progress: Progress, shown: ByteProgress) -> None:
    while True:
        if progress.total_bytes:
            shown.update(progress.done_bytes, progress.total_bytes)
        await trio.sleep(POLL_S)


def warm_mount(mountpoint: Path, include: list[str], *, verify: bool, as_json: bool) -> Progress:
    """Ask a mount to fill its cache, and show the progress until it is done.

    Raises:
        MountError: nothing is mounted there, or not any more.
        ControlError: the mount cannot fill its cache, or is already filling it.
        IncompleteError: something is missing.
    """
    order = {"include": include, "verify": verify}
    record_at(mountpoint)
    client = ControlClient(control_socket(mountpoint))
    client.put("/warm", order)
    with ByteProgress("cached", as_json=as_json) as shown:
        while True:
            time.sleep(POLL_S)
            try:
                answer = client.get("/warm")
                if answer["state"] == "idle":  # another worker serves the mount now
                    answer = client.put("/warm", order)
            except ControlError:
                record_at(mountpoint)
                continue
            fields = {name: answer[name] for name in Progress.__dataclass_fields__}
            progress = Progress(**fields)
            if progress.total_bytes:
                shown.update(progress.done_bytes, progress.total_bytes)
            if answer["state"] == "failed":
                raise IncompleteError(answer["error"])
            if answer["state"] == "done":
                return progress


def _tell(progress: Progress, verify: bool, as_json: bool) -> None:
    if as_json:
        return
    line = (
        f"{progress.files} files, {format_size(progress.total_bytes)} in the cache; "
        f"{format_size(progress.fetched_bytes)} fetched"
    )
    if verify:
        line += (
            f"; {format_size(progress.verified_bytes)} read back, {progress.compared_files} files "
            f"compared with the checksums stored in S3"
        )
    tell(line)
