"""The types of options: how the text of a value is parsed, and which values are allowed."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import re2

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


class OptionType(ABC):
    """Parses and checks the text of an option."""

    repeatable: ClassVar[bool] = False
    metavar: ClassVar[str] = "TEXT"

    @property
    @abstractmethod
    def allowed(self) -> str:
        """The allowed values, to complete the sentence "... is not allowed: "."""

    @abstractmethod
    def parse(self, text: str) -> Any:
        """The value. Raises ValueError if the text is not allowed."""

    def shown(self, text: str) -> str:
        """A text in the form in which a message may show it, without secrets."""
        return repr(text)


_UNITS = {
    "": 1,
    "B": 1,
    "K": KIB,
    "KIB": KIB,
    "KB": 10**3,
    "M": MIB,
    "MIB": MIB,
    "MB": 10**6,
    "G": GIB,
    "GIB": GIB,
    "GB": 10**9,
    "T": 1 << 40,
    "TIB": 1 << 40,
    "TB": 10**12,
}
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_size(text: str) -> int:
    """Parse a size such as `8MiB`, `1.5G` or `4096`, to bytes. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not found or found[2].upper() not in _UNITS:
        raise ValueError(text)
    return int(float(found[1]) * _UNITS[found[2].upper()])


def format_size(size_bytes: float) -> str:
    """Format a size in the largest binary unit that leaves at least 1: `8MiB`, `1.5GiB`."""
    for unit, scale in (("TiB", 1 << 40), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.4g}{unit}"
    return f"{size_bytes:.0f}B"


