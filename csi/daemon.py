"""One daemon and its users."""

from __future__ import annotations

import re
import secrets
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grpc import StatusCode

from csi.errors import RpcError
from csi.start import Start
from lazyfs.errors import LazyfsError, MountError, SourceError
from lazyfs.process.mount_spec import MountSpec
from lazyfs.process.supervisor import Supervisor
from lazyfs.store.credentials import Credentials, StaticCredentials, WebIdentity

# Time for another call to start the daemon or to end it, with its last writes.
LOCK_TIMEOUT_S = 120.0
# Characters of a source in the name of its daemon.
LONGEST_READABLE = 48


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a daemon must serve for a volume to use it.

    Attributes:
        source: `s3://bucket/prefix`.
        options: texts by option name.
        credentials: those given for the volume.
        owner: the owner of the credentials (`owner_of`); empty: a node-stage secret, or none.
        namespace: the pod's; empty: there is no pod, or its namespace is unknown.
    """

    source: str
    options: Mapping[str, str | list[str]]
    credentials: Credentials | None
    owner: str
    namespace: str = ""


class Daemon:
    """One daemon and its users.

    Attributes:
        name: the daemon's own name.
        mountpoint: where it mounts.
        spec: what it serves; has no credentials if the keeper has lost them.
        needs_credentials: it was started with given credentials.
        owner: the owner of its credentials (`owner_of`); empty: a node-stage secret, or none.
        namespace: that of the pod that it was started for; empty: unknown.
        users: the paths that are bind mounts of it.
        retired: its last user left, and it is ending.
        refusal: why the last attempt to start it failed.
        start: the present or last start.
        was_ready: its mount existed once, so a pod may use it.
    """

    def __init__(
        self,
        name: str,
        mountpoint: Path,
        spec: MountSpec,
        needs_credentials: bool,
        owner: str = "",
    ) -> None:
        self.name = name
        self.mountpoint = mountpoint
        self.spec = spec
        self.needs_credentials = needs_credentials
        self.owner = owner
        self.namespace = ""
        self.users: set[str] = set()
        self.retired = False
        self.refusal: str | None = None
        self.start: Start | None = None
        self.was_ready = False
        self._lock = threading.Lock()
        self._supervisor: Supervisor | None = None

    @property
    def supervisor(self) -> Supervisor | None:
        """The supervisor of its worker, as long as there is a mount."""
        supervisor = self._supervisor
        return None if supervisor is None or supervisor.ended else supervisor

    # Another thread may end the mount at any moment. So each of the following reads `supervisor`
    # only once.

    @property
    def device(self) -> str | None:
        """The device number of its filesystem; None if there is no mount."""
        supervisor = self.supervisor
        return supervisor.device if supervisor else None

    def report(self) -> tuple[dict[str, Any] | None, str | None]:
        """The status of its worker, if it answers, and what is wrong, in words, if anything is."""
        supervisor = self.supervisor
        if supervisor is None:
            return None, self._absence
        try:
            status = supervisor.status()
        except LazyfsError:
            return None, supervisor.trouble
        return status, status["trouble"]

    def status(self) -> dict[str, Any]:
        """The status of its worker. Raises LazyfsError if the worker does not answer."""
        supervisor = self.supervisor
        if supervisor is None:
            raise MountError(f"{self.spec.source}: {self._absence}")
        return supervisor.status()

    @property
    def _absence(self) -> str:
        return self.refusal or "its daemon is not running yet"

    @property
    def starting_for_s(self) -> float:
        """For how long it has been starting; 0 if it is not."""
        start = self.start
        return time.monotonic() - start.began_s if start else 0.0

    @property
    def has_lost_credentials(self) -> bool:
        """Whether the keeper has lost the credentials that it was started with."""
        return self.needs_credentials and self.spec.credentials is None

    @property
    def serving(self) -> Wanted:
        """What it serves."""
        return Wanted(self.spec.source, self.spec.options, self.spec.credentials, self.owner)

    @property
    def mounted_ns(self) -> int:
        """When it was mounted, in nanoseconds since the epoch: in the future if it is not mounted
        yet, and 0 if the time is unknown.
        """
        supervisor = self.supervisor
        if supervisor is None:
            return 0 if self.was_ready else sys.maxsize
        return supervisor.mounted_ns

    def serves(self, wanted: Wanted) -> bool:
        """Whether it can serve a volume.

        Two owners may have equal keys today and other keys tomorrow, so they share no daemon.
        """
        if wanted.credentials is not None and wanted.owner != self.owner:
            return False
        if self.has_lost_credentials:
            return False  # the owner is unknown
        ours, theirs = self.spec, wanted
        return (ours.source, dict(ours.options)) == (theirs.source, dict(theirs.options)) and (
            _same(ours.credentials, theirs.credentials)
        )

    @contextmanager
    def locked(self, timeout_s: float) -> Iterator[None]:
        """Hold the right to start it, end it or change its credentials.

        Raises:
            RpcError: another call holds the right for longer than the timeout.
        """
        if not self._lock.acquire(timeout=max(0.0, timeout_s)):
            raise RpcError(
                StatusCode.DEADLINE_EXCEEDED, f"{self.spec.source}: its daemon is being started"
            )
        try:
            yield
        finally:
            self._lock.release()

    def name_volumes(self, volume: str) -> None:
        """Set the volumes that its log names.

        Raises:
            LazyfsError, KeeperError: the present worker cannot be told. Later workers know.
        """
        with self.locked(LOCK_TIMEOUT_S):
            self.spec = replace(self.spec, volume=volume)
            supervisor = self.supervisor
            if supervisor is not None:
                supervisor.name_volumes(volume)

    def check_keys(self, credentials: Credentials) -> None:
        """Refuse keys that do not work: pods read with the former ones, which may still work.

        A token is not tried: kubelet makes it, and a newer one is valid for longer.

        Raises:
            SourceError: the keys do not work.
        """
        if not isinstance(credentials, StaticCredentials):
            return
        from csi.key_check import check_keys  # only needed when keys are rotated

        try:
            check_keys(self.spec, credentials)
        except SourceError as error:
            raise type(error)(
                f"the new keys are not used, and pods read with the former ones: {error}"
            ) from error

    def adopt(self, supervisor: Supervisor) -> None:
        """Record that it is mounted."""
        self._supervisor = supervisor
        self.refusal = None
        self.was_ready = True


def _same(ours: Credentials | None, theirs: Credentials | None) -> bool:
    """Whether credentials have the same identity: equal, or tokens of one service account."""
    if isinstance(ours, WebIdentity) and isinstance(theirs, WebIdentity):
        return (ours.role_arn, ours.session_name) == (theirs.role_arn, theirs.session_name)
    if isinstance(ours, StaticCredentials) and isinstance(theirs, StaticCredentials):
        return ours == theirs
    return ours is theirs is None


def name_of(source: str) -> str:
    """A new name for a daemon: unique, and meaningful in logs and in lists of mounts."""
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", source.partition("://")[2])
    return f"{readable[-LONGEST_READABLE:].strip('-.')}-{secrets.token_hex(4)}"
