"""The controller's records, one for each volume that it made.

A lazyfs volume is only a name for data in S3, which lazyfs cannot write. But CreateVolume must
answer equal requests alike and refuse a different one of the same name, after a restart and from
any replica; and volumes can be listed. So CreateVolume writes a record before it answers, and
DeleteVolume removes it. In a cluster a record is a ConfigMap in the driver's namespace, elsewhere a
file. Both are created only if the name is free, by the API server and by link(2), so that of two
replicas at the same time one makes the volume and the other finds it.

Only the controller reads records: mounts continue and volumes can be deleted without them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from grpc import StatusCode

from csi.errors import RpcError
from csi.kubernetes import ApiServer
from lazyfs.errors import OptionError

LABEL = "app.kubernetes.io/managed-by"
CONTENT = "volume.json"
_ID = re.compile(r"[A-Za-z0-9.-]{0,64}-([0-9a-f]{20})")


def id_of(name: str) -> str:
    """The id of the volume that CreateVolume makes for a name: readable, and one for each name."""
    readable = re.sub(r"[^A-Za-z0-9.-]", "-", name)[:64]
    return f"{readable}-{hashlib.blake2b(name.encode(), digest_size=10).hexdigest()}"


def digest_of(volume_id: str) -> str | None:
    """The unique part of an id of `id_of`; None if it is not such an id."""
    found = _ID.fullmatch(volume_id)
    return found[1] if found else None


@dataclass(frozen=True, slots=True)
class ProvisionedVolume:
    """A volume that was made.

    Attributes:
        name: the name in CreateVolume's request.
        volume_id: follows from the name.
        capacity_bytes: the capacity in the answer.
        parameters: the request's, without those that Kubernetes adds.
        attributes: the volume context in the answer.
    """

    name: str
    volume_id: str
    capacity_bytes: int
    parameters: Mapping[str, str]
    attributes: Mapping[str, str]

    def to_text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_text(cls, text: str) -> ProvisionedVolume:
        """Parse the output of `to_text`, of this version or another."""
        fields = json.loads(text)
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__})


class Records(Protocol):
    """A store of records; safe for several threads and replicas."""

    def find(self, volume_id: str) -> ProvisionedVolume | None:
        """The record of a volume, if there is one."""

    def add(self, record: ProvisionedVolume) -> bool:
        """Store a record; False if the volume has one already."""

    def remove(self, volume_id: str) -> None:
        """Remove the record of a volume, if there is one."""

    def all(self) -> Iterator[ProvisionedVolume]:
        """All records, in any order."""


class DirectoryRecords:
    """Records as files of a directory.

    Args:
        directory: created if it does not exist.

    Raises:
        OptionError: it cannot be used.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise OptionError(f"--state-dir: {directory}: {error.strerror}") from error

    def find(self, volume_id: str) -> ProvisionedVolume | None:
        path = self._path(volume_id)
        if path is None:
            return None
        with _as_rpc_error(path), contextlib.suppress(FileNotFoundError):
            return ProvisionedVolume.from_text(path.read_text())
        return None

    def add(self, record: ProvisionedVolume) -> bool:
        path = self._path(record.volume_id)
        assert path is not None
        with (
            _as_rpc_error(path),
            tempfile.NamedTemporaryFile("w", dir=self._directory) as file,
        ):
            file.write(record.to_text())
            file.flush()
            os.fsync(file.fileno())
            try:
                os.link(file.name, path)
            except FileExistsError:
                return False
            self._sync()
        return True

    def remove(self, volume_id: str) -> None:
        path = self._path(volume_id)
        if path is not None:
            with _as_rpc_error(path):
                path.unlink(missing_ok=True)
                self._sync()

    def all(self) -> Iterator[ProvisionedVolume]:
        for path in self._directory.glob("*.json"):
            with _as_rpc_error(path), contextlib.suppress(FileNotFoundError):  # just removed
                yield ProvisionedVolume.from_text(path.read_text())

    def _path(self, volume_id: str) -> Path | None:
        digest = digest_of(volume_id)
        return self._directory / f"{digest}.json" if digest else None

    def _sync(self) -> None:
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class ConfigMapRecords:
    """Records as ConfigMaps of the driver's namespace.

    Args:
        server: the API server.
        driver_name: used in a label, so that two drivers can share a namespace.
    """

    def __init__(self, server: ApiServer, driver_name: str) -> None:
        self._server = server
        self._driver_name = driver_name

    def find(self, volume_id: str) -> ProvisionedVolume | None:
        path = self._path(volume_id)
        found = path and self._server.get(path)
        return ProvisionedVolume.from_text(found["data"][CONTENT]) if found else None

    def add(self, record: ProvisionedVolume) -> bool:
        return self._server.create(
            self._server.config_map_path(),
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {
                    "name": _config_map_name(digest_of(record.volume_id)),
                    "labels": {LABEL: self._driver_name},
                },
                "immutable": True,
                "data": {CONTENT: record.to_text()},
            },
        )

    def remove(self, volume_id: str) -> None:
        if path := self._path(volume_id):
            self._server.delete(path)

    def all(self) -> Iterator[ProvisionedVolume]:
        path = self._server.config_map_path()
        for each in self._server.list(path, f"{LABEL}={self._driver_name}"):
            yield ProvisionedVolume.from_text(each["data"][CONTENT])

    def _path(self, volume_id: str) -> str | None:
        digest = digest_of(volume_id)
        return self._server.config_map_path(_config_map_name(digest)) if digest else None


@contextlib.contextmanager
def _as_rpc_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RpcError(StatusCode.INTERNAL, f"{path}: {error.strerror}") from error


def _config_map_name(digest: str | None) -> str:
    return f"lazyfs-volume-{digest}"
