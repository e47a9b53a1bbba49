"""The checksum that S3 keeps of a whole object, computed from its bytes as they arrive. Pure.

S3 lists its checksums if a HEAD requests them (`x-amz-checksum-mode: ENABLED`). The checksum of an
object that was uploaded in parts may be COMPOSITE, a checksum of the parts' checksums, which cannot
be compared without knowing the parts; such checksums end in `-N`
(https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html).
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from crc32c import crc32c

from lazyfs.errors import OptionError

if TYPE_CHECKING:
    from typing_extensions import Buffer


class _Sum(Protocol):
    def update(self, data: Buffer, /) -> None: ...

    def digest(self) -> bytes: ...


class _Crc:
    """A checksum that is a number: the function continues from the previous number."""

    def __init__(self, function: Callable[[bytes, int], int], length: int) -> None:
        self._function = function
        self._length = length
        self._value = 0

    def update(self, data: Buffer, /) -> None:
        self._value = self._function(data, self._value)  # type: ignore[arg-type]

    def digest(self) -> bytes:
        return self._value.to_bytes(self._length, "big")


def check_available() -> None:
    """Check that every checksum can be computed, before anything is fetched for a comparison.

    S3 keeps CRC-64/NVME of objects that were uploaded without another checksum.

    Raises:
        OptionError: the package that computes it is not installed.
    """
    if find_spec("awscrt") is None:
        raise OptionError(
            "--verify: the package awscrt, which computes S3's checksums, is not installed: "
            "pip install 'lazyfs[verify]'"
        )


def _crc64nvme(data: bytes, value: int) -> int:
    from awscrt import checksums  # from the extra `verify`; megabytes that a mount never needs

    return int(checksums.crc64nvme(data, value))


# By the name in a HEAD's answer, such as `x-amz-checksum-crc64nvme`; the cheapest first.
_KINDS: dict[str, Callable[[], _Sum]] = {
    "CRC32C": lambda: _Crc(crc32c, 4),
    "CRC64NVME": lambda: _Crc(_crc64nvme, 8),
    "CRC32": lambda: _Crc(zlib.crc32, 4),
    "SHA1": lambda: hashlib.sha1(usedforsecurity=False),
    "SHA256": hashlib.sha256,
}


class ObjectSum:
    """Computes one object's checksum and compares it.

    Args:
        kind: the algorithm, such as `CRC32C`.
        expected: S3's checksum in Base64.
    """

    def __init__(self, kind: str, expected: str) -> None:
        self.kind = kind
        self._expected = expected
        self._sum = _KINDS[kind]()

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> ObjectSum | None:
        """From the headers of a HEAD (names in lower case); None if no checksum can be compared."""
        if headers.get("x-amz-checksum-type") == "COMPOSITE":
            return None
        for kind in _KINDS:
            expected = headers.get(f"x-amz-checksum-{kind.lower()}")
            if expected and "-" not in expected:
                return cls(kind, expected)
        return None

    def update(self, data: Buffer) -> None:
        """Add the next bytes of the object."""
        self._sum.update(data)

    @property
    def matches(self) -> bool:
        """Whether the bytes so far have S3's checksum."""
        return base64.b64encode(self._sum.digest()).decode() == self._expected
