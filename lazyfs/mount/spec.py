"""What a worker is told: what to mount where, how, and with which credentials.

It travels as JSON in a memory file that is handed on as a descriptor, so that nothing of it stands
in an argument, in the environment or on a disk. Only the standard library.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class StaticCredentials:
    """Keys as they are. A session token belongs to temporary ones."""

    access_key_id: str = field(repr=False)
    secret_access_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class WebIdentity:
    """A token that STS exchanges for temporary keys of a role (AssumeRoleWithWebIdentity)."""

    role_arn: str
    session_name: str
    token: str = field(repr=False)


Credentials = StaticCredentials | WebIdentity
_FORMS: tuple[type[StaticCredentials] | type[WebIdentity], ...] = (StaticCredentials, WebIdentity)


def credentials_from(fields: Mapping[str, Any]) -> Credentials:
    """Credentials of their fields, as `asdict` gives them.

    Raises:
        ValueError: the fields are not those of any form; no value is named in the message.
    """
    for form in _FORMS:
        try:
            credentials = form(**fields)
        except TypeError:
            continue
        if all(isinstance(value, str | None) for value in asdict(credentials).values()):
            return credentials
    raise ValueError(f"not credentials: {', '.join(sorted(fields))}")


@dataclass(frozen=True, slots=True)
class MountSpec:
    """One mount.

    Attributes:
        source: `s3://bucket/prefix`.
        mountpoint: an absolute path.
        options: texts by option name (`lazyfs/options.py`).
        credentials: given for this mount; None: boto3 finds them.
        volume: ids of the volumes of a cluster that are served, with commas, for the log.
    """

    source: str
    mountpoint: str
    options: Mapping[str, str | list[str]] = field(default_factory=dict)
    credentials: Credentials | None = None
    volume: str = ""

    def to_descriptor(self) -> int:
        """A memory file that holds it."""
        return memory_file("lazyfs-spec", json.dumps(asdict(self)).encode())

    @classmethod
    def from_descriptor(cls, descriptor: int) -> MountSpec:
        """What `to_descriptor` made, by this version or another."""
        fields = json.loads(read_whole(descriptor))
        credentials = fields["credentials"]
        return cls(
            fields["source"],
            fields["mountpoint"],
            fields["options"],
            None if credentials is None else credentials_from(credentials),
            fields.get("volume", ""),
        )


def memory_file(name: str, content: bytes) -> int:
    """A descriptor of an unnamed file in memory (memfd_create(2))."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    return descriptor


def read_whole(descriptor: int) -> bytes:
    """All bytes of a file; its position, which other holders share, stays."""
    size = os.fstat(descriptor).st_size
    content = bytearray()
    while part := os.pread(descriptor, size - len(content), len(content)):
        content += part
    return bytes(content)
