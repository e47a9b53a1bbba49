"""Who may serve a mountpoint, and what is known of who does."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lazyfs.errors import MountError
from lazyfs.process import mount_records
from lazyfs.process.mount_records import (
    DaemonWatch,
    MountRecord,
    RunningMount,
    control_socket,
    last_record,
    record_of,
    records,
)

MOUNTPOINT = Path("/mnt/model")
RECORD = MountRecord(str(MOUNTPOINT), "s3://bucket/model", os.getpid())


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAZYFS_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


def test_a_mountpoint_has_one_supervisor() -> None:
    running = RunningMount(RECORD)
    with pytest.raises(MountError, match=r"s3://bucket/model is mounted there already"):
        RunningMount(RECORD)
    assert record_of(MOUNTPOINT) == RECORD
    running.close()
    assert record_of(MOUNTPOINT) is None
    RunningMount(RECORD).close()


def test_a_worker_that_cannot_end_holds_no_mountpoint() -> None:
    """It has the descriptor of the lock, too."""
    running = RunningMount(RECORD)
    of_worker = os.dup(running.descriptor)
    watch = DaemonWatch(MOUNTPOINT)
    running.close()
    assert watch.wait(timeout_s=0)
    os.close(of_worker)


def test_processes_that_never_run_again_hold_no_mountpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Supervisor and worker were killed, and the worker waits for a disk."""
    of_worker = RunningMount(replace(RECORD, worker=2))
    with pytest.raises(MountError):
        RunningMount(RECORD)
    monkeypatch.setattr(mount_records, "is_over", lambda pid: pid == 2)
    with pytest.raises(MountError):
        RunningMount(RECORD)
    monkeypatch.setattr(mount_records, "is_over", lambda pid: True)
    RunningMount(RECORD).close()
    of_worker.close()


def test_a_record_that_is_removed_before_it_is_locked(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The former supervisor removes its file just when the next one has opened it."""
    former = RunningMount(RECORD)
    lock, tries = fcntl.flock, 0

    def flock(descriptor: int, how: int) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            former.close()
        lock(descriptor, how)

    monkeypatch.setattr(mount_records.fcntl, "flock", flock)
    second = RunningMount(RECORD)
    with pytest.raises(MountError, match="mounted there already"):
        RunningMount(RECORD)
    second.close()


def test_many_at_once_one_wins(directory: Path) -> None:
    """However records come and go meanwhile."""
    at_once, most, errors = 0, 0, 0
    counting = threading.Lock()
    begin = threading.Barrier(8)

    def compete() -> None:
        nonlocal at_once, most, errors
        begin.wait()
        for _ in range(200):
            try:
                running = RunningMount(RECORD)
            except MountError:
                errors += 1
                continue
            with counting:
                at_once += 1
                most = max(most, at_once)
            with counting:
                at_once -= 1
            running.close()

    threads = [threading.Thread(target=compete) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == 1


def test_watching_a_former_daemon_does_not_affect_the_next_one(directory: Path) -> None:
    first = RunningMount(RECORD)
    watch = DaemonWatch(MOUNTPOINT)
    first.close()
    second = RunningMount(RECORD)
    control_socket(MOUNTPOINT).write_text("")
    assert watch.wait(timeout_s=0)
    assert watch.wait(timeout_s=0)
    assert record_of(MOUNTPOINT) == RECORD
    assert control_socket(MOUNTPOINT).exists()
    second.close()
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"mountpoint": 1, "more": 2}'])
def test_a_record_that_is_just_being_made(directory: Path, content: str) -> None:
    RunningMount(RECORD).close()
    other = Path("/mnt/other")
    running = RunningMount(MountRecord(str(other), "s3://other", 1))
    path = next(directory.glob("*.json"))
    path.write_text(content)
    assert records() == []
    assert last_record(other) is None
    with pytest.raises(MountError, match="mounted there already"):
        RunningMount(MountRecord(str(other), "s3://other", 1))
    running.close()


def test_a_path_that_is_too_long_for_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = tmp_path / ("x" * (85 - len(str(tmp_path)) - 1))
    monkeypatch.setenv("LAZYFS_RUNTIME_DIR", str(fits))
    RunningMount(RECORD).close()
    monkeypatch.setenv("LAZYFS_RUNTIME_DIR", f"{fits}yyy")
    with pytest.raises(
        MountError, match=r"yyy: this path is 3 bytes too long .*LAZYFS_RUNTIME_DIR"
    ):
        RunningMount(RECORD)
    assert not Path(f"{fits}yyy").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="others have no workers of another user")
def test_the_lock_of_root_does_not_let_its_holder_write() -> None:
    """Workers hold it; what is in the record decides which processes get signals."""
    running = RunningMount(RECORD)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(running.descriptor, b"{}", 0)
    running.write(replace(RECORD, worker=1234))
    found = record_of(MOUNTPOINT)
    assert found is not None and found.worker == 1234
    running.close()


def test_a_record_of_the_next_mount_stays() -> None:
    """A mount that was detached while in use writes no more into the record of that place."""
    detached = RunningMount(RECORD)
    mount_records._path(MOUNTPOINT).unlink()
    detached.write(replace(RECORD, restarts=1))
    assert not mount_records._path(MOUNTPOINT).exists()
    following = RunningMount(replace(RECORD, source="s3://bucket/next"))
    detached.write(replace(RECORD, restarts=1))
    found = record_of(MOUNTPOINT)
    assert found is not None and (found.source, found.restarts) == ("s3://bucket/next", 0)
    detached.close()
    following.close()


def test_records_that_others_can_write_are_ignored() -> None:
    directory = mount_records.runtime_directory()
    directory.mkdir(mode=0o700, exist_ok=True)
    path = control_socket(MOUNTPOINT).with_suffix(".json")
    path.write_text(json.dumps(asdict(RECORD)))
    assert last_record(MOUNTPOINT) == RECORD
    directory.chmod(0o777)
    assert last_record(MOUNTPOINT) is None and records() == []


def test_without_a_session_records_are_where_only_this_user_can_create_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LAZYFS_RUNTIME_DIR")
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid or 12345)
    # The home is another user's.
    assert uid or str(mount_records.runtime_directory()) == "/tmp/lazyfs-12345"
    monkeypatch.setattr(mount_records, "is_private", lambda path: path == tmp_path)
    assert mount_records.runtime_directory().is_relative_to(tmp_path / ".local/state/lazyfs")
    monkeypatch.setattr(mount_records, "is_private", lambda path: path.is_relative_to("/run/user"))
    assert mount_records.runtime_directory() == Path(f"/run/user/{os.geteuid()}/lazyfs")
