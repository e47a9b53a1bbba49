"""Attaches volumes to paths, detaches them, and repairs them.

A pod's path (target) is a read-only bind mount of the daemon's own mountpoint. The staging path
stays an empty directory: kubelet does not unstage a volume while the filesystem that is mounted at
its staging path is mounted anywhere else (`GetDeviceMountRefs`, pkg/volume/util/operationexecutor).
The daemon's mountpoint is such a place, as are the paths of other pods that share the daemon.
Staging passes the node-stage secret and starts the daemon that needs it; unstaging ends it.

A path is recorded before it is mounted and removed from the record after it is unmounted, so that
every step can be repeated, and another plugin can continue after one that was killed midway.
"""

from __future__ import annotations

import logging
import queue
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from grpc import StatusCode

from csi import mounts
from csi.daemon import Daemon, Wanted
from csi.daemon_users import DaemonUsers
from csi.daemons import Daemons
from csi.errors import RpcError
from csi.namespace_limits import NamespaceLimits, VolumeLimit
from csi.node_records import Kind, NodeRecords, Place, VolumeRecord
from csi.snapshots import FALL_BACK_AFTER_S, LOOK_S, Look, doubt
from csi.start import StillStartingError
from csi.volume_attributes import Volume
from csi.volume_locks import VolumeLocks
from lazyfs.errors import LazyfsError
from lazyfs.faults import start_watching
from lazyfs.handover.keeper import KeeperError
from lazyfs.store.credentials import Credentials

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Attachment:
    """A volume at a path, as an RPC asks for it.

    Attributes:
        place: the record to make, without a daemon; repeated calls have the same `asked`.
        volume: the parsed volume.
        credentials: newer ones replace those that the daemon has.
        owner: the owner of the credentials.
        via: the daemon of the staged volume, if that has the credentials: the volume gets it, or
            one that differs only in its snapshot.
    """

    volume_id: str
    path: Path
    place: Place
    volume: Volume
    credentials: Credentials | None
    owner: str = ""
    via: Daemon | None = None

    @property
    def wanted(self) -> Wanted:
        """What a daemon must serve."""
        given = Wanted(self.volume.source, self.volume.options, self.credentials, self.owner)
        return replace(self.via.serving if self.via else given, namespace=self.place.namespace)