def format_duration(seconds: float) -> str:
    """Format a duration: `80ms`, `4.2s`, `3m12s`, `5h03m`, `2d4h`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 60:
        return f"{seconds:.1f}s" if seconds < 9.95 else f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours < 24 else f"{hours // 24}d{hours % 24}h"


@dataclass(frozen=True)
class Size(OptionType):
    """A number of bytes. `words` are allowed values that are not sizes, such as `auto`."""

    metavar = "SIZE"

    minimum: int
    maximum: int
    power_of_two: bool = False
    words: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        words = "".join(f"{word}, or " for word in self.words)
        top = format_size(self.maximum)
        power = ", a power of two" if self.power_of_two else ""
        return f"{words}a size from {format_size(self.minimum)} to {top}{power}"

    def parse(self, text: str) -> int | str:
        if text.lower() in self.words:
            return text.lower()
        size = parse_size(text)
        if not self.minimum <= size <= self.maximum or (self.power_of_two and size & (size - 1)):
            raise ValueError(text)
        return size


@dataclass(frozen=True)
class Share(OptionType):
    """A number of bytes, or a percentage of a whole."""

    metavar = "SIZE|%"

    minimum: int

    @property
    def allowed(self) -> str:
        return f"a size of at least {format_size(self.minimum)}, or a share from 1% to 100%"

    def parse(self, text: str) -> int | float:
        """Bytes as int, or a share between 0 and 1 as float."""
        if found := re.fullmatch(r"(\d+(?:\.\d+)?)%", text.strip()):
            share = float(found[1]) / 100
            if not 0.01 <= share <= 1:
                raise ValueError(text)
            return share
        size = parse_size(text)
        if size < self.minimum:
            raise ValueError(text)
        return size


@dataclass(frozen=True)
class Duration(OptionType):
    """A duration in seconds, written with a unit: `500ms`, `30s`, `10m`."""

    metavar = "TIME"

    minimum: float
    maximum: float

    @property
    def allowed(self) -> str:
        return f"a time from {self.minimum:g}s to {self.maximum:g}s, such as 30s or 10m"

    def parse(self, text: str) -> float:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", text.strip())
        if not found:
            raise ValueError(text)
        seconds = float(found[1]) * _SECONDS[found[2]]
        if not self.minimum <= seconds <= self.maximum:
            raise ValueError(text)
        return seconds


@dataclass(frozen=True)
class Count(OptionType):
    """A whole number. `words` are allowed values that are no numbers, such as `auto`."""

    metavar = "N"

    minimum: int
    maximum: int
    words: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        words = "".join(f"{word}, or " for word in self.words)
        return f"{words}a whole number from {self.minimum} to {self.maximum}"

    def parse(self, text: str) -> int | str:
        if text.lower() in self.words:
            return text.lower()
        number = int(text)
        if not self.minimum <= number <= self.maximum:
            raise ValueError(text)
        return number


class Mode(OptionType):
    """Permission bits, in octal. Write bits are rejected because the mount is read-only."""

    metavar = "MODE"

    @property
    def allowed(self) -> str:
        return "an octal mode without write bits, such as 444 or 0555"

    def parse(self, text: str) -> int:
        mode = int(text, 8)
        if not 0 <= mode <= 0o777 or mode & 0o222:
            raise ValueError(text)
        return mode


@dataclass(frozen=True)
class Choice(OptionType):
    """One of several words."""

    words: tuple[str, ...]

    @property
    def allowed(self) -> str:
        return ", ".join(self.words[:-1]) + " or " + self.words[-1]

    def parse(self, text: str) -> str:
        if text not in self.words:
            raise ValueError(text)
        return text


class Flag(OptionType):
    """On or off. On the command line it takes no value."""

    @property
    def allowed(self) -> str:
        return "true or false"

    def parse(self, text: str) -> bool:
        value = {"": True, "true": True, "1": True, "yes": True, "on": True}
        value |= {"false": False, "0": False, "no": False, "off": False}
        try:
            return value[text.lower()]
        except KeyError:
            raise ValueError(text) from None


class Pattern(OptionType):
    """A regular expression in the syntax of RE2, which matches in linear time."""

    metavar = "REGEX"

    @property
    def allowed(self) -> str:
        return "a regular expression in RE2 syntax, which has no look-around or back-references"

    def parse(self, text: str) -> str:
        if not text or not text.isprintable():
            raise ValueError(text)
        compile_pattern(text)
        return text


def compile_pattern(text: str) -> re2.Pattern[str]:
    """Compile a regular expression of RE2. Raises ValueError."""
    import re2  # few mounts need it

    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(text, options)
    except re2.error:
        raise ValueError(text) from None


@dataclass(frozen=True)
class Text(OptionType):
    """Any non-empty text without control characters. `what` describes it."""

    what: str

    @property
    def allowed(self) -> str:
        return self.what

    def parse(self, text: str) -> str:
        if not text or not text.isprintable():
            raise ValueError(text)
        return text


class Url(OptionType):
    """An http or https URL of an S3 endpoint, without user or password."""

    metavar = "URL"

    @property
    def allowed(self) -> str:
        return "an http:// or https:// URL without user and password"

    def parse(self, text: str) -> str:
        parts = urlsplit(text)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ValueError(text)
        _ = parts.port  # raises ValueError if it is not a number
        return text.rstrip("/")

    def shown(self, text: str) -> str:
        return repr(re.sub(r"//.*@", "//***@", text))


class PlainServer(Url):
    """`http://HOST:PORT`, `unix:/PATH` or `off`."""

    metavar = "URL|off"

    @property
    def allowed(self) -> str:
        return "off, http://HOST:PORT, or unix:/PATH"

    def parse(self, text: str) -> str | None:  # type: ignore[override]
        """The URL; None: off."""
        if text == "off":
            return None
        if text.startswith("unix:/") and text.isprintable() and len(text) < 100:
            return text
        url = super().parse(text)
        if not re.fullmatch(r"http://[^/?#]+:\d+", url):
            raise ValueError(text)
        return url


class Address(OptionType):
    """An address to listen on: a host, or none for all addresses, and a port."""

    metavar = "HOST:PORT"

    @property
    def allowed(self) -> str:
        return "HOST:PORT, such as 127.0.0.1:9464, or :9464 for all addresses"

    def parse(self, text: str) -> tuple[str, int]:
        host, colon, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if not colon or not port.isdecimal() or int(port) > 65535 or (":" in host) != bracketed:
            raise ValueError(text)
        return host.strip("[]"), int(port)


@dataclass(frozen=True)
class LocalPath(OptionType):
    """A local path, made absolute. `words` are allowed values that are not paths."""

    metavar = "PATH"

    words: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        return " or ".join((*self.words, "a path"))

    def parse(self, text: str) -> Path | str:
        if text in self.words:
            return text
        if not text or "\0" in text:
            raise ValueError(text)
        return Path(text).expanduser().absolute()


@dataclass(frozen=True)
class LocalPaths(OptionType):
    """Local paths joined by colons. `words` are allowed values that are not paths."""

    metavar = "PATH[:PATH...]"

    words: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        return " or ".join((*self.words, "paths joined by colons"))

    def parse(self, text: str) -> tuple[Path, ...] | str:
        """The paths, absolute, or one of the words."""
        if text in self.words:
            return text
        paths = [LocalPath().parse(part) for part in text.split(":")]
        if len(set(paths)) < len(paths):
            raise ValueError(text)
        return tuple(Path(path) for path in paths)


class Glob(OptionType):
    """A shell pattern. The option may be given several times."""

    metavar = "GLOB"

    repeatable = True

    @property
    def allowed(self) -> str:
        return "a shell pattern, such as '*.safetensors' or 'original/*'"

    def parse(self, text: str) -> str:
        if not text:
            raise ValueError(text)
        return text


def matches(path: str, globs: Iterable[str]) -> bool:
    """Whether one of the patterns matches a path or its last component."""
    name = path.rpartition("/")[2]
    return any(fnmatchcase(path, glob) or fnmatchcase(name, glob) for glob in globs)
