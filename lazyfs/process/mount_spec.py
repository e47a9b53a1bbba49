"""What a worker is told: what to mount where, how, and with which credentials.

It travels as JSON in a memory file that is handed on as a descriptor, so that nothing of it stands
in an argument, in the environment or on a disk. Only the standard library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from lazyfs.memory_file import memory_file, read_whole
from lazyfs.store.credentials import Credentials, credentials_from


@dataclass(frozen=True, slots=True)
class MountSpec:
    """One mount.

    Attributes:
        source: `s3://bucket/prefix`.
        mountpoint: an absolute path.
        options: texts by option name (`lazyfs/options/mount_options.py`).
        credentials: given for this mount; None: botocore finds them.
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
