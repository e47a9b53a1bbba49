"""Where the texts of options come from: layers, of which an earlier one takes precedence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lazyfs.errors import OptionError
from lazyfs.options.mount_options import OPTIONS, find_option

# What a configuration file may say besides options: what is mounted, and where.
PLACES = ("source", "mountpoint")


def merged(*layers: Mapping[str, str | Iterable[str]]) -> dict[str, str | list[str]]:
    """One layer of several that are valid, an earlier one over a later one."""
    texts: dict[str, str | list[str]] = {}
    for layer in reversed(layers):
        for name, text in layer.items():
            option = find_option(name)
            assert option is not None
            texts[option.name] = text if isinstance(text, str) else list(text)
    return texts


def environment_layer(environment: Mapping[str, str]) -> dict[str, str | Iterable[str]]:
    """Option texts from variables such as `LAZYFS_BLOCK_SIZE`; patterns are split at commas."""
    layer: dict[str, str | Iterable[str]] = {}
    for option in OPTIONS:
        if (text := environment.get(option.environment)) is not None:
            layer[option.name] = text.split(",") if option.kind.repeatable else text
    return layer


def config_layer(path: Path) -> dict[str, str | Iterable[str]]:
    """Option texts from a TOML file of `block-size = "8MiB"` lines.

    Raises:
        OptionError: the file cannot be read, or is not such a file.
    """
    layer: dict[str, str | Iterable[str]] = {}
    for name, value in _config(path).items():
        if name in PLACES:
            continue  # `config_places` has them
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            layer[name] = value
        elif isinstance(value, bool):
            layer[name] = str(value).lower()
        elif isinstance(value, str | int):
            layer[name] = str(value)
        else:
            raise OptionError(f"{path}: {name}: must be a text, a number, true, false or a list")
    return layer


def config_places(path: Path) -> dict[str, str]:
    """The `source` and the `mountpoint` that a TOML file names, if it does.

    Raises:
        OptionError: the file cannot be read, is not such a file, or one of them is not a text.
    """
    table = _config(path)
    places = {name: table[name] for name in PLACES if name in table}
    for name, value in places.items():
        if not isinstance(value, str) or not value:
            raise OptionError(f"{path}: {name}: must be a text")
    return places


def _config(path: Path) -> dict[str, Any]:
    import tomllib  # few have such a file

    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise OptionError(f"--config: {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"--config: {path} is not valid TOML: {error}") from None
