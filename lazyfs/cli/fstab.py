"""`mount.lazyfs`: the mount helper for `mount -t lazyfs` and /etc/fstab.

mount(8) calls it as `mount.lazyfs SOURCE MOUNTPOINT [-sfnv] [-N namespace] [-o options] [-t type]`
(section EXTERNAL HELPERS). Options of lazyfs mean the same as on its command line
(`-o block-size=16MiB`). Options that mount(8) and systemd handle themselves, or that any read-only
mount fulfils, are ignored.
"""

from __future__ import annotations

import sys

from lazyfs.cli import main as lazyfs
from lazyfs.options.mount_options import find_option

# mount(8), FILESYSTEM-INDEPENDENT MOUNT OPTIONS; systemd.mount(5) for x-systemd.*.
_IGNORED = frozenset(
    (
        "_netdev",
        "async",
        "atime",
        "auto",
        "defaults",
        "dev",
        "diratime",
        "exec",
        "group",
        "noatime",
        "noauto",
        "nodev",
        "nodiratime",
        "noexec",
        "nofail",
        "nosuid",
        "noswap",
        "nouser",
        "owner",
        "relatime",
        "norelatime",
        "ro",
        "rw",
        "strictatime",
        "suid",
        "sync",
        "user",
        "users",
    )
)
USAGE = "usage: mount.lazyfs s3://BUCKET[/PREFIX] MOUNTPOINT [-o OPTION[=VALUE],...]"


def main(argv: list[str] | None = None) -> None:
    """Translate the arguments to those of `lazyfs mount`, and run it."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = translate(argv)
    if arguments is not None:
        lazyfs(arguments)


def translate(argv: list[str]) -> list[str] | None:
    """Translate the arguments of a mount helper to those of `lazyfs`; None for a dry run (-f)."""
    positional: list[str] = []
    options: list[str] = []
    pretend = False
    rest = iter(argv)
    for argument in rest:
        if argument in ("-o", "-t", "-N"):
            value = next(rest, "")
            options += value.split(",") if argument == "-o" else []
        elif argument.startswith("-") and len(argument) > 1:
            pretend = pretend or "f" in argument
        else:
            positional.append(argument)
    if len(positional) != 2:
        sys.exit(USAGE)
    translated = [argument for text in options if text for argument in _translate_option(text)]
    return None if pretend else ["mount", *positional, *translated]


def _translate_option(text: str) -> list[str]:
    name, equals, value = text.partition("=")
    if name in _IGNORED or name.startswith(("x-", "X-", "comment")):
        return []
    option = find_option(name)
    if option is not None:
        name = option.name
        if option.is_flag:
            return [f"--{name}" if option.parse(value, f"-o {name}") else f"--{option.negation}"]
    return [f"--{name}={value}" if equals else f"--{name}"]
