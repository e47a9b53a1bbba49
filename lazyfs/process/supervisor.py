"""Has a worker serve a mount, and another one when it dies, until the mount ends.

`Supervisor` looks after one mount, in a process of its own (`standalone.py`) or beside others in
that of the CSI driver. What happens when a worker ends:

    the mount was unmounted           all is over
    it could not be mounted           all is over, with the worker's reason
    it cannot be resumed (said so)    the old mount is detached, a new one made in its place
    it was told to end (`upgrade`)    another worker goes on, at once
    anything else                     the same, at once, then after growing pauses; it is a death

A mount that was there when a supervisor started is never given up: if its worker cannot go on yet,
the next one is tried later.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazyfs.errors import DaemonError, LazyfsError, MountError
from lazyfs.faults import report_fault, start_watching
from lazyfs.fuse import mount_syscalls
from lazyfs.handover.handover import FUSE, IN_HAND, LOCK, LOG, SPEC, is_complete
from lazyfs.handover.in_hand import note_death
from lazyfs.handover.keeper import KeeperClient, KeeperError
from lazyfs.log import within
from lazyfs.process.mount_records import (
    MountRecord,
    RunningMount,
    control_socket,
    record_of,
)
from lazyfs.process.mount_spec import MountSpec
from lazyfs.process.worker_line import WorkerLine
from lazyfs.process.worker_process import (
    END_TIMEOUT_S,
    EXIT_CANNOT_RESUME,
    POLL_S,
    StartedWorker,
    end_former,
    end_within,
    how_it_ended,
    oom_kills,
    parent_of,
    send,
    start_worker,
    wait_for_end,
    was_told_to_end,
)
from lazyfs.store.credentials import Credentials

if TYPE_CHECKING:
    from lazyfs.control.client import ControlClient

log = logging.getLogger(__name__)

STDERR = 2
# A worker that is neither ready nor refused by then is given up.
READY_TIMEOUT_S = 120.0
# Between the death of a worker and the next one. The long pause is for workers that do not even
# become ready; somebody waits for the others.
FIRST_PAUSE_S, LONGEST_PAUSE_S, LONGEST_PAUSE_AFTER_READY_S = 0.25, 30.0, 1.0
# A worker that lived this long did not die of what its predecessor died of.
LONG_LIFE_S = 60.0


class Supervisor:
    """Looks after the worker of one mount. Safe to use from several threads.

    Args:
        spec: what to mount; it is kept with the session.
        connect: gives a new connection to the keeper; raises KeeperError when there is none. What
            is kept is held here as well: a keeper that was replaced is given it again.
        leash: whether the worker ends with this process; otherwise it serves on alone.
        on_end: called from another thread when the mount has ended, for whatever reason.
        on_new_mount: called from another thread when a mount that could not go on was made anew:
            bind mounts of the old one are dead.
        first: gives a worker that was started already; called when what it asks for is kept.
    """

    def __init__(
        self,
        spec: MountSpec,
        connect: Callable[[], socket.socket],
        *,
        leash: bool,
        on_end: Callable[[], None] = lambda: None,
        on_new_mount: Callable[[], None] = lambda: None,
        first: Callable[[], StartedWorker] | None = None,
    ) -> None:
        self.name = spec.mountpoint
        self.restarts = 0
        self._spec = spec
        self._mountpoint = Path(spec.mountpoint)
        self._connect = connect
        self._kept: dict[str, int] = {}
        self._kept_lock = threading.Lock()
        self._leash = os.pipe() if leash else None
        self._on_end = on_end
        self._on_new_mount = on_new_mount
        self._first = first
        self._refusal: str | None = None
        # By who stops, and by the watcher who sees that.
        self._unmounting = threading.Lock()
        self._stopping = threading.Event()
        self._leaving = threading.Event()
        self._worker: subprocess.Popen[bytes] | None = None
        # The last worker of which it was seen how it ended.
        self._counted: subprocess.Popen[bytes] | None = None
        self._oom_kills = 0
        self._record: RunningMount | None = None
        self._device: str | None = None
        self._version = ""
        self._about = {"mountpoint": spec.mountpoint, "volume": spec.volume}
        self._watcher: threading.Thread | None = None

    @property
    def alive(self) -> bool:
        """Whether a worker runs now."""
        return self._worker is not None and self._worker.poll() is None

    @property
    def pid(self) -> int | None:
        """The process that serves the mount now, or served it last."""
        return self._worker.pid if self._worker else None

    @property
    def device(self) -> str | None:
        """The mount's device number, `major:minor`; None while it was never ready."""
        return self._device

    @property
    def ended(self) -> bool:
        """Whether the mount that `start` made or took up has ended."""
        return self._watcher is None or not self._watcher.is_alive()

    def start(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Mount, or go on with what the keeper has under this name; return when it can be used.

        What was mounted before is kept in any case: if it cannot be served yet, `trouble` says so
        and it is tried again.

        Raises:
            DaemonError: the worker refused; the message and the kind of error are its own.
            MountError: it did not become ready, or another daemon serves the mountpoint.
            KeeperError: the keeper is not there.
        """
        self._record = RunningMount(self._describe())
        former = self._record.former
        try:
            if former is not None and former.worker is not None:
                end_former(former.worker, self.name)
            self._fetch_kept()
        except BaseException:
            self._release()  # what may be mounted stays
            raise
        try:
            if is_complete(self._kept) and not mount_syscalls.session_ended(self._kept[FUSE]):
                self._find_device()
                self._start_another()
            else:
                self._start_first(timeout_s)
            self._watcher = start_watching(f"looking after {self.name}", self._look_after)
        except BaseException:
            self._clean_up()
            raise

    def give_up(self) -> None:
        """Have `start`, which another thread is in, fail soon."""
        self._stopping.set()
        if self._worker is not None:
            self._worker.kill()

    def leave(self) -> None:
        """End the worker and keep the mount, for the supervisor that comes next."""
        self._leaving.set()
        self._end_workers()

    def _start_first(self, timeout_s: float) -> None:
        if FUSE in self._kept and not mount_syscalls.session_ended(self._kept[FUSE]):
            self._unmount()  # it was never complete
            self._abort()
        self._let_go()
        with self._keeper() as keeper:
            keeper.drop(self.name)
        self._store_spec()
        if mount_syscalls.clear_stale(self._mountpoint):
            log.warning("%s: took away a mount whose daemon was gone", self._mountpoint)
        self._start_worker(timeout_s)

    def replace_credentials(self, credentials: Credentials) -> None:
        """Use renewed credentials from now on, in this worker and in those after it.

        Raises:
            LazyfsError: the worker does not take them, or does not answer.
        """
        if credentials == self._spec.credentials:
            return
        self._spec = replace(self._spec, credentials=credentials)
        self._store_spec()
        if self.alive:
            self._client().put("/credentials", asdict(credentials))

    def name_volumes(self, volume: str) -> None:
        """Have the log name these volumes from now on, of this worker and of those after it.

        Raises:
            KeeperError: the keeper is not there.
            ControlError: the worker does not answer.
        """
        if volume == self._spec.volume:
            return
        self._about["volume"] = volume
        self._spec = replace(self._spec, volume=volume)
        self._store_spec()
        if self.alive:
            self._client().put("/log", {"volume": volume})

    def give_back(self) -> None:
        """Give a keeper that was replaced what the former one kept. Raises KeeperError."""
        with self._keeper() as keeper, self._kept_lock:
            if FUSE in self._kept and self.name not in keeper.names():
                log.warning("%s: the keeper was replaced: given its session", self._mountpoint)
                keeper.store(self.name, self._kept)

    def status(self) -> dict[str, Any]:
        """What the worker says of itself (`GET /status`). Raises ControlError."""
        answer: dict[str, Any] = self._client().get("/status")
        return answer

    def _client(self) -> ControlClient:
        # Asked by the CSI driver only, which has imported it; a mount by hand begins sooner.
        from lazyfs.control.client import ControlClient

        return ControlClient(control_socket(self._mountpoint))

    @property
    def trouble(self) -> str | None:
        """What is wrong with the mount, in words; None if nothing is known to be."""
        if not self.alive:
            why = f": {self._refusal}" if self._refusal else ""
            return f"its daemon is down and is being started again{why}"
        try:
            trouble: str | None = self.status()["trouble"]
        except LazyfsError as error:
            return str(error)
        return trouble

    def stop(self) -> None:
        """Unmount, even if it is in use, and end the worker, which finishes its writes first."""
        self._stopping.set()
        self._unmount()
        self._end_workers()

    def _start_worker(self, timeout_s: float) -> None:
        """Start a worker, and return when the mount can be used.

        Raises:
            DaemonError, MountError: it cannot; then the worker has ended.
        """
        started = self._waiting_worker() or self._start_process()
        self._worker = started.process
        self._oom_kills = oom_kills()
        if self._stopping.is_set():
            self._worker.kill()  # `give_up` was just too early to see it
        try:
            with started.line:
                self._wait_until_ready(started, time.monotonic() + timeout_s)
        except BaseException:
            started.process.kill()
            raise
        self._fetch_kept()

    def _waiting_worker(self) -> StartedWorker | None:
        """The worker that was started before it was known what to mount, if it still lives."""
        first, self._first = self._first, None
        started = first() if first else None
        if started is not None and started.process.poll() is not None:
            started.line.close()
            return None
        return started

    def _start_process(self) -> StartedWorker:
        with self._connect() as connection:
            return start_worker(self.name, connection, self._leash[0] if self._leash else None)

    def _wait_until_ready(self, started: StartedWorker, until_s: float) -> None:
        line = WorkerLine(started.line)
        while (said := line.receive(until_s)) and "mount" in said:
            self._mount(line, said["mount"])
        if said is None:
            raise MountError(f"{self._mountpoint}: the daemon was not ready in time")
        if said.get("ready"):
            self._version = said["version"]
            self._note(self.pid)
            return
        code = end_within(started.process, END_TIMEOUT_S)
        if said:
            raise DaemonError(said["error"], said["exit_code"], said["kind"], code)
        raise MountError(
            f"{self._mountpoint}: the daemon {how_it_ended(code)} before the mount was ready"
        )

    def _mount(self, line: WorkerLine, wanted: dict[str, Any]) -> None:
        """Mount for a worker that is ready to serve."""
        try:
            descriptor, init_message = mount_syscalls.begin_mount(
                wanted["source"], self._mountpoint, allow_other=wanted["allow_other"]
            )
        except MountError as error:
            line.refuse(error)
            return
        with self._kept_lock:
            self._kept[FUSE] = descriptor
        self._find_device()
        line.give(descriptor, init_message)

    def _find_device(self) -> None:
        entry = mount_syscalls.find_mount(self._mountpoint)
        # Nothing there: it was detached, and is served to those who still use it. Not to be asked
        # later: another mount may be there by then.
        self._device = entry.device if entry else None

    def _describe(self, worker: int | None = None) -> MountRecord:
        return MountRecord(
            self.name, self._spec.source, os.getpid(), worker, self._version, self.restarts,
            self._device or "",
        )  # fmt: skip

    def _look_after(self) -> None:
        with within(self._about):
            self._watch()

    def _watch(self) -> None:
        """Wait for the end of each worker and do what the module docstring says."""
        pause_s = 0.0
        while True:
            began = time.monotonic()
            code = wait_for_end(self._worker) if self._worker else 0
            if self._leaving.is_set():
                self._let_go()
                self._release()
                return
            if self._stopping.is_set() or self._has_ended():
                break
            if time.monotonic() - began >= LONG_LIFE_S:
                pause_s = 0.0
            self._see_end(code, pause_s)
            if self._wait_to_end(pause_s):
                continue
            ready = self._start_another()
            longest_s = LONGEST_PAUSE_AFTER_READY_S if ready else LONGEST_PAUSE_S
            pause_s = min(max(FIRST_PAUSE_S, 2 * pause_s), longest_s)
        try:
            self._clean_up()
            log.info("unmounted %s", self._mountpoint)
        finally:
            self._on_end()

    def _see_end(self, code: int, pause_s: float) -> None:
        """Tell how a worker ended, and count it if it was a death; once for each worker."""
        if self._counted is self._worker:
            return  # none could be started after it
        self._counted = self._worker
        if was_told_to_end(code):
            log.info("%s: the worker %s ended as it was told to; another one goes on",
                     self._mountpoint, self.pid)  # fmt: skip
            return
        self.restarts += 1
        self._note(self.pid)  # the next worker reads there how often this happened
        # Whoever kills a worker from outside says nothing about the requests that it had.
        if code != -signal.SIGKILL or oom_kills() > self._oom_kills:
            with self._kept_lock:
                if IN_HAND in self._kept:
                    note_death(self._kept[IN_HAND])
        log.warning(
            "%s: the worker %s %s; another one goes on%s",
            self._mountpoint, self.pid, how_it_ended(code),
            f" in {pause_s:g} s" if pause_s else "",
        )  # fmt: skip

    def _note(self, worker: int | None) -> None:
        """Bring the record up to date; the mount goes on where that is not possible."""
        try:
            if self._record is not None:
                self._record.write(self._describe(worker))
        except OSError as error:
            log.warning("%s: its record cannot be written: %s", self._mountpoint, error)

    def _wait_to_end(self, timeout_s: float) -> bool:
        """Wait for so long, or until this mount is to end here; whether it is."""
        until = time.monotonic() + timeout_s
        while not self._is_told_to_end():
            if time.monotonic() >= until:
                return False
            time.sleep(POLL_S)
        return True

    def _start_another(self) -> bool:
        """Have the mount served again; whether it is."""
        try:
            self.give_back()
            self._store_spec()
            try:
                self._start_worker(READY_TIMEOUT_S)
            except DaemonError as error:
                if error.status != EXIT_CANNOT_RESUME:
                    raise
                log.warning("%s; open files of the old mount fail", error)
                self._forget_session()
                self._start_worker(READY_TIMEOUT_S)
                self._on_new_mount()
        except Exception as error:
            if not isinstance(error, LazyfsError | KeeperError | OSError):
                report_fault("starting a worker", error)
            elif not (self._is_told_to_end() or self._has_ended()):
                log.error("%s: the worker could not go on: %s", self._mountpoint, error)
            self._refusal = str(error)
            return False
        self._refusal = None
        return True

    def _is_told_to_end(self) -> bool:
        return self._stopping.is_set() or self._leaving.is_set()

    def _has_ended(self) -> bool:
        """Whether the kernel has ended the session, or is just about to."""
        return FUSE not in self._kept or mount_syscalls.session_ended(self._kept[FUSE])

    def _keeper(self) -> closing[KeeperClient]:
        return closing(KeeperClient(self._connect()))

    def _fetch_kept(self) -> None:
        """Hold what the keeper holds."""
        with self._keeper() as keeper:
            kept = keeper.fetch(self.name)
        self._let_go(kept)

    def _let_go(self, instead: dict[str, int] | None = None) -> None:
        with self._kept_lock:
            for descriptor in self._kept.values():
                os.close(descriptor)
            self._kept = instead or {}

    def _store_spec(self) -> None:
        descriptor = self._spec.to_descriptor()
        kept = {SPEC: descriptor}
        # On a leash the lock is the supervisor's alone: a killed worker, whose threads wait in
        # the kernel for the next one's answers, would hold it against that one's supervisor.
        if self._leash is None and self._record is not None:
            kept |= {LOG: STDERR, LOCK: self._record.descriptor}
        try:
            with self._keeper() as keeper:
                keeper.store(self.name, kept)
        finally:
            os.close(descriptor)

    def _end_workers(self) -> None:
        """End the worker, and wait until the watcher has seen that all is over."""
        deadline = time.monotonic() + END_TIMEOUT_S
        told: subprocess.Popen[bytes] | None = None
        while self._watcher is not None and self._watcher.is_alive():
            worker = self._worker  # another one than before, if the watcher has just started it
            if worker is not None and worker.poll() is None:
                if worker is not told:
                    worker.terminate()
                    told = worker
                elif time.monotonic() >= deadline:
                    log.warning("%s: the worker %d did not end: killed", self.name, worker.pid)
                    worker.kill()
            self._watcher.join(POLL_S * 5)

    def _forget_session(self) -> None:
        """Detach the mount and close our descriptor: those who use it get an error, not a hang."""
        self._unmount()
        self._abort()
        self._let_go()
        with self._keeper() as keeper:
            keeper.drop(self.name)
        self._store_spec()

    def _unmount(self) -> None:
        """Unmount what we mounted, if that is still what is mounted there.

        Whatever comes of it, the session ends with its descriptor.
        """
        with self._unmounting:
            for lazy in (False, True):
                entry = mount_syscalls.find_mount(self._mountpoint)
                if FUSE not in self._kept or entry is None or not self._is_ours(entry):
                    return
                try:
                    mount_syscalls.unmount(self._mountpoint, lazy=lazy)
                except MountError as error:
                    if lazy and mount_syscalls.find_mount(self._mountpoint) is not None:
                        log.error("%s", error)

    def _is_ours(self, entry: mount_syscalls.MountEntry) -> bool:
        is_of_type = entry.filesystem_type == mount_syscalls.FILESYSTEM_TYPE
        return is_of_type and self._device in (None, entry.device)

    def _abort(self) -> None:
        """Have who still uses the mount get an error, and threads of a killed worker end."""
        # Once the session has ended, its device number may be that of another mount.
        if self._device is not None and not self._has_ended():
            mount_syscalls.abort(self._device)

    def _clean_up(self) -> None:
        self._unmount()
        self._abort()
        self._let_go()
        try:
            with self._keeper() as keeper:
                keeper.drop(self.name)
        except KeeperError as error:
            log.warning("%s: %s", self._mountpoint, error)
        self._release()

    def _release(self) -> None:
        leash, self._leash = self._leash, None
        for descriptor in leash or ():
            os.close(descriptor)
        record, self._record = self._record, None
        if record is not None:
            record.close()


def end_daemon(record: MountRecord) -> None:
    """End the daemon of a mount; whoever still uses a copy of the mount gets an error.

    Its supervisor ends the kernel's session. Where that was killed, the session ends with the
    worker, which has the last descriptor of it.
    """
    if record.worker is not None and parent_of(record.worker) != record.supervisor:
        send(record.worker, signal.SIGTERM)
    else:
        send(record.supervisor, signal.SIGTERM)


def replace_worker(record: MountRecord) -> MountRecord:
    """End the worker of a mount, wherever its supervisor runs, and wait for the next one.

    Raises:
        MountError: nobody would start another one, or none became ready.
    """
    worker = record.worker
    if worker is None or parent_of(worker) != record.supervisor:
        raise MountError(
            f"{record.mountpoint}: its worker has no supervisor that would start another one: "
            "unmount it, and mount it again"
        )
    send(worker, signal.SIGTERM)
    began = time.monotonic()
    while time.monotonic() - began < READY_TIMEOUT_S:
        time.sleep(POLL_S)
        now = record_of(Path(record.mountpoint))
        if now is None:
            raise MountError(f"{record.mountpoint}: was unmounted meanwhile")
        if now.worker != worker:
            return now
        if time.monotonic() - began > END_TIMEOUT_S and parent_of(worker) == record.supervisor:
            send(worker, signal.SIGKILL)
    raise MountError(f"{record.mountpoint}: no new worker became ready; its log says why")
