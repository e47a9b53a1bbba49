"""The daemons of this node: starts, finds, shares, resumes and ends them.

Each daemon mounts at its own directory below `--state-dir`, and every path at which a volume is
published is a bind mount of that. So volumes of one source with the same options and credentials
share a daemon, and with it one download and one copy in the page cache. They may come and go in any
order; a daemon ends when its last user leaves. If the source has changed, there is one daemon for
each snapshot that pods use (`csi/snapshots.py`).

The keeper holds what a daemon needs to continue after this plugin, under the name of its
mountpoint: the session with the kernel, and the spec with the credentials, which are stored nowhere
else. The record on disk (`csi/node_records.py`) is used if the keeper has lost them.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from grpc import StatusCode

from csi import mounts
from csi.daemon import LOCK_TIMEOUT_S, Daemon, Wanted, name_of
from csi.errors import RpcError, without_ids
from csi.node_records import DaemonRecord, NodeRecords
from csi.snapshots import MOST_SNAPSHOTS, Look, doubt
from csi.start import PATIENCE_S, Start
from lazyfs.errors import LazyfsError, MountError
from lazyfs.faults import start_watching
from lazyfs.fuse import mount_syscalls
from lazyfs.handover.handover import SPEC
from lazyfs.handover.keeper import KeeperClient, KeeperError, connect
from lazyfs.options.mount_options import MountOptions
from lazyfs.patience import in_thread
from lazyfs.process.mount_records import DaemonWatch
from lazyfs.process.mount_spec import MountSpec
from lazyfs.process.supervisor import Supervisor
from lazyfs.process.worker_files import rights_of
from lazyfs.store.credentials import Credentials

log = logging.getLogger(__name__)

# How many daemons start at once when the plugin starts: each takes about a second of a processor.
RESUMED_AT_ONCE = 4
# The pause between attempts to start a daemon that is in use.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
# How soon a keeper that was replaced is noticed.
KEEPER_POLL_S = 2.0


class Daemons:
    """All daemons of the node.

    Args:
        state: the records on disk.
        directory: for the mountpoints of the daemons.
        keeper: the keeper's socket.
        on_mount: called from any thread when a daemon has mounted, or has mounted again.
        most_of_namespace: how many may be started for pods of one namespace; 0: no limit.
    """

    def __init__(
        self,
        state: NodeRecords,
        directory: Path,
        keeper: Path,
        on_mount: Callable[[Daemon], None],
        most_of_namespace: int = 0,
    ) -> None:
        self._most_of_namespace = most_of_namespace
        self._state = state
        self._directory = directory
        self._keeper = keeper
        self._on_mount = on_mount
        self._lock = threading.Lock()
        self._daemons: dict[str, Daemon] = {}
        self._closing = threading.Event()
        self._resuming = threading.BoundedSemaphore(RESUMED_AT_ONCE)
        directory.mkdir(mode=0o700, exist_ok=True)

    def recover(self, users: Mapping[str, Collection[str]]) -> None:
        """Resume the daemons of a former plugin of this boot; returns before all of them serve.

        Args:
            users: the users of each daemon, by its name.
        """
        for record in self._state.daemons():
            if record.name not in users:
                self._state.remove_daemon(record.name)
                continue
            mountpoint = self._directory / record.name
            spec = MountSpec(record.source, str(mountpoint), record.options)
            daemon = Daemon(record.name, mountpoint, spec, record.needs_credentials, record.owner)
            daemon.users.update(users[record.name])
            daemon.was_ready = mount_syscalls.find_mount(mountpoint) is not None
            self._daemons[record.name] = daemon
        known = set(self._daemons)
        for path in self._directory.iterdir():
            if path.name not in known:
                log.info("%s: left behind: cleaned up", path)
                self._clear(path)
        start_watching("watching the keeper", self._watch_keeper)
        for daemon in list(self._daemons.values()):
            start_watching(f"resuming {daemon.name}", partial(self._resume, daemon))

    def close(self) -> None:
        """End all workers and leave the mounts to the next plugin."""
        self._closing.set()
        with self._lock:
            each_one = [daemon.supervisor for daemon in self._daemons.values()]
        supervisors = [supervisor for supervisor in each_one if supervisor is not None]
        # All at once, because each needs time to finish its work.
        with ThreadPoolExecutor(max(1, len(supervisors))) as threads:
            list(threads.map(Supervisor.leave, supervisors))

    def check_keeper(self) -> None:
        """Raises KeeperError if the keeper does not answer."""
        with self._client() as keeper:
            keeper.names()

    def get(self, name: str) -> Daemon | None:
        """The daemon of that name."""
        with self._lock:
            return self._daemons.get(name)

    def reserve(self, wanted: Wanted, user: str, volume_id: str, look: Look) -> Daemon:
        """A daemon for a volume, used by `user` from now on; it may not run yet: see `ensure`.

        Args:
            look: tells whether a snapshot equals what S3 lists now.

        Raises:
            StillStartingError: S3 has not answered yet.
            RpcError: RESOURCE_EXHAUSTED: no other daemon may be started for the pod's namespace.
            LazyfsError, KeeperError: an existing daemon cannot be used, as for `ensure`.
        """
        old: set[Daemon] = set()
        while True:
            with self._lock:
                serving = self._serving(wanted)
                left = [each for each in serving if each not in old]
                refusal = self._refusal(wanted, len(serving))
                if not left and refusal is None:
                    daemon = self._new(wanted, volume_id)
                    daemon.users.add(user)
                    return daemon
            if not left:
                if not serving:
                    raise RpcError(StatusCode.RESOURCE_EXHAUSTED, str(refusal))
                doubt(serving[0], f"S3 lists other objects, but {refusal}")
                if self.use(serving[0], user):
                    return serving[0]
            elif not left[0].was_ready or self._is_current(
                left[0], wanted, look, is_newest=not old
            ):
                if self.use(left[0], user):
                    return left[0]
            else:
                old.add(left[0])

    def use(self, daemon: Daemon, user: str) -> bool:
        """Add a user to that daemon; False if it is ending."""
        with self._lock:
            if not daemon.retired:
                daemon.users.add(user)
            return not daemon.retired

    def newest_mount(self, daemon: Daemon) -> Daemon | None:
        """Another daemon that serves an older snapshot of what this one should serve."""
        with self._lock:
            serving = self._serving(daemon.serving)
            mounted = (each for each in serving if each.supervisor and each is not daemon)
            return next(mounted, None)

    def _serving(self, wanted: Wanted) -> list[Daemon]:
        """The daemons that can serve a volume, the newest first."""
        found = [
            each for each in self._daemons.values() if not each.retired and each.serves(wanted)
        ]
        return sorted(found, key=lambda each: each.mounted_ns, reverse=True)

    def _new(self, wanted: Wanted, volume_id: str) -> Daemon:
        name = name_of(wanted.source)
        mountpoint = self._directory / name
        spec = MountSpec(
            wanted.source, str(mountpoint), wanted.options, wanted.credentials, volume_id
        )
        given = wanted.credentials is not None
        daemon = Daemon(name, mountpoint, spec, given, wanted.owner if given else "")
        daemon.namespace = wanted.namespace
        self._daemons[name] = daemon
        return daemon

    def _refusal(self, wanted: Wanted, snapshots: int) -> str | None:
        """Why no other daemon may be started for a volume; None if one may be started."""
        if snapshots >= MOST_SNAPSHOTS:
            return f"this node serves {snapshots} snapshots of the source: delete the oldest pods"
        name = wanted.namespace
        many = sum(each.namespace == name for each in self._daemons.values())
        if name and 0 < self._most_of_namespace <= many:
            return (
                f"{many} daemons run on this node for pods of namespace {name}, which is the limit "
                "of the driver (--max-daemons-per-namespace); volumes with the same source, "
                "options and credentials share one"
            )
        return None

    def _is_current(self, daemon: Daemon, wanted: Wanted, look: Look, *, is_newest: bool) -> bool:
        """Whether a new pod gets the snapshot of a daemon.

        Args:
            is_newest: there is no newer one, so a pod gets this one if S3 gives no answer.
        """
        try:
            # The daemon asks S3 with the credentials of this pod.
            self.ensure(daemon, wanted.credentials, look.left_s)
            same, why = look.ask(daemon)
        except (LazyfsError, KeeperError):
            if daemon.retired or not is_newest:
                return False
            raise
        if same is None and is_newest:
            doubt(daemon, why)
            return True
        return same is True

    def ensure(self, daemon: Daemon, credentials: Credentials | None, timeout_s: float) -> str:
        """Ensure that a daemon runs, with these credentials if any are given; returns its device.

        Raises:
            StillStartingError: it is not ready yet; its start continues.
            SourceError: it runs, but cannot read with these credentials.
            LazyfsError: it cannot be started; the error is the daemon's.
            KeeperError: the keeper does not answer.
        """
        with daemon.locked(timeout_s):
            if daemon.retired:
                raise RpcError(StatusCode.ABORTED, f"{daemon.spec.source}: its daemon is ending")
            if daemon.supervisor is None:
                self._wait_for_start(daemon, credentials, timeout_s)
            supervisor = daemon.supervisor
            if supervisor is None:
                raise MountError(f"{daemon.mountpoint}: the daemon has ended")
            if credentials is not None and credentials != daemon.spec.credentials:
                daemon.check_keys(credentials)
                supervisor.replace_credentials(credentials)
                daemon.spec = replace(daemon.spec, credentials=credentials)
            device = daemon.device
            if device is None:
                raise MountError(f"{daemon.mountpoint}: the daemon's mount is not there")
            return device

    def release(self, name: str, user: str) -> None:
        """Remove a user. The daemon ends if that was its last one."""
        with self._lock:
            daemon = self._daemons.get(name)
            if daemon is None:
                return
            daemon.users.discard(user)
            if daemon.users:
                return
            daemon.retired = True
        with daemon.locked(LOCK_TIMEOUT_S):
            if daemon.start is not None:
                daemon.start.give_up()
            supervisor = daemon.supervisor
            if supervisor is not None:
                supervisor.stop()
            self._clear(daemon.mountpoint)
            self._state.remove_daemon(name)
        with self._lock:
            self._daemons.pop(name, None)

    def _wait_for_start(
        self, daemon: Daemon, credentials: Credentials | None, timeout_s: float
    ) -> None:
        """Join the present start, or begin one. Raises like `ensure`."""
        start = daemon.start
        if start is not None:
            others = credentials not in (None, start.credentials)
            if others or start.is_over:
                start.give_up()
                daemon.start = None
        if daemon.supervisor is not None:
            return  # it became ready just now
        if daemon.start is None:
            daemon.start = self._begin(daemon, credentials)
        daemon.start.wait(timeout_s)
        daemon.start = None

    def _begin(self, daemon: Daemon, credentials: Credentials | None) -> Start:
        """Begin to start or resume a daemon, and ensure that its record exists."""
        kept = self._kept_spec(daemon.mountpoint)
        if kept is None:
            # The session is lost: its users get an error instead of waiting.
            mounts.detach(daemon.mountpoint)
        else:
            daemon.spec = replace(kept, volume=daemon.spec.volume or kept.volume)
        if credentials is not None:
            daemon.spec = replace(daemon.spec, credentials=credentials)
        if daemon.needs_credentials and daemon.spec.credentials is None:
            raise RpcError(
                StatusCode.FAILED_PRECONDITION,
                "the keeper was restarted, and with it the credentials are lost; "
                "delete the pods that use the volume on this node, so that it is staged again",
            )
        try:
            # With exist_ok it would ask what is mounted there, and wait for the daemon that this is
            # to start.
            daemon.mountpoint.mkdir(mode=0o700)
        except FileExistsError:
            pass
        except OSError as error:
            raise MountError(f"{daemon.mountpoint}: {error.strerror}") from error
        spec = daemon.spec = _with_rights(daemon.spec)
        self._state.save_daemon(
            DaemonRecord(
                daemon.name, spec.source, spec.options, daemon.needs_credentials, daemon.owner
            )
        )

        def supervise() -> Supervisor:
            return Supervisor(
                spec, lambda: connect(self._keeper), leash=True,
                on_new_mount=lambda: self._on_mount(daemon),
            )  # fmt: skip

        return Start(spec.source, spec.credentials, supervise, daemon.adopt)

    def _resume(self, daemon: Daemon) -> None:
        """Resume a daemon of a former plugin, however long that takes."""
        pause_s = FIRST_PAUSE_S
        while not (daemon.retired or self._closing.is_set()):
            try:
                with self._resuming:
                    self.ensure(daemon, None, PATIENCE_S)
                self._on_mount(daemon)
                return
            except (LazyfsError, KeeperError) as error:
                refusal = without_ids(str(error))
                if refusal != daemon.refusal:
                    log.warning("%s: %s; tried again", daemon.spec.source, error)
                daemon.refusal = refusal
            except Exception:
                log.exception("%s: cannot be resumed", daemon.spec.source)
            self._closing.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _watch_keeper(self) -> None:
        """Whenever the keeper was replaced, give the sessions to the new one."""
        while not self._closing.wait(KEEPER_POLL_S):
            with self._lock:
                daemons = list(self._daemons.values())
            try:
                with self._client() as keeper:
                    kept = set(keeper.names())
                for daemon in daemons:
                    supervisor = daemon.supervisor
                    if supervisor is not None and str(daemon.mountpoint) not in kept:
                        supervisor.give_back()
            except KeeperError as error:
                log.debug("%s", error)  # Probe reports it

    def _kept_spec(self, mountpoint: Path) -> MountSpec | None:
        """What the keeper holds for a daemon."""
        with self._client() as keeper:
            kept = keeper.fetch(str(mountpoint))
        try:
            return MountSpec.from_descriptor(kept[SPEC]) if SPEC in kept else None
        finally:
            for descriptor in kept.values():
                os.close(descriptor)

    def _clear(self, mountpoint: Path) -> None:
        """Remove what is left of a daemon that does not run: mount, session, directory."""
        mounts.detach(mountpoint)
        try:
            with self._client() as keeper:
                keeper.drop(str(mountpoint))
        except KeeperError as error:
            log.warning("%s: %s", mountpoint, error)
        DaemonWatch(mountpoint).wait(timeout_s=0)  # removes its record
        with suppress(MountError):
            mounts.remove_directory(mountpoint)

    def _client(self) -> closing[KeeperClient]:
        return closing(KeeperClient.connect(self._keeper))


def _with_rights(spec: MountSpec) -> MountSpec:
    """The spec of a mount with the rights of its worker; also prepares its cache for them."""
    options = MountOptions.parse(("{attribute}", spec.options))
    answers = in_thread(options.cache_dir, lambda: rights_of(spec, options, cache_answers=True))
    return replace(spec, rights=rights_of(spec, options, cache_answers=answers).value)
