"""Writes `docs/OPTIONS.md`, the reference of all options, from `lazyfs/options/mount_options.py`.

Run by `make docs`; a test compares the file with what this prints (`--print`).
"""

from __future__ import annotations

import sys
from pathlib import Path

from lazyfs.options.mount_options import OPTIONS, Option

HEAD = """\
# Options

Made from `lazyfs/options/mount_options.py` by `make docs`; do not edit.

An option can be set in four places. Earlier ones take precedence:

1. the command line: `--block-size 16MiB`, or `mount -t lazyfs -o block-size=16MiB`;
2. the environment: `LAZYFS_BLOCK_SIZE=16MiB`;
3. a TOML file named by `--config` or `LAZYFS_CONFIG`: `block-size = "16MiB"`; `lazyfs mount`
   also takes `source` and `mountpoint` from it;
4. the options of a `--preset`.

Sizes are written as `8MiB` (`KiB`, `MiB`, `GiB`, `TiB`; `K`, `M`, `G`, `T` mean the same; `MB` is
10^6), times as `500ms`, `30s`, `10m`, `1h`. Patterns are shell patterns. Repeat the option to give
several on the command line; separate them by commas in the environment.
"""


def reference() -> str:
    """The whole page."""
    sections = [HEAD]
    for group in dict.fromkeys(option.group for option in OPTIONS):
        rows = "".join(row(option) for option in OPTIONS if option.group == group)
        head = "| option | default | allowed | what it does |\n|---|---|---|---|\n"
        sections.append(f"\n## {group}\n\n{head}{rows}")
    return "".join(sections)


def row(option: Option) -> str:
    """One line of a table."""
    default = f"`{option.default_text}`" if option.default_text else ""
    allowed = option.kind.allowed.replace("|", "\\|")
    text = option.help.replace("|", "\\|")
    return f"| `--{option.name}` | {default} | {allowed} | {text} |\n"


if __name__ == "__main__":
    if "--print" in sys.argv:
        print(reference(), end="")
    else:
        Path(__file__).with_name("OPTIONS.md").write_text(reference())
