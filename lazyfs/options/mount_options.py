"""Every setting of a mount, declared once.

`MountOptions` is the single table: each field carries its type with bounds, its default and its
help. The command line, `-o key=value`, the environment (`LAZYFS_BLOCK_SIZE`), the TOML file and
the reference in `docs/OPTIONS.md` are all made from it. A value is text until `MountOptions.parse`
has read it, wherever it came from, so every source gets the same checks and the same messages.
This module is long because the table is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lazyfs.errors import OptionError
from lazyfs.machine import auto_memory, auto_movers, auto_requests
from lazyfs.options.option_types import (
    KIB,
    MIB,
    Address,
    Choice,
    Count,
    Duration,
    Flag,
    Glob,
    LocalPath,
    LocalPaths,
    Mode,
    OptionType,
    Pattern,
    PlainServer,
    Share,
    Size,
    Text,
    Url,
    format_size,
    matches,
)

POLICIES = ("model", "tensor", "sequential", "headers", "off")
# The policies that need a plan of what a loader will read (`lazyfs/prefetch/planner.py`).
PLANNED = frozenset(("model", "tensor", "headers"))

# The options that `--preset` sets.
PRESETS: dict[str, dict[str, str]] = {
    # A server loads the whole of one model as fast as it can.
    "serving": {"prefetch": "model", "prefetch-on": "mount", "memory-limit": "512MiB"},
    # Many readers, each with its own files, in an order that only it knows.
    "training": {"prefetch": "sequential", "memory-limit": "1GiB", "read-ahead": "4MiB"},
    # A person looks into models without loading them.
    "browse": {"prefetch": "headers", "prefetch-on": "open", "block-size": "1MiB"},
}


@dataclass(frozen=True)
class Option:
    """What is declared about one option; `name` is as on the command line, `block-size`."""

    name: str
    kind: OptionType
    group: str
    default_text: str
    help: str

    @property
    def is_flag(self) -> bool:
        """Whether the command line takes it without a value."""
        return isinstance(self.kind, Flag)

    @property
    def negation(self) -> str:
        """What takes back a flag that the environment or a file has set: `no-allow-other`."""
        positive = self.name.removeprefix("no-")
        return positive if positive != self.name else f"no-{self.name}"

    @property
    def metavar(self) -> str:
        """What stands for the value in the help of the command line."""
        return "|".join(self.kind.words) if isinstance(self.kind, Choice) else self.kind.metavar

    @property
    def environment(self) -> str:
        """The environment variable that sets it: `LAZYFS_BLOCK_SIZE`."""
        return "LAZYFS_" + self.name.upper().replace("-", "_")

    @property
    def attribute(self) -> str:
        """The field of `MountOptions`: `block_size`."""
        return self.name.replace("-", "_")

    @property
    def camel_case(self) -> str:
        """The name in volume attributes and StorageClass parameters: `blockSize`."""
        head, *rest = self.name.split("-")
        return head + "".join(word.capitalize() for word in rest)

    def parse(self, text: str, where: str) -> Any:
        """The value of `text`; `where` names the place it came from, for the message.

        Raises:
            OptionError: the text is not allowed.
        """
        try:
            return self.kind.parse(text)
        except ValueError:
            shown = self.kind.shown(text)
            raise OptionError(f"{where}: {shown} is not allowed: {self.kind.allowed}") from None


def _option(kind: OptionType, group: str, help_text: str, default: str | None = None) -> Any:
    """Declare one option as a dataclass field. `default` is text, as a user would write it."""
    if kind.repeatable:
        value: Any = ()
    else:
        value = None if default is None else kind.parse(default)
    shown = default if default is not None else ""
    return field(
        default=value, metadata={"kind": kind, "group": group, "help": help_text, "text": shown}
    )


@dataclass(frozen=True, kw_only=True)
class MountOptions:
    """The settings of one mount. Sizes are bytes, times are seconds, rates are bytes a second."""

    preset: str | None = _option(
        Choice(tuple(PRESETS)),
        "Preset",
        "Defaults for a purpose, overridden by options that are given: "
        + "; ".join(
            f"{name}: {', '.join(f'{key}={value}' for key, value in texts.items())}"
            for name, texts in PRESETS.items()
        )
        + ".",
    )
    endpoint_url: str | None = _option(
        Url(), "Source", "S3 endpoint other than AWS (MinIO, Ceph, R2, a gateway)."
    )
    region: str | None = _option(
        Text("a region name, such as eu-west-1"),
        "Source",
        "Region of the bucket. Without it, lazyfs asks S3.",
    )
    profile: str | None = _option(
        Text("a profile name"), "Source", "Profile of the shared AWS configuration files."
    )
    addressing_style: str = _option(
        Choice(("auto", "path", "virtual")),
        "Source",
        "Where requests name the bucket: in the path or in the host name. auto: in the path with "
        "--endpoint-url, in the host name for AWS.",
        "auto",
    )
    no_sign_request: bool = _option(
        Flag(), "Source", "Send requests without credentials (public buckets).", "false"
    )
    requester_pays: bool = _option(
        Flag(), "Source", "Agree to be charged for requests to a requester-pays bucket.", "false"
    )
    ca_bundle: Path | None = _option(
        LocalPath(), "Source", "PEM file with the certificate authority of a private endpoint."
    )
    refuse_local: bool = _option(
        Flag(),
        "Source",
        "Do not connect to addresses of this machine, including loopback and link-local ones, and "
        "do not quote answers that are not from S3. For endpoints that the administrator did not "
        "choose. With a proxy, the proxy decides.",
        "false",
    )
    io_timeout: float = _option(
        Duration(1, 86400),
        "Source",
        "How long a read waits while S3 gives no usable answer before it fails with EIO. EIO kills "
        "a process that maps the file, so choose minutes rather than seconds.",
        "10m",
    )
    include: tuple[str, ...] = _option(
        Glob(),
        "Files",
        "Show only files that match one of these patterns (path or name). A pattern also selects "
        "which weights are prefetched where a model has several formats.",
    )
    exclude: tuple[str, ...] = _option(
        Glob(), "Files", "Hide files that match one of these patterns (path or name)."
    )
    allow_other: bool = _option(
        Flag(), "Files", "Let users other than the mounting one read the mount.", "false"
    )
    uid: int | None = _option(
        Count(0, 2**32 - 2), "Files", "Owner of all files. Default: the mounting user."
    )
    gid: int | None = _option(
        Count(0, 2**32 - 2), "Files", "Group of all files. Default: the mounting user's."
    )
    file_mode: int = _option(Mode(), "Files", "Permission bits of files.", "444")
    dir_mode: int = _option(Mode(), "Files", "Permission bits of directories.", "555")
    cache_dir: tuple[Path, ...] | Literal["none"] | None = _option(
        LocalPaths(words=("none",)),
        "Cache",
        "Directory of the block cache on local disk, shared by all mounts that name it. Separate "
        "several directories, one for each disk, by colons. none: no disk cache. Default: "
        "/var/cache/lazyfs for root, ~/.cache/lazyfs for others.",
    )
    cache_size: int | float = _option(
        Share(64 * MIB),
        "Cache",
        "Maximum size of each cache directory, as a size or as a share of the space that is free "
        "or already used by the cache. The least recently used blocks are removed first.",
        "80%",
    )
    cache_reserve: int | float = _option(
        Share(0),
        "Cache",
        "Free space that the cache always leaves on its filesystem, as a size or as a share of "
        "the filesystem.",
        "5%",
    )
    access_check: float = _option(
        Duration(0, 86400),
        "Cache",
        "How long a successful read from S3 lets this mount use cached blocks of an object. Before "
        "the first read, and again after that time, lazyfs requests one byte from S3, because "
        "other mounts may have filled the cache. 0s: no check.",
        "10m",
    )
    fleet_cache: str | None = _option(
        PlainServer(),
        "Cache",
        "Cache of the fleet (docs/SCALE.md), http://HOST:PORT or unix:/PATH. It is asked for "
        "blocks before S3, with S3's Host header and signature. What it cannot deliver comes from "
        "S3. off: S3 only.",
        "off",
    )
    block_size: int = _option(
        Size(256 * KIB, 64 * MIB, power_of_two=True),
        "Reading",
        "Size of the blocks that are fetched and cached.",
        "8MiB",
    )
    memory_limit: int = _option(
        Size(64 * MIB, 1 << 40, words=("auto",)),
        "Reading",
        "Maximum memory for blocks, requests in flight included. At least 4 blocks, and 2 more for "
        "each further cache directory. auto: 128 MiB for each processor, at most 2.5 % of the "
        "memory or 16 GiB, at least 256 MiB.",
        "auto",
    )
    prefetch: str = _option(
        Choice(POLICIES),
        "Prefetch",
        "What is fetched before it is read. model: the whole model in loading order. tensor: each "
        "tensor that is read, whole, and a little of what follows; for processes that read only "
        "part of a model. sequential: the file being read, twice as far as it has been read. "
        "headers: small files and the headers of shards. off: only the blocks that a read touches.",
        "model",
    )
    prefetch_on: str = _option(
        Choice(("mount", "open")),
        "Prefetch",
        "When prefetching of a model starts: at mount, or when one of its files is opened. With "
        "several models below the prefix, each one starts when one of its small files is opened or "
        "its weights are read.",
        "mount",
    )
    tensors: str | None = _option(
        Pattern(),
        "Prefetch",
        "Prefetch only tensors whose name matches this regular expression (RE2, anywhere in the "
        "name). Other tensors are fetched when they are read. For safetensors.",
    )
    page_cache: int | str = _option(
        Size(1 * MIB, 1 << 44, words=("auto", "off")),
        "Reading",
        "Maximum size of the data put into the kernel's page cache before it is read. auto: a "
        "whole model if it takes at most 80 % of the memory that the machine and the cgroup leave "
        "free, otherwise half of the unread pages that the kernel keeps: 0.1 GiB of 1, 0.7 of 24.",
        "auto",
    )
    read_ahead: int = _option(
        Size(0, 64 * MIB),
        "Reading",
        "The kernel's read-ahead for the mount. Needs root; otherwise the kernel's default stays.",
        "1MiB",
    )
    max_concurrency: int = _option(
        Count(1, 1024, words=("auto",)),
        "Reading",
        "Maximum number of ranged GETs in flight. The actual number adapts to the throughput. "
        "auto: as many as blocks fit into `--memory-limit`, from 64 to 1024.",
        "auto",
    )
    movers: int = _option(
        Count(0, 128, words=("auto",)),
        "Reading",
        "Maximum number of processes that move bytes during a load: receiving, decrypting, "
        "checksums, disk and page cache. auto: one for every two processors, at most 96, and none "
        "with fewer than 4 processors. They start with a load and end 30 seconds after it.",
        "auto",
    )
    bandwidth_limit: int | str = _option(
        Size(64 * KIB, 1 << 40, words=("off",)),
        "Reading",
        "Maximum rate of reads from S3 in bytes a second, for shared links.",
        "off",
    )
    metrics_address: tuple[str, int] | None = _option(
        Address(),
        "Observing",
        "Address that serves the mount's metrics to Prometheus (http://HOST:PORT/metrics).",
    )
    log_level: str = _option(
        Choice(("debug", "info", "warning", "error")),
        "Observing",
        "Lowest severity to log.",
        "info",
    )
    log_format: str = _option(
        Choice(("text", "json")),
        "Observing",
        "text: lines for people. json: one JSON object per line.",
        "text",
    )
    log_file: Path | None = _option(
        LocalPath(),
        "Observing",
        "Log file of a background daemon. Default: below /var/log/lazyfs for root, "
        "~/.local/state/lazyfs for others.",
    )

    def __post_init__(self) -> None:
        """Choose what is `auto`, and check options against each other. Raises OptionError."""
        least_bytes = self.least_blocks * self.block_size
        chosen: dict[str, Callable[[], int]] = {
            "memory_limit": lambda: max(auto_memory(self.block_size), least_bytes),
            "max_concurrency": lambda: auto_requests(self.memory_limit, self.block_size),
            "movers": auto_movers,
        }
        for name, choose in chosen.items():
            if getattr(self, name) == "auto":
                object.__setattr__(self, name, choose())
        if self.memory_limit < least_bytes:
            raise OptionError(
                f"--memory-limit: {format_size(self.memory_limit)} is not allowed with "
                f"--block-size {format_size(self.block_size)}: at least {self.least_blocks} "
                f"blocks, {format_size(least_bytes)}"
            )

    @property
    def least_blocks(self) -> int:
        """How many blocks there must be memory for.

        One for a push, one for demand, and two for each cache directory: if its disk hangs, one may
        be written and one loaded.
        """
        return 2 + 2 * (len(self.cache_dir) if isinstance(self.cache_dir, tuple) else 1)

    def wants(self, path: str) -> bool:
        """Whether a file is to be shown, by `include` and `exclude`; its path in the mount."""
        return (not self.include or matches(path, self.include)) and not matches(path, self.exclude)

    def brings(self, what: str) -> bool:
        """Whether prefetching brings `headers`, or the `model`, before any file is opened."""
        policies = PLANNED if what == "headers" else ("model",)
        return self.prefetch in policies and self.prefetch_on == "mount"

    @classmethod
    def parse(cls, *layers: tuple[str, Mapping[str, str | Iterable[str]]]) -> MountOptions:
        """Options from layers of texts, an earlier layer over a later one.

        Args:
            layers: a pattern that names the place of an option in messages (`--{name}`), and the
                texts by option name (`block-size`; `block_size` and `blockSize` mean the same).

        Raises:
            OptionError: an unknown name, or a value that is not allowed.
        """
        values: dict[str, Any] = {}
        for pattern, texts in reversed((*layers, ("--preset: {name}", _preset_layer(layers)))):
            for name, text in texts.items():
                option = find_option(name)
                if option is None:
                    raise _unknown(pattern, name)
                where = pattern.format(
                    name=option.name, environment=option.environment, attribute=option.camel_case
                )
                if option.kind.repeatable:
                    many = [text] if isinstance(text, str) else list(text)
                    values[option.attribute] = tuple(option.parse(one, where) for one in many)
                elif isinstance(text, str):
                    values[option.attribute] = option.parse(text, where)
                else:
                    raise OptionError(f"{where}: given several times; it takes one value")
        return cls(**values)


OPTIONS: tuple[Option, ...] = tuple(
    Option(
        name=item.name.replace("_", "-"),
        kind=item.metadata["kind"],
        group=item.metadata["group"],
        default_text=item.metadata["text"],
        help=item.metadata["help"],
    )
    for item in dataclasses.fields(MountOptions)
)
_BY_NAME = {
    spelling: option
    for option in OPTIONS
    for spelling in (option.name, option.attribute, option.camel_case)
}


def _unknown(pattern: str, name: str) -> OptionError:
    place = pattern.format(name=name, environment=name, attribute=name)
    import difflib  # for who misspells

    near = difflib.get_close_matches(name, _BY_NAME, 1)
    hint = f"did you mean {near[0]}?" if near else "see docs/OPTIONS.md for all"
    return OptionError(f"{place}: no such option; {hint}")


def _preset_layer(layers: Iterable[tuple[str, Mapping[str, Any]]]) -> Mapping[str, str]:
    """The texts of the preset that the layers name; none if it is not one, which is said later."""
    chosen = next((texts["preset"] for _, texts in layers if "preset" in texts), "")
    return PRESETS.get(chosen, {})


def find_option(name: str) -> Option | None:
    """The option of that name, in any of its spellings, or None."""
    return _BY_NAME.get(name)
