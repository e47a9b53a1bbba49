"""The instructions of a worker: what to mount where, how, and with which credentials.

They are passed as JSON in a memory file, as a descriptor, so that nothing of them is in arguments,
in the environment or on a disk. Uses only the standard library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from lazyfs.memory_file import memory_file, read_whole
from lazyfs.process.privileges import Rights
from lazyfs.store.credentials import Credentials, credentials_from


@dataclass(frozen=True, slots=True)
class MountSpec:
    """One mount.

    Attributes:
        source: `s3://bucket/prefix`.
        mountpoint: an absolute path.
        options: text by option name (`lazyfs/options/mount_options.py`).
        credentials: given for this mount; None: botocore finds them.
        volume: ids of the Kubernetes volumes that are served, separated by commas, for the log.
        rights: what a worker of root needs (`process/worker_files.py`).
    """

    source: str
    mountpoint: str
    options: Mapping[str, str | list[str]] = field(default_factory=dict)
    credentials: Credentials | None = None
    volume: str = ""
    rights: str = Rights.USER.value

    def to_descriptor(self) -> int:
        """A memory file that contains it. A worker gets it, and cannot change it."""
        return memory_file("lazyfs-spec", json.dumps(asdict(self)).encode(), final=True)

    @classmethod
    def from_descriptor(cls, descriptor: int) -> MountSpec:
        """Parse the output of `to_descriptor`, of this version or another."""
        fields = json.loads(read_whole(descriptor))
        credentials = fields["credentials"]
        return cls(
            fields["source"],
            fields["mountpoint"],
            fields["options"],
            None if credentials is None else credentials_from(credentials),
            fields.get("volume", ""),
            fields.get("rights", Rights.USER.value),
        )
