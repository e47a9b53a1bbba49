"""`lazyfs cache`: show, check and prune the block cache of this node."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any

import click
from rich.table import Table

from lazyfs import cache_place
from lazyfs.cache.block_format import Content
from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.index import IndexFailedError
from lazyfs.cache.inventory import models, objects
from lazyfs.cache.space import Limits
from lazyfs.cli.messages import tell
from lazyfs.cli.progress import ByteProgress
from lazyfs.cli.settings import settings, with_cache_options
from lazyfs.cli.tables import console, print_rows
from lazyfs.errors import CacheError, OptionError
from lazyfs.options.option_types import Duration, Size, format_duration, format_size
from lazyfs.process.worker_files import become_worker
from lazyfs.store.url import object_name

_AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_AGES = Duration(1, 10 * 365 * 86400)
_SIZES = Size(0, 1 << 60)


@click.group("cache")
def cache() -> None:
    """Show, check and prune the block cache of this node.

    All of this is safe while mounts use the cache. They fetch a removed block again when it is
    read.
    """


@cache.command()
@with_cache_options
@_AS_JSON
def info(as_json: bool, **given: Any) -> None:
    """Show size, limits and hit rate of the cache."""
    described = [_describe(directory) for directory in _opened(given)]
    if as_json:
        tell(json.dumps(described, indent=1))
        return
    for fields in described:
        hits, asked = fields["hits"], fields["hits"] + fields["misses"]
        print_rows(
            [
                ("directory", fields["directory"]),
                (
                    "used",
                    f"{format_size(fields['used_bytes'])} of "
                    f"{format_size(fields['allowed_bytes'])} in {fields['blocks']} blocks",
                ),
                (
                    "disk",
                    f"{format_size(fields['free_bytes'])} free, "
                    f"{format_size(fields['reserve_bytes'])} reserved for others",
                ),
                ("objects", f"{fields['objects']} in {fields['models']} models"),
                ("least recent use", _ago(fields["oldest_use_s"])),
                (
                    "hits",
                    f"{hits} of {asked} blocks ({hits / asked:.0%})" if asked else "no lookups yet",
                ),
            ]
        )


@cache.command("ls")
@click.option("--files", is_flag=True, help="List each object on a line of its own.")
@with_cache_options
@_AS_JSON
def list_(files: bool, as_json: bool, **given: Any) -> None:
    """List the models in the cache, and how much of each is there."""
    entries = objects(_opened(given))
    if not files:
        entries = models(entries)
    if as_json:
        tell(json.dumps([asdict(entry) for entry in entries], indent=1))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("OBJECT" if files else "MODEL", overflow="fold")
    names = ("CACHED", "SIZE", "SHARE", "ADDED", "USED")
    for name in names if files else ("FILES", *names):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in entries:
        cells = [
            format_size(entry.cached_bytes),
            format_size(entry.size_bytes),
            f"{entry.cached_bytes / entry.size_bytes:.0%}",
            _ago(entry.stored_s),
            _ago(entry.used_s),
        ]
        table.add_row(entry.name, *(cells if files else [str(entry.files), *cells]))
    console().print(table)


@cache.command()
@click.argument("patterns", nargs=-1, metavar="[s3://BUCKET/PREFIX*]...")
@click.option(
    "--older-than", metavar="TIME", help="Remove blocks not used for this long, such as 12h or 30d."
)
@click.option(
    "--to",
    "size",
    metavar="SIZE",
    help="Remove the least recently used blocks until the cache has this size.",
)
@with_cache_options
@_AS_JSON
def prune(
    patterns: tuple[str, ...], older_than: str | None, size: str | None, as_json: bool, **given: Any
) -> None:
    """Remove blocks from the cache: by pattern, by age, or down to a size.

    \b
    Examples:
      lazyfs cache prune 's3://models/llama-2/*'
      lazyfs cache prune --older-than 30d
      lazyfs cache prune --to 200GiB
    """
    if not patterns and older_than is None and size is None:
        raise OptionError("cache prune: give a pattern, --older-than or --to")
    age_s = None if older_than is None else _parsed(_AGES, "--older-than", older_than)
    most = None if size is None else _parsed(_SIZES, "--to", size)
    directories = _opened(given)
    before = sum(directory.used_bytes() for directory in directories)
    for directory in directories:
        for content in _contents(directory) if patterns else ():
            name = object_name(content.bucket, content.key)
            if any(fnmatchcase(name, pattern) for pattern in patterns):
                directory.drop(content)
        if age_s is not None:
            directory.drop_older(time.time() - age_s)
        if most is not None:
            directory.shrink(most // len(directories))
    _tell_freed(directories, before, as_json)


@cache.command()
@with_cache_options
@_AS_JSON
def clear(as_json: bool, **given: Any) -> None:
    """Remove all blocks from the cache."""
    directories = _opened(given)
    before = sum(directory.used_bytes() for directory in directories)
    for directory in directories:
        directory.shrink(0)
    _tell_freed(directories, before, as_json)


@cache.command()
@with_cache_options
@_AS_JSON
def verify(as_json: bool, **given: Any) -> None:
    """Read and check every block, and remove damaged ones.

    Exit code 1: a block was damaged.
    """
    directories = _opened(given)
    work = [
        (directory, content, number)
        for directory in directories
        for content in _contents(directory)
        for number in directory.present(content)
    ]
    total = sum(content.length(number) for _, content, number in work)
    done = 0
    damaged = []
    with ByteProgress("verified", as_json=as_json) as progress:
        for directory, content, number in work:
            if not directory.verify(content, number):
                damaged.append(f"block {number} of {object_name(content.bucket, content.key)}")
            done += content.length(number)
            progress.update(done, total)
    if damaged:
        first = "; ".join(damaged[:5])
        more = f"; and {len(damaged) - 5} more" if len(damaged) > 5 else ""
        raise CacheError(
            f"{len(damaged)} of {len(work)} blocks were damaged and have been removed: "
            f"{first}{more}"
        )
    if not as_json:
        tell(f"{len(work)} blocks, {format_size(total)}: all intact")


def _opened(given: dict[str, Any]) -> list[CacheDirectory]:
    """Open the cache directories that the options, the environment or the defaults name."""
    options, _ = settings(None, given)
    limits = Limits(options.cache_size, options.cache_reserve)
    paths = cache_place.directories(options.cache_dir)
    cache_place.check_disks(paths)
    cache_place.share_all(path for path in paths if path.is_dir())
    become_worker(paths)
    directories = [CacheDirectory(path, limits) for path in paths]
    if not directories:
        raise OptionError("--cache-dir: none: there is no cache")
    for directory in directories:
        if not directory.path.is_dir():
            raise CacheError(f"--cache-dir: {directory.path}: no such directory")
        cache_place.check(directory.path)
        try:
            directory.open()
        except (OSError, IndexFailedError) as error:
            raise CacheError(f"--cache-dir: {directory.path}: cannot be used: {error}") from error
    return directories


def _describe(directory: CacheDirectory) -> dict[str, Any]:
    found = objects([directory])
    hits, misses = directory.hits_and_misses()
    return {
        "directory": str(directory.path),
        **directory.space(),
        "blocks": sum(stored.blocks for stored in directory.stored()),
        "objects": len(found),
        "models": len(models(found)),
        "oldest_use_s": min((entry.used_s for entry in found), default=None),
        "hits": hits,
        "misses": misses,
    }


def _contents(directory: CacheDirectory) -> list[Content]:
    return [Content.from_identity(stored.tag.encode()) for stored in directory.stored()]


def _parsed(kind: Duration | Size, option: str, text: str) -> Any:
    try:
        return kind.parse(text)
    except ValueError:
        raise OptionError(f"{option}: {text!r} is not allowed: {kind.allowed}") from None


def _tell_freed(directories: list[CacheDirectory], before: int, as_json: bool) -> None:
    left = sum(directory.used_bytes() for directory in directories)
    freed = max(0, before - left)
    if as_json:
        tell(json.dumps({"freed_bytes": freed, "left_bytes": left}))
    else:
        tell(f"{format_size(freed)} freed, {format_size(left)} left")


def _ago(moment_s: float | None) -> str:
    if moment_s is None:
        return "never"
    return f"{format_duration(max(0.0, time.time() - moment_s))} ago"
