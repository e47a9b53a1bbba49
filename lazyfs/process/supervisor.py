"""Runs a worker for a mount, and another one when it dies, until the mount ends.

`Supervisor` supervises one mount, in its own process (`standalone.py`) or together with others in
the CSI node plugin. When a worker ends, the supervisor reacts:

    the mount was unmounted           it ends
    it could not be mounted           it ends, with the worker's reason
    the worker cannot resume          it detaches the old mount and mounts the source again
    it was told to end (`upgrade`)    it starts another worker at once
    anything else                     the same, at once, then after growing pauses; it is a death

A mount that existed when a supervisor started is never given up: if its worker cannot resume it
yet, another worker is started later. This module is one class because each of its steps may happen
while another thread stops the mount.
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
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazyfs import user
from lazyfs.errors import DaemonError, LazyfsError
from lazyfs.faults import report_fault, start_watching
from lazyfs.fuse import mount_syscalls
from lazyfs.handover.handover import LOCK, LOG, OF_SUPERVISOR, SPEC
from lazyfs.handover.keeper import KeeperError, restrict_to
from lazyfs.log import within
from lazyfs.process.mount_records import (
    MountRecord,
    RunningMount,
    control_socket,
)
from lazyfs.process.mount_spec import MountSpec
from lazyfs.process.mounted_session import MountedSession
from lazyfs.process.privileges import Rights, worker_user
from lazyfs.process.worker_process import (
    END_TIMEOUT_S,
    EXIT_CANNOT_RESUME,
    POLL_S,
    READY_TIMEOUT_S,
    StartedWorker,
    end_former,
    how_it_ended,
    next_pause_s,
    oom_kills,
    start_worker,
    stuck_of,
    wait_for_end,
    was_told_to_end,
)
from lazyfs.process.worker_requests import WorkerRequests
from lazyfs.store.credentials import Credentials

if TYPE_CHECKING:
    from lazyfs.control.client import ControlClient

log = logging.getLogger(__name__)

STDERR = 2
# The longest answer of a worker to its supervisor, which has many: a status is a few KiB.
MOST_ANSWERED_BYTES = 2 << 20
# A worker that lived this long did not die for the same reason as its predecessor.
LONG_LIFE_S = 60.0


class Supervisor:
    """Supervises the worker of one mount. Thread-safe.

    Args:
        spec: what to mount; it is kept with the session.
        connect: returns a new connection to the keeper; raises KeeperError if there is none.
        leash: whether the worker ends with this process; otherwise it keeps serving alone.
        on_end: called from another thread when the mount has ended, for whatever reason.
        on_new_mount: called from another thread when a mount that could not be resumed was mounted
            again: bind mounts of the old one are dead.
    """

    def __init__(
        self,
        spec: MountSpec,
        connect: Callable[[], socket.socket],
        *,
        leash: bool,
        on_end: Callable[[], None] = lambda: None,
        on_new_mount: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = spec.mountpoint
        self.restarts = 0
        self._spec = spec
        self._mountpoint = Path(spec.mountpoint)
        self._connect = connect
        self._session = MountedSession(self._mountpoint, connect)
        self._leash = os.pipe() if leash else None
        self._on_end = on_end
        self._on_new_mount = on_new_mount
        self._refusal: str | None = None
        self._stopping = threading.Event()
        self._leaving = threading.Event()
        self._worker: subprocess.Popen[bytes] | None = None
        # The last worker whose end was logged and counted.
        self._counted: subprocess.Popen[bytes] | None = None
        self._oom_kills = 0
        # Whether the last worker was killed from outside before it was ready.
        self._was_killed = False
        self._record: RunningMount | None = None
        self._version = ""
        self._mounted_ns = 0
        self._about = {"mountpoint": spec.mountpoint, "volume": spec.volume}
        self._watcher: threading.Thread | None = None

    @property
    def alive(self) -> bool:
        """Whether a worker runs now."""
        return self._worker is not None and self._worker.poll() is None

    @property
    def pid(self) -> int | None:
        """The worker that serves the mount now, or served it last."""
        return self._worker.pid if self._worker else None

    @property
    def device(self) -> str | None:
        """The mount's device number, `major:minor`; None while it was never ready."""
        return self._session.device

    @property
    def mounted_ns(self) -> int:
        """When the source was mounted, in nanoseconds since the epoch; 0 while it was not."""
        return self._mounted_ns

    @property
    def ended(self) -> bool:
        """Whether the mount that `start` made or resumed has ended."""
        return self._watcher is None or not self._watcher.is_alive()

    def start(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Mount, or resume the mount in the keeper; returns when it can be used.

        An existing mount is never given up: if it cannot be served yet, `trouble` says so, and a
        worker is tried again.

        Raises:
            DaemonError: the worker failed; the message and the kind of error are the worker's.
            MountError: it did not become ready, or another daemon serves the mountpoint.
            KeeperError: the keeper does not answer.
        """
        self._record = RunningMount(self._describe())
        former = self._record.former
        try:
            if former is not None and former.worker is not None:
                end_former(former.worker, self.name)
            self._session.fetch()
        except BaseException:
            self._release()  # an existing mount stays
            raise
        try:
            if self._session.can_be_resumed:
                self._session.find_device()
                self._start_another()
            else:
                self._start_first(timeout_s)
            self._watcher = start_watching(f"supervising {self.name}", self._look_after)
        except BaseException:
            self._clean_up()
            raise

    def give_up(self) -> None:
        """Make a `start` in another thread fail soon."""
        self._stopping.set()
        if self._worker is not None:
            self._worker.kill()

    def leave(self) -> None:
        """End the worker and keep the mount for the next supervisor."""
        self._leaving.set()
        self._end_workers()

    def _start_first(self, timeout_s: float) -> None:
        if not self._session.has_ended:
            self._session.end()  # it was never complete
        self._session.drop()
        self._store_spec()
        if mount_syscalls.clear_stale(self._mountpoint):
            log.warning("%s: unmounted a mount whose daemon was gone", self._mountpoint)
        mount_syscalls.check_mountpoint(self._mountpoint)
        self._start_worker(timeout_s)

    def replace_credentials(self, credentials: Credentials) -> None:
        """Use renewed credentials from now on, in this worker and later ones.

        Raises:
            LazyfsError: the worker does not accept them, or does not answer.
        """
        if credentials == self._spec.credentials:
            return
        self._spec = replace(self._spec, credentials=credentials)
        self._store_spec()
        if self.alive:
            self._client().put("/credentials", asdict(credentials))

    def name_volumes(self, volume: str) -> None:
        """Have the logs of this worker and later ones name these volumes.

        Raises:
            KeeperError: the keeper does not answer.
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
        """Give a replaced keeper the descriptors of the former one. Raises KeeperError."""
        self._session.give_back()

    def status(self) -> dict[str, Any]:
        """The worker's status (`GET /status`). Raises ControlError."""
        answer: dict[str, Any] = self._client().get("/status")
        return answer

    def _client(self) -> ControlClient:
        # Only the CSI driver uses it and has imported it; other mounts start faster without.
        from lazyfs.control.client import TIMEOUT_S, ControlClient

        return ControlClient(control_socket(self._mountpoint), TIMEOUT_S, MOST_ANSWERED_BYTES)

    @property
    def trouble(self) -> str | None:
        """What is wrong with the mount, in words; None if no trouble is known."""
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
        # A push may wait for a read, and the read for S3. Without a worker both end.
        unmounting = threading.Thread(target=self._session.unmount, name="unmounting", daemon=True)
        try:
            unmounting.start()
            unmounting.join(mount_syscalls.UNMOUNT_PATIENCE_S)
        except RuntimeError:  # no more threads are allowed
            self._session.unmount()
        self._end_workers()
        if unmounting.is_alive():
            unmounting.join()

    def _start_worker(self, timeout_s: float) -> None:
        """Start a worker; returns when the mount can be used.

        Raises:
            DaemonError, MountError: it cannot be used; the worker has ended.
        """
        owner = int(str(self._spec.options.get("uid", user.uid())))
        assert self._record is not None
        requests = WorkerRequests(self._mountpoint, self._session, self._record, owner)
        started = self._start_process()
        self._worker = started.process
        self._oom_kills = oom_kills()
        if self._stopping.is_set():
            self._worker.kill()  # `give_up` came just before it existed
        try:
            ready = requests.serve_until_ready(started, time.monotonic() + timeout_s)
            self._version = ready["version"]
            self._mounted_ns = ready.get("mounted_ns", 0)  # unknown to workers of older versions
            self._note(self.pid)
            self._session.fetch()
        except BaseException:
            code = started.process.poll()
            self._was_killed = code is not None and self._is_kill_from_outside(code)
            started.process.kill()
            started.channel.close()
            raise
        threading.Thread(
            target=requests.help_until_end, args=[started.channel], daemon=True
        ).start()

    def _start_process(self) -> StartedWorker:
        with self._connect() as connection:
            try:
                restrict_to(connection, self.name, OF_SUPERVISOR)
            except KeeperError as error:
                log.warning("%s: the worker can ask for other mounts too: %s", self.name, error)
            leash = self._leash[0] if self._leash else None
            as_user = worker_user(Rights(self._spec.rights))
            return start_worker(self.name, connection, as_user, leash, self.restarts)

    def _describe(self, worker: int | None = None) -> MountRecord:
        return MountRecord(
            self.name, self._spec.source, os.getpid(), worker, self._version, self.restarts,
            self._session.device or "",
        )  # fmt: skip

    def _look_after(self) -> None:
        with within(self._about):
            self._watch()

    def _watch(self) -> None:
        """Wait for the end of each worker and react as the module docstring says."""
        pause_s = 0.0
        down_since_s: float | None = None
        while True:
            began = time.monotonic()
            code = wait_for_end(self._worker) if self._worker else 0
            if self._leaving.is_set():
                self._session.let_go()
                self._release()
                return
            if self._stopping.is_set() or self._session.has_ended:
                break
            if time.monotonic() - began >= LONG_LIFE_S:
                pause_s = 0.0
            if down_since_s is None:
                down_since_s = time.monotonic()
            self._see_end(code, pause_s)
            if self._wait_to_end(pause_s):
                continue
            if self._start_another():
                down_since_s = None
            unready_s = None
            if down_since_s is not None and not self._was_killed:
                unready_s = time.monotonic() - down_since_s
            pause_s = next_pause_s(pause_s, unready_s)
        try:
            self._clean_up()
            for line in stuck_of(self._worker.pid) if self._worker else []:
                log.warning("%s: %s", self._mountpoint, line)
            log.info("unmounted %s", self._mountpoint)
        finally:
            self._on_end()

    def _see_end(self, code: int, pause_s: float) -> None:
        """Log how a worker ended, and count it if it was a death; once for each worker."""
        if self._counted is self._worker:
            return  # no other worker could be started after it
        self._counted = self._worker
        if was_told_to_end(code):
            log.info("%s: worker %s ended as told; another one continues",
                     self._mountpoint, self.pid)  # fmt: skip
            return
        self.restarts += 1
        self._note(self.pid)  # the next worker reads the count there
        # A kill from outside says nothing about the requests that the worker had.
        if not self._is_kill_from_outside(code):
            self._session.note_death()
        log.warning(
            "%s: worker %s %s; another one continues%s",
            self._mountpoint, self.pid, how_it_ended(code),
            f" in {pause_s:g} s" if pause_s else "",
        )  # fmt: skip

    def _is_kill_from_outside(self, code: int) -> bool:
        """Whether the exit code of the worker says nothing about the worker itself."""
        return code == -signal.SIGKILL and oom_kills() == self._oom_kills

    def _note(self, worker: int | None) -> None:
        """Update the record; if that fails, the mount continues."""
        try:
            if self._record is not None:
                self._record.write(self._describe(worker))
        except OSError as error:
            log.warning("%s: its record cannot be written: %s", self._mountpoint, error)

    def _wait_to_end(self, timeout_s: float) -> bool:
        """Wait for the timeout, or until the mount is told to end; returns whether it is."""
        until = time.monotonic() + timeout_s
        while not self._is_told_to_end():
            if time.monotonic() >= until:
                return False
            time.sleep(POLL_S)
        return True

    def _start_another(self) -> bool:
        """Start another worker for the mount; returns whether it serves."""
        self._was_killed = False
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
            elif not (self._is_told_to_end() or self._session.has_ended):
                log.error("%s: the worker could not resume: %s", self._mountpoint, error)
            self._refusal = str(error)
            return False
        self._refusal = None
        return True

    def _is_told_to_end(self) -> bool:
        return self._stopping.is_set() or self._leaving.is_set()

    def _store_spec(self) -> None:
        descriptor = self._spec.to_descriptor()
        kept = {SPEC: descriptor}
        # With a leash only the supervisor holds the lock: a killed worker, whose threads wait in
        # the kernel for the next worker's answers, would hold it against the next supervisor.
        if self._leash is None and self._record is not None:
            kept |= {LOG: STDERR, LOCK: self._record.descriptor}
        try:
            self._session.store(kept)
        finally:
            os.close(descriptor)

    def _end_workers(self) -> None:
        """End the worker, and wait until the watcher has ended."""
        deadline = time.monotonic() + END_TIMEOUT_S
        told: subprocess.Popen[bytes] | None = None
        while self._watcher is not None and self._watcher.is_alive():
            worker = self._worker  # may be a new one that the watcher has just started
            if worker is not None and worker.poll() is None:
                if worker is not told:
                    worker.terminate()
                    told = worker
                elif time.monotonic() >= deadline:
                    log.warning("%s: the worker %d did not end: killed", self.name, worker.pid)
                    worker.kill()
            self._watcher.join(POLL_S * 5)

    def _forget_session(self) -> None:
        """Detach the mount and close our descriptor: its users get an error instead of waiting."""
        self._session.end()
        self._session.drop()
        self._store_spec()

    def _clean_up(self) -> None:
        self._session.end()
        try:
            self._session.drop()
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
