"""Parses the URL of a source, `SCHEME://BUCKET/PREFIX`. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lazyfs.errors import OptionError
from lazyfs.store import s3_names

# How URLs are divided into bucket and prefix, by scheme; `stores.py` has the stores.
_DIVIDE: dict[str, Callable[[str, str], tuple[str, str]]] = {"s3": s3_names.divide}


@dataclass(frozen=True, slots=True)
class SourceUrl:
    """A bucket and a prefix.

    Attributes:
        bucket: its name, or what stands for it.
        prefix: empty, or ends in `/`.
    """

    bucket: str
    prefix: str
    scheme: str = "s3"

    @classmethod
    def parse(cls, text: str) -> SourceUrl:
        """Parse a URL. Raises OptionError if it is not valid, or if its bucket is not supported."""
        scheme, separator, rest = text.partition("://")
        if not separator or scheme not in _DIVIDE:
            known = " or ".join(f"{each}://BUCKET or {each}://BUCKET/PREFIX" for each in _DIVIDE)
            raise OptionError(f"{text!r} is not a source: write {known}")
        bucket, prefix = _DIVIDE[scheme](text, rest)
        prefix = prefix.removesuffix("/")
        if prefix and not all(part not in ("", ".", "..") for part in prefix.split("/")):
            raise OptionError(
                f"{text!r} is not a source: the prefix has an empty, '.' or '..' part"
            )
        return cls(bucket, f"{prefix}/" if prefix else "", scheme)

    def name(self, key: str) -> str:
        """The name of an object of the bucket, for messages."""
        return object_name(self.bucket, key, self.scheme)

    def __str__(self) -> str:
        return self.name(self.prefix).removesuffix("/")


def object_name(bucket: str, key: str, scheme: str = "s3") -> str:
    """The name of an object, for messages."""
    return f"{scheme}://{bucket}/{key}"


def is_url(text: str) -> bool:
    """Whether a text names a source and not a path on this machine."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme in _DIVIDE
