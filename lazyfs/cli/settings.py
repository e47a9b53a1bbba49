"""Adds the mount options to a command, and collects their values."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from lazyfs.options.layers import config_layer, environment_layer, merged
from lazyfs.options.mount_options import OPTIONS, MountOptions, Option

Command = Callable[..., None]


def with_mount_options(command: Command) -> Command:
    """Add all mount options and `--config` to a command, which passes them to `settings`."""
    for option in reversed(OPTIONS):
        command = _click_option(option)(command)
    return click.option(
        "--config",
        type=click.Path(path_type=Path),
        help='TOML file with lines such as block-size = "8MiB".',
    )(command)


def with_cache_options(command: Command) -> Command:
    """Add the options of the cache to a command."""
    for option in reversed(OPTIONS):
        if option.group == "Cache":
            command = _click_option(option)(command)
    return command


def settings(
    config: Path | None, given: Mapping[str, Any]
) -> tuple[MountOptions, dict[str, str | list[str]]]:
    """Collect the options from the command line, the environment and the file, in this order.

    Args:
        config: the file; without it, `$LAZYFS_CONFIG` may name one.
        given: values of the command line by option name, from click.

    Returns:
        The options, and their texts, which can be passed to another process.

    Raises:
        OptionError: a name or a value is not allowed.
    """
    config = config_file(config)
    layers = (
        ("--{name}", _given_layer(given)),
        ("{environment}", environment_layer(os.environ)),
        (f"{config}: {{name}}", config_layer(config) if config else {}),
    )
    return MountOptions.parse(*layers), merged(*(texts for _, texts in layers))


def config_file(given: Path | None) -> Path | None:
    """The configuration file: as given, or as `$LAZYFS_CONFIG` names it."""
    return given or (Path(path) if (path := os.environ.get("LAZYFS_CONFIG")) else None)


def _click_option(option: Option) -> Callable[[Command], Command]:
    default = f" [default: {option.default_text}]" if option.default_text else ""
    text = f"{option.help}{default}"
    if option.is_flag:
        return click.option(f"--{option.name}/--{option.negation}", default=None, help=text)
    return click.option(
        f"--{option.name}", multiple=option.kind.repeatable, help=text, metavar=option.metavar
    )


def _given_layer(given: Mapping[str, Any]) -> dict[str, str | tuple[str, ...]]:
    """Values of the command line as texts by option name."""
    return {
        name.replace("_", "-"): str(value).lower() if isinstance(value, bool) else value
        for name, value in given.items()
        if value is not None and value != ()
    }