class Attachments:
    """The volumes of this node and their paths.

    Callers hold the volume's lock, `locks`.

    Args:
        state: the records on disk.
        directory: for the daemons' own mountpoints.
        keeper: the keeper's socket.
        limits: the limits of each namespace.
    """

    def __init__(
        self,
        state: NodeRecords,
        directory: Path,
        keeper: Path,
        limits: NamespaceLimits | None = None,
    ) -> None:
        limits = limits or NamespaceLimits()
        self._volume_limit = VolumeLimit(limits.volumes)
        self.locks = VolumeLocks()
        self._state = state
        self._to_repair: queue.SimpleQueue[Daemon] = queue.SimpleQueue()
        self.daemons = Daemons(state, directory, keeper, self._to_repair.put, limits.daemons)
        self.users = DaemonUsers(state, self.daemons)

    def recover(self) -> None:
        """Resume what a former plugin left. Called once, before any other call."""
        users: dict[str, list[str]] = {}
        for record in self._state.volumes():
            for path, place in record.places.items():
                if place.daemon is not None:
                    users.setdefault(place.daemon, []).append(path)
        self.daemons.recover(users)
        for record in self._state.volumes():
            for place in record.places.values():
                if place.namespace and (daemon := self.daemons.get(place.daemon or "")):
                    daemon.namespace = place.namespace
        start_watching("repairing mounts", self._repair_forever)
        self.users.watch()

    def place(self, volume_id: str, path: Path) -> Place | None:
        """The volume's place at a path."""
        return self._state.volume(volume_id).places.get(str(path))

    def note(self, volume_id: str, path: Path, asked: str) -> None:
        """Record that a volume is staged at a path, without a daemon: a pod starts that later.

        Raises:
            RpcError: the path is taken.
        """
        self._check_free(volume_id, path, "staging", asked)
        if self.place(volume_id, path) is None:
            self._save(volume_id, path, Place("staging", None, asked))

    def put(self, wanted: Attachment, timeout_s: float) -> Daemon:
        """Serve a volume at a path; repair an existing attachment.

        Returns:
            The daemon that serves it.

        Raises:
            RpcError: the path is used by another volume, or by this one with other attributes.
            StillStartingError: the daemon is not ready yet; the place is kept for the next call.
            LazyfsError, KeeperError: it cannot be mounted. Then nothing has changed.
        """
        until = time.monotonic() + timeout_s
        self._check_free(wanted.volume_id, wanted.path, wanted.place.kind, wanted.place.asked)
        present = self.place(wanted.volume_id, wanted.path)
        daemon = self.daemons.get(present.daemon) if present and present.daemon else None
        if daemon is None:
            return self._attach(wanted, present, until, timeout_s)
        return self._renew(wanted, daemon, until)

    def _attach(
        self, wanted: Attachment, present: Place | None, until: float, timeout_s: float
    ) -> Daemon:
        """Serve a volume at a path where no daemon serves it yet. Raises like `put`."""
        volume_id, path, place = wanted.volume_id, wanted.path, wanted.place
        with ExitStack() as counted:  # until the volume is recorded
            if present is None:
                counted.enter_context(
                    self._volume_limit.one_more(place.namespace, volume_id, self._state.volumes)
                )
            daemon = self._daemon_for(wanted, timeout_s)
            until = max(until, time.monotonic() + timeout_s - LOOK_S)
            try:
                self._save(volume_id, path, replace(place, daemon=daemon.name))
                counted.close()
                daemon, device = self._ensure(volume_id, path, daemon, wanted.credentials, until)
                if place.is_mounted:
                    mounts.bind(daemon.mountpoint, path, device)
            except StillStartingError:
                raise  # kubelet calls again, or takes the volume away
            except BaseException:
                self._roll_back(volume_id, path, present, place.kind)
                raise
        log.info("volume %s is at %s, served at %s", volume_id, path, daemon.mountpoint)
        return daemon

    def _renew(self, wanted: Attachment, daemon: Daemon, until: float) -> Daemon:
        """Repair an attachment, with the credentials of this call. Raises like `put`."""
        volume_id, path, credentials = wanted.volume_id, wanted.path, wanted.credentials
        if credentials is not None and not daemon.needs_credentials:
            raise RpcError(
                StatusCode.ALREADY_EXISTS,
                f"{path}: volume {volume_id} is there already, without credentials of its own",
            )
        if not daemon.owner and daemon.spec.credentials and self._has_others(daemon, volume_id):
            # A node-stage secret of unknown owner: other volumes keep their credentials.
            credentials = None
        # A pod may be using the place: then a failure of this call leaves it alone.
        is_in_use = daemon.was_ready
        try:
            daemon, device = self._ensure(volume_id, path, daemon, credentials, until)
            self._mount_again(volume_id, path, daemon, device)
            self._note_pod(volume_id, path, wanted.place)
        except StillStartingError:
            raise
        except BaseException:
            if not is_in_use:
                self._roll_back(volume_id, path, None, wanted.place.kind)
            raise
        if not is_in_use:
            log.info("volume %s is at %s, served at %s", volume_id, path, daemon.mountpoint)
        return daemon

    def _daemon_for(self, wanted: Attachment, timeout_s: float) -> Daemon:
        """A daemon for a new attachment, which uses it from now on. Raises like `put`."""
        via, user = wanted.via, str(wanted.path)
        if via is not None and via.has_lost_credentials and self.daemons.use(via, user):
            return via  # the condition tells users to delete its pods
        look = Look.within(wanted.volume.snapshot_max_age_s, timeout_s)
        daemon = self.daemons.reserve(wanted.wanted, user, wanted.volume_id, look)
        if not daemon.namespace:  # staged for a claim whose namespace is unknown
            daemon.namespace = wanted.place.namespace
        return daemon

    def restage(self, volume_id: str, path: Path, daemon: Daemon) -> None:
        """Let a staging path hold the daemon of a newer snapshot, which the next pod shares.

        Then the former daemon ends with its last pod, and not when the volume is unstaged.
        """
        place = self.place(volume_id, path)
        if place is None or place.daemon in (None, daemon.name):
            return
        assert place.daemon is not None
        if not self.daemons.use(daemon, str(path)):
            return
        self._save(volume_id, path, replace(place, daemon=daemon.name))
        try:
            self.daemons.release(place.daemon, str(path))
        except LazyfsError as error:
            log.error("%s: the daemon of an old snapshot does not end: %s", path, error)

    def take_away(self, volume_id: str, path: Path, kind: Kind) -> None:
        """Unmount a volume from a path, in whatever state it is; does nothing if it is not there.

        A target's directory is removed as well; the staging directory is kubelet's.

        Raises:
            RpcError: another volume is at that path.
            MountError: it cannot be unmounted, or the directory is not empty.
        """
        self._check_free(volume_id, path, kind)
        place = self.place(volume_id, path)
        mounts.unbind(path)
        if kind == "target":
            mounts.remove_directory(path)
        if place is None:
            return
        if place.daemon is not None:
            self.daemons.release(place.daemon, str(path))
        self._save(volume_id, path, None)

    def _ensure(
        self,
        volume_id: str,
        path: Path,
        daemon: Daemon,
        credentials: Credentials | None,
        until: float,
    ) -> tuple[Daemon, str]:
        """Ensure that a daemon runs: this one, or one of an older snapshot if it cannot be mounted.

        Returns:
            The running daemon, and the device of its filesystem.

        Raises:
            LazyfsError, KeeperError: like `Daemons.ensure`.
        """
        left_s = until - time.monotonic()
        older = None if daemon.was_ready else self.daemons.newest_mount(daemon)
        if older is not None:
            left_s = min(left_s, FALL_BACK_AFTER_S)
        try:
            return daemon, self.daemons.ensure(daemon, credentials, left_s)
        except (LazyfsError, KeeperError) as error:
            is_young = daemon.starting_for_s < FALL_BACK_AFTER_S
            if isinstance(error, StillStartingError) and is_young:
                raise
            place = self.place(volume_id, path)
            if older is None or place is None or not self.daemons.use(older, str(path)):
                raise
            doubt(older, f"a new snapshot cannot be mounted: {error}")
        self._save(volume_id, path, replace(place, daemon=older.name))
        self.daemons.release(daemon.name, str(path))
        return older, self.daemons.ensure(older, credentials, until - time.monotonic())

    def _has_others(self, daemon: Daemon, volume_id: str) -> bool:
        """Whether a daemon also serves other volumes."""
        return any(
            place.daemon == daemon.name
            for record in self._state.volumes()
            if record.volume_id != volume_id
            for place in record.places.values()
        )

    def _roll_back(self, volume_id: str, path: Path, before: Place | None, kind: Kind) -> None:
        """Undo a failed attempt. Errors are only logged: the caller reports the attempt's own."""
        try:
            place = self.place(volume_id, path)
            mounts.unbind(path)
            if kind == "target":
                with suppress(LazyfsError):  # other files are in it
                    mounts.remove_directory(path)
            if place is not None and place.daemon is not None:
                self.daemons.release(place.daemon, str(path))
            self._save(volume_id, path, before)
        except LazyfsError as error:
            log.error("%s: a failed attempt cannot be undone: %s", path, error)

    def _check_free(self, volume_id: str, path: Path, kind: Kind, asked: str | None = None) -> None:
        """Raises RpcError if a path is used by another volume, or by this one in another way."""
        for record in self._state.volumes():
            place = record.places.get(str(path))
            if place is None:
                continue
            if record.volume_id != volume_id or place.kind != kind:
                raise RpcError(
                    StatusCode.FAILED_PRECONDITION,
                    f"{path}: is the {place.kind} path of volume {record.volume_id}",
                )
            if asked is not None and place.asked != asked:
                raise RpcError(
                    StatusCode.ALREADY_EXISTS,
                    f"{path}: volume {volume_id} is there already, with other attributes",
                )

    def _save(self, volume_id: str, path: Path, place: Place | None) -> None:
        places = dict(self._state.volume(volume_id).places)
        before = places.pop(str(path), None)
        if place is not None:
            places[str(path)] = place
        self._state.save_volume(VolumeRecord(volume_id, places))
        for each in (before, place):
            daemon = self.daemons.get(each.daemon) if each and each.daemon else None
            if daemon is not None:
                self.users.changed(daemon)

    def _note_pod(self, volume_id: str, path: Path, wanted: Place) -> None:
        """Record the pod of a path, if a plugin that did not know it attached the volume."""
        place = self.place(volume_id, path)
        if place is not None and (place.namespace, place.pod) != (wanted.namespace, wanted.pod):
            whose = replace(place, namespace=wanted.namespace, pod=wanted.pod)
            self._save(volume_id, path, whose)

    def _repair_forever(self) -> None:
        while True:
            daemon = self._to_repair.get()
            for record in self._state.volumes():
                with self.locks.held(record.volume_id, wait=True):
                    self._repair(record.volume_id, daemon)

    def _repair(self, volume_id: str, daemon: Daemon) -> None:
        """Mount a daemon's new filesystem where its old one was."""
        for path, place in self._state.volume(volume_id).places.items():
            device = daemon.device
            if place.daemon != daemon.name or device is None:
                continue
            try:
                self._mount_again(volume_id, Path(path), daemon, device)
            except LazyfsError as error:
                log.error("%s: cannot be mounted again: %s", path, error)

    def _mount_again(self, volume_id: str, path: Path, daemon: Daemon, device: str) -> None:
        """Ensure that a target has the mount of its daemon; record it if it had a dead one."""
        place = self.place(volume_id, path)
        if place is None or not place.is_mounted or mounts.shows(path, device):
            return
        lost = mounts.is_mountpoint(path)
        mounts.bind(daemon.mountpoint, path, device)
        if lost:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self._save(volume_id, path, replace(place, renewed=now))
            log.warning("%s: mounted again; files that were open there fail", path)
