"""The node plugin's records on disk: which volume is at which path, and which daemon serves it.

The records are JSON files below `--state-dir`, always replaced as a whole:

    volumes/DIGEST.json   a volume and its paths
    daemons/NAME.json     a daemon and what it serves, without credentials

A record is written before the action that it describes, and removed after that is undone. So the
records cover everything that a killed plugin leaves. Each file contains the id of the machine's
boot: mounts do not outlive a boot, so neither do records.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lazyfs.errors import MountError
from lazyfs.handover.keeper import private_directory
from lazyfs.known_fields import known_fields

log = logging.getLogger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
Kind = Literal["staging", "target"]


@dataclass(frozen=True, slots=True)
class Place:
    """A path where a volume is.

    Attributes:
        kind: the RPC that requested it: NodeStageVolume or NodePublishVolume.
        daemon: the name of the daemon that serves it; None: a volume that was staged without
            credentials, whose daemon starts with a pod.
        asked: a digest of the request.
        renewed: when it was mounted again after its mount was lost, as ISO 8601.
        namespace, pod: the names of a target's pod, if kubelet passes them.
    """

    kind: Kind
    daemon: str | None
    asked: str
    renewed: str | None = None
    namespace: str = ""
    pod: str = ""

    @property
    def is_mounted(self) -> bool:
        """Whether the volume is mounted at the path; at a staging path nothing ever is."""
        return self.kind == "target"


@dataclass(frozen=True, slots=True)
class VolumeRecord:
    """One volume of this node, and its places by path."""

    volume_id: str
    places: Mapping[str, Place] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DaemonRecord:
    """One daemon.

    Attributes:
        source: `s3://bucket/prefix`.
        options: texts by option name.
        needs_credentials: it was started with given credentials, which are not on disk.
        owner: the owner of these credentials.
    """

    name: str
    source: str
    options: Mapping[str, str | list[str]]
    needs_credentials: bool
    owner: str = ""


class NodeRecords:
    """The records in one directory.

    Raises:
        MountError: the directory cannot be used, or others can write to it.
    """

    def __init__(self, directory: Path) -> None:
        self._volumes = directory / "volumes"
        self._daemons = directory / "daemons"
        self._boot_id = _BOOT_ID.read_text().strip()
        try:
            for each in (directory, self._volumes, self._daemons):
                private_directory(each)
        except OSError as error:
            raise MountError(f"--state-dir: {error}") from error

    def volume(self, volume_id: str) -> VolumeRecord:
        """The record of a volume; without places if there is none."""
        fields = self._read(self._volume_path(volume_id))
        return _volume(fields) if fields else VolumeRecord(volume_id)

    def volumes(self) -> list[VolumeRecord]:
        """The records of all volumes."""
        return [_volume(fields) for fields in self._read_all(self._volumes)]

    def save_volume(self, record: VolumeRecord) -> None:
        """Write a record, or remove it if it has no places. Raises MountError."""
        path = self._volume_path(record.volume_id)
        if record.places:
            self._write(path, asdict(record))
        else:
            path.unlink(missing_ok=True)

    def daemons(self) -> list[DaemonRecord]:
        """The records of all daemons."""
        every = self._read_all(self._daemons)
        return [DaemonRecord(**known_fields(DaemonRecord, fields)) for fields in every]

    def save_daemon(self, record: DaemonRecord) -> None:
        """Write a record. Raises MountError."""
        self._write(self._daemons / f"{record.name}.json", asdict(record))

    def remove_daemon(self, name: str) -> None:
        """Remove the record of a daemon."""
        (self._daemons / f"{name}.json").unlink(missing_ok=True)

    def _volume_path(self, volume_id: str) -> Path:
        # An id may be longer than a file name and contain any character.
        digest = hashlib.blake2b(volume_id.encode(), digest_size=16).hexdigest()
        return self._volumes / f"{digest}.json"

    def _read_all(self, directory: Path) -> Iterator[dict[str, Any]]:
        for path in sorted(directory.glob("*.json")):
            fields = self._read(path)
            if fields is None:
                path.unlink(missing_ok=True)
            else:
                yield fields

    def _read(self, path: Path) -> dict[str, Any] | None:
        """The fields of a record of this boot; None if there is none."""
        try:
            fields: dict[str, Any] = json.loads(path.read_bytes())
            if fields.pop("boot_id") == self._boot_id:
                return fields
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, AttributeError) as error:
            # We replace files as a whole, so another program or a failing disk did this.
            log.error(
                "%s: is not a valid record (%s); its volume or daemon is cleaned up", path, error
            )
        return None

    def _write(self, path: Path, fields: dict[str, Any]) -> None:
        content = json.dumps({"boot_id": self._boot_id, **fields}, indent=1)
        try:
            # No fsync: after a power failure the boot is another one.
            new = path.with_suffix(".new")
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(content)
            new.replace(path)
        except OSError as error:
            raise MountError(f"{path}: cannot be written: {error.strerror}") from error


def _volume(fields: dict[str, Any]) -> VolumeRecord:
    places = {path: Place(**known_fields(Place, place)) for path, place in fields["places"].items()}
    return VolumeRecord(fields["volume_id"], places)
