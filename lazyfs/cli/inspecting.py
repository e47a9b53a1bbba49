"""`lazyfs inspect`: describe the models of a source or mount, and what is prefetched of them."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from lazyfs.blocks import block_length
from lazyfs.cache import BlockCache
from lazyfs.cli.messages import tell
from lazyfs.cli.mounts import record_at
from lazyfs.cli.settings import settings, with_mount_options
from lazyfs.cli.tables import console, print_rows
from lazyfs.control.client import ControlClient, ControlError
from lazyfs.errors import ObjectGoneError, SourceError
from lazyfs.listed_object import File, ListedObject
from lazyfs.model.inspection import Layer, Model, group_similar, inspect_files
from lazyfs.model.soundness import Reader
from lazyfs.namespace.tree import Tree
from lazyfs.options.mount_options import MountOptions
from lazyfs.options.option_types import compile_pattern, format_size
from lazyfs.process import privileges
from lazyfs.process.mount_records import control_socket
from lazyfs.store.listing_page import Tokens
from lazyfs.store.protocol import Store
from lazyfs.store.stores import open_source
from lazyfs.store.url import SourceUrl, is_url

FILES_NAMED = 12
# A mount may have to ask S3 first, with retries.
MOUNT_TIMEOUT_S = 60.0
WHEN = {
    "mount": "from the moment of mount, in this order",
    "open": "once one of its files is opened, in this order",
    "never": "nothing (--prefetch {policy})",
}


@click.command()
@click.argument("what", metavar="SOURCE|MOUNTPOINT")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@with_mount_options
def inspect(what: str, as_json: bool, config: Path | None, **given: Any) -> None:
    """Show the models of SOURCE (s3://BUCKET/PREFIX) or MOUNTPOINT: shards, tensors, bytes and
    parameters by layer; what is prefetched in which order; what is left out and why; and how much
    is in the cache of this machine.

    For a SOURCE, lazyfs reads the listing, indexes and headers from S3, with the given options.
    For a MOUNTPOINT, it asks the daemon of the mount, and needs no credentials.

    Exit code 1: a model is broken; the lines "broken" say why.

    \b
    Examples:
      lazyfs inspect s3://my-bucket/models/llama-3-8b
      lazyfs inspect /mnt/llama --json | jq '.models[].excluded'
    """
    if is_url(what):
        options, _ = settings(config, given)
        privileges.limit_memory(options.memory_limit)
        url = what
        sizes, models = models_of_source(open_source(SourceUrl.parse(url), options), options)
    else:
        record = record_at(Path(what))
        client = ControlClient(control_socket(Path(record.mountpoint)), MOUNT_TIMEOUT_S)
        options = MountOptions.parse(("--{name}", client.get("/options")))
        privileges.limit_memory(options.memory_limit)
        url = record.source
        sizes, models = models_of_mount(client, options)
    if as_json:
        described = [_as_json(model) for model in models]
        tell(json.dumps({"source": url, "models": described}, indent=1))
    else:
        for model in models:
            _show(model, url, options)
        _show_others(sizes, models)
    if any(model.broken for model in models):
        sys.exit(1)


def models_of_mount(
    client: ControlClient, options: MountOptions
) -> tuple[Mapping[str, int], list[Model]]:
    """The sizes of all files of a mount, and its models."""

    def read(path: str, offset: int, length: int) -> bytes:
        wanted = {"path": path, "offset": offset, "length": length}
        try:
            return base64.b64decode(client.put("/files/read", wanted)["base64"]) if length else b""
        except ControlError as error:
            raise SourceError(str(error)) from error

    sizes: Mapping[str, int] = client.get("/files")
    return sizes, _models(
        sizes,
        read,
        options,
        lambda path: (
            client.put("/files/cached", {"path": path}) if options.cache_dir != "none" else None
        ),
        # The daemon would fetch a block of each.
        look_at_alternatives=False,
    )


def models_of_source(source: Store, options: MountOptions) -> tuple[Mapping[str, int], list[Model]]:
    """The sizes of all files of a source, and its models.

    Raises:
        SourceError: it cannot be listed.
    """
    tree = Tree(source.url.prefix)
    tree.plant(tree.root, _listing(source), [], whole=True)
    files = {path: file for file in tree.files() if options.wants(path := tree.path(file))}
    if not files:
        raise ObjectGoneError(f"{source.url}: no objects below this prefix; check its spelling")

    def read(path: str, offset: int, length: int) -> bytes:
        file = files[path]
        return bytes(source.ranges.read(file, offset, length)) if length else b""

    sizes = {path: file.size_bytes for path, file in files.items()}
    return sizes, _models(sizes, read, options, _cached(source, options, files))


def _models(
    sizes: Mapping[str, int],
    read: Reader,
    options: MountOptions,
    cached: Callable[[str], int | None],
    *,
    look_at_alternatives: bool = True,
) -> list[Model]:
    wanted = compile_pattern(options.tensors).search if options.tensors else None
    return inspect_files(
        sizes,
        read,
        prefetch=options.prefetch,
        prefetch_on=options.prefetch_on,
        include=options.include,
        wanted=None if wanted is None else lambda name: wanted(name) is not None,
        cached=cached,
        look_at_alternatives=look_at_alternatives,
    )


def _listing(source: Store) -> list[ListedObject]:
    objects: list[ListedObject] = []
    tokens, token = Tokens(str(source.url)), None
    while True:
        page = source.list_page(source.url.prefix, token)
        objects += page.objects
        token = tokens.after(page)
        if token is None:
            return objects


def _cached(
    source: Store, options: MountOptions, files: Mapping[str, File]
) -> Callable[[str], int | None]:
    """A function that returns the cached bytes of a file; None if this user cannot read a cache."""
    cache = BlockCache.of(options, source.endpoint, source.url.bucket)
    if cache is None or not all(
        os.access(directory.path, os.R_OK | os.W_OK | os.X_OK) for directory in cache.directories
    ):
        return lambda path: None

    def cached(path: str) -> int:
        file = files[path]
        numbers = cache.present(file)
        return sum(block_length(file.size_bytes, options.block_size, each) for each in numbers)

    return cached


def _show(model: Model, url: str, options: MountOptions) -> None:
    layout, total = model.layout, model.total
    dtypes = ", ".join(f"{dtype} {format_size(size)}" for dtype, size in total.dtypes.most_common())
    small = sum(model.sizes[path] for path in layout.small)
    size = small + sum(shard.size_bytes for shard in model.shards)
    shards = f"{_many(len(model.shards), 'shard')} and " if model.shards else ""
    rows = [
        (
            "model" if model.shards or layout.excluded else "files",
            f"{url}/{layout.directory}".removesuffix("/"),
        ),
    ]
    if layout.paths:
        rows.append(("size", f"{format_size(size)} in {shards}{_small(model)}"))
    if total.tensors:
        rows.append(("tensors", f"{total.tensors:,}, {total.parameters:,} parameters; {dtypes}"))
    if left_out := sum(model.sizes[item.path] for item in layout.excluded):
        files = _many(len(layout.excluded), "file")
        rows.append(("left out", f"{format_size(left_out)} in {files}, listed below"))
    if layout.paths:
        rows.append(("prefetched", WHEN[model.prefetched].format(policy=options.prefetch)))
    rows += (("broken", why) for why in model.broken)
    print_rows(rows + [("warning", warning) for warning in layout.warnings])
    if model.shards:
        _print(_shards(model, options))
    if model.layers:
        _print(_layers(model))
    if layout.excluded:
        _print(_excluded(model))
    console().print()


def _show_others(sizes: Mapping[str, int], models: Sequence[Model]) -> None:
    """Print what is there beside the models, so that all bytes are accounted for."""
    of_models = {path for model in models for path in model.layout.paths}
    of_models.update(item.path for model in models for item in model.layout.excluded)
    others = sizes.keys() - of_models
    size = sum(sizes[path] for path in others)
    if others:
        print_rows([("others", f"{format_size(size)} in {_many(len(others), 'file')} of no model")])
        if size:
            tell("They are fetched when they are read.")


def _small(model: Model) -> str:
    names = model.layout.small
    more = ", ..." if len(names) > FILES_NAMED else ""
    listed = f" ({', '.join(names[:FILES_NAMED])}{more})" if names else ""
    return f"{_many(len(names), 'small file')}{listed}"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def _print(table: Table) -> None:
    console().print()
    console().print(table)


def _table(*columns: str) -> Table:
    """A table with names in the first column and numbers in the others."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _shards(model: Model, options: MountOptions) -> Table:
    some = options.tensors is not None
    table = _table("shard", "size", "tensors", *(["wanted"] if some else []), "cached")
    for shard in model.shards:
        cells = [format_size(shard.size_bytes), _count(shard.tensors)]
        cells += [format_size(shard.wanted_bytes)] if some else []
        table.add_row(shard.path, *cells, _share(shard.cached_bytes, shard.size_bytes))
        if shard.trouble:
            table.add_row(f"  {shard.trouble}", style="yellow")
        if shard.path in model.layout.included:
            table.add_row("  prefetched only because of --include, so it comes last")
    return table


def _layers(model: Model) -> Table:
    table = _table("layer", "layers", "tensors each", "parameters each", "size each", "dtypes")
    for name, layer, count in group_similar(model.layers):
        table.add_row(
            name,
            str(count),
            _count(layer.tensors),
            f"{layer.parameters:,}",
            format_size(layer.size_bytes),
            " ".join(layer.dtypes),
        )
    return table


def _excluded(model: Model) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("not prefetched", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("because it is", overflow="fold")
    for item in model.layout.excluded:
        table.add_row(item.path, format_size(model.sizes[item.path]), item.reason)
    return table


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _share(part: int | None, whole: int) -> str:
    return "" if part is None else f"{part / whole:.0%}" if whole else "100%"


def _as_json(model: Model) -> dict[str, Any]:
    layout = model.layout
    return {
        "directory": layout.directory,
        "format": layout.format,
        "prefetched": model.prefetched,
        "small": [{"path": path, "size_bytes": model.sizes[path]} for path in layout.small],
        "shards": [asdict(shard) for shard in model.shards],
        "included": list(layout.included),
        "layers": [_layer_as_json(layer) for layer in model.layers],
        "total": _layer_as_json(model.total),
        "excluded": [
            asdict(item) | {"size_bytes": model.sizes[item.path]} for item in layout.excluded
        ],
        "warnings": list(layout.warnings),
        "broken": list(model.broken),
    }


def _layer_as_json(layer: Layer) -> dict[str, Any]:
    return asdict(layer) | {"dtypes": dict(layer.dtypes)}
