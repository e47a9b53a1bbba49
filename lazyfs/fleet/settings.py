"""The settings of a fleet's cache: one TOML file, the same on all nodes. Pure."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lazyfs.errors import OptionError
from lazyfs.options.option_types import Count, Duration, Share

_HOST = r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:.]+\]"
_ORIGIN = re.compile(rf"(https?)://(\*\.)?({_HOST})(:\d{{1,5}})?")
_NAMED = re.compile(rf"({_HOST})(:\d{{1,5}})?")


@dataclass(frozen=True, slots=True)
class Origin:
    """A store whose objects the cache may keep.

    Attributes:
        host: the `Host` of requests; with `is_suffix`, the part after the bucket and a dot.
        url: the URL of the store, `https://HOST[:PORT]`; with `is_suffix` only its scheme matters.
    """

    host: str
    url: str
    is_suffix: bool = False

    @property
    def scheme(self) -> str:
        return self.url.partition(":")[0]

    @classmethod
    def parse(cls, text: str) -> Origin:
        """Parse `URL`, `https://*.HOST` or `HOST=URL`. Raises ValueError."""
        named, equals, url = text.rpartition("=")
        found = _ORIGIN.fullmatch(url)
        if not found or (equals and (found[2] or not _NAMED.fullmatch(named))):
            raise ValueError(text)
        host = url.partition("//")[2]
        if urlsplit(url).port in (None, {"http": 80, "https": 443}[found[1]]):
            host = found[3]  # as clients send it
        if found[2]:
            return cls(host.removeprefix("*."), url, is_suffix=True)
        return cls(named or host, url)


@dataclass(frozen=True, kw_only=True)
class FleetSettings:
    """The administrator's settings. Sizes are bytes or shares of the filesystem, times seconds.

    Attributes:
        origins: the stores that the cache may use; it refuses requests for all others.
        door: the address for mounts: `HOST:PORT`, or `unix:/PATH`.
        address: this node's address, at which other nodes reach its shelf.
        shelf_port: the port of the shelves on all nodes.
        members_file: a file with the addresses of all nodes, one in each line.
        members_dns: a DNS name with the addresses of all nodes.
        group_size: the most nodes that share one ring (`groups.py`).
        cache_dir: the directory of the shelf's content.
        cache_size: the maximum size of that content.
        cache_reserve: the space that it leaves free on its filesystem.
        run_dir: for the configuration, sockets and verdicts of S3: in memory, for this user alone.
        verdict_time: how long an answer of S3 about a reader and an object is valid.
        ca_bundle: the certificate authorities for S3.
        tls_dir: a directory with `tls.crt`, `tls.key` and `ca.crt`, with which doors and shelves
            authenticate each other; None: they communicate unencrypted.
        tls_name: the name in the certificates of all nodes.
        resolvers: the DNS servers; empty: those of /etc/resolv.conf.
        workers: the number of nginx processes.
        user: the user of these processes, if root starts them.
    """

    origins: tuple[Origin, ...]
    door: str = "127.0.0.1:8780"
    address: str = ""
    shelf_port: int = 8781
    members_file: Path | None = None
    members_dns: str | None = None
    group_size: int = 32
    cache_dir: Path = Path("/var/cache/lazyfs-fleet")
    cache_size: int | float = 0.5
    cache_reserve: int | float = 0.2
    run_dir: Path = Path("/run/lazyfs-fleet")
    verdict_time: float = 180.0
    ca_bundle: Path = Path("/etc/ssl/certs/ca-certificates.crt")
    tls_dir: Path | None = None
    tls_name: str = "lazyfs-fleet"
    resolvers: tuple[str, ...] = ()
    workers: int = 4
    user: str = "www-data"

    @classmethod
    def load(cls, path: Path, address: str | None = None) -> FleetSettings:
        """Read a file.

        Args:
            address: this node's address, instead of the file's.

        Raises:
            OptionError: it cannot be read, or something in it is not allowed.
        """
        try:
            table = tomllib.loads(path.read_text())
        except OSError as error:
            raise OptionError(f"{path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise OptionError(f"{path} is not valid TOML: {error}") from None
        if address:
            table["address"] = address
        return cls.of(table, str(path))

    @classmethod
    def of(cls, table: Mapping[str, Any], where: str) -> FleetSettings:
        """Make settings from the content of a file. Raises OptionError; `where` names the file."""
        values = {}
        for name, value in table.items():
            parse = _PARSERS.get(name)
            if parse is None:
                known = ", ".join(_PARSERS)
                raise OptionError(f"{where}: {name}: no such setting; there are {known}")
            try:
                values[name.replace("-", "_")] = parse(value)
            except (ValueError, TypeError):
                needed = _ALLOWED.get(name, "a text")
                raise OptionError(f"{where}: {name}: {value!r} is not allowed: {needed}") from None
        for name in ("origins", "address"):
            if not values.get(name):
                raise OptionError(f"{where}: {name} is missing: {_ALLOWED[name]}")
        if (values.get("members_file") is None) == (values.get("members_dns") is None):
            raise OptionError(f"{where}: give either members-file or members-dns")
        return cls(**values)


def _text(value: Any) -> str:
    # The text becomes part of a configuration, so it may contain nothing that ends a word there.
    if not isinstance(value, str) or not re.fullmatch(r"[\w./:@%+\[\]-]+", value, re.ASCII):
        raise ValueError(value)
    return value


def _path(value: Any) -> Path:
    path = Path(_text(value))
    if not path.is_absolute():
        raise ValueError(value)
    return path


def _address(value: Any) -> str:
    return str(ipaddress.ip_address(_text(value)))


def _door(value: Any) -> str:
    if _text(value).startswith("unix:/"):
        return str(value)
    host, colon, port = value.rpartition(":")
    if not colon or not 0 < int(port) < 65536:
        raise ValueError(value)
    return f"{_bracketed(host)}:{port}"


def _bracketed(host: str) -> str:
    address = ipaddress.ip_address(host.strip("[]"))
    return f"[{address}]" if address.version == 6 else str(address)


def _each(parse: Callable[[str], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def parse_all(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValueError(value)
        return tuple(parse(each) for each in value)

    return parse_all


def _as_text(parse: Callable[[str], Any]) -> Callable[[Any], Any]:
    return lambda value: parse(str(value))


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "origins": _each(Origin.parse),
    "door": _door,
    "address": _address,
    "shelf-port": _as_text(Count(1, 65535).parse),
    "members-file": _path,
    "members-dns": _text,
    "group-size": _as_text(Count(1, 1024).parse),
    "cache-dir": _path,
    "cache-size": _as_text(Share(64 << 20).parse),
    "cache-reserve": _as_text(Share(0).parse),
    "run-dir": _path,
    "verdict-time": _as_text(Duration(1, 600).parse),
    "ca-bundle": _path,
    "tls-dir": _path,
    "tls-name": _text,
    "resolvers": _each(_bracketed),
    "workers": _as_text(Count(1, 64).parse),
    "user": _text,
}
assert {name.replace("-", "_") for name in _PARSERS} == {
    each.name for each in dataclasses.fields(FleetSettings)
}
_ALLOWED = {
    "origins": 'a list of stores: "https://HOST[:PORT]", "https://*.HOST" for buckets in the host '
    'name, or "HOST[:PORT]=URL" if the Host of requests differs from the URL',
    "door": "an IP address and a port, such as 127.0.0.1:8780, or unix:/PATH",
    "address": "the IP address by which other nodes reach this one",
    "shelf-port": Count(1, 65535).allowed,
    "group-size": Count(1, 1024).allowed,
    "cache-size": Share(64 << 20).allowed,
    "cache-reserve": Share(0).allowed,
    "verdict-time": Duration(1, 600).allowed,
    "resolvers": "a list of IP addresses",
    "workers": Count(1, 64).allowed,
    **dict.fromkeys(
        ("members-file", "cache-dir", "run-dir", "ca-bundle", "tls-dir"),
        "an absolute path of letters, digits and . _ - +",
    ),
}
