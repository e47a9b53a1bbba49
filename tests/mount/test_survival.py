"""A mount survives its worker."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from mounting import (
    RUNTIME_DIRECTORY,
    Mounted,
    environment,
    is_mounted,
    lazyfs,
    shell,
    wait_until_gone,
)
from s3 import S3

from lazyfs.fuse import mount_syscalls
from lazyfs.handover.keeper import Keeper, KeeperClient
from lazyfs.memory_file import memory_file, read_whole
from lazyfs.process.mount_spec import MountSpec
from lazyfs.process.supervisor import Supervisor
from lazyfs.store.credentials import StaticCredentials

pytestmark = pytest.mark.fuse

MIB = 1 << 20
CONTENT = {
    f"m/model-{number:05}-of-00003.safetensors": random.Random(number).randbytes(24 * MIB)
    for number in (1, 2, 3)
}
# Reads every file over and over: half of the processes by mapping it, backwards in pieces.
READER = """
import hashlib, mmap, os, sys, time
mapped, until, paths = sys.argv[1] == "map", time.monotonic() + float(sys.argv[2]), sys.argv[3:]
rounds = 0
while time.monotonic() < until or not rounds:
    for path in paths:
        with open(path, "rb") as file:
            if mapped:
                view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                view.madvise(mmap.MADV_RANDOM)
                pieces = [view[i:i + 4096] for i in range(len(view) - 4096, -1, -65536)]
                digest = hashlib.sha256(view).hexdigest()
                view.close()
            else:
                digest = hashlib.sha256(file.read()).hexdigest()
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            print(os.path.basename(path), digest, flush=True)
        time.sleep(0.1)  # other tests want the processors, too
    rounds += 1
"""


@pytest.fixture(scope="module", autouse=True)
def bucket(server: S3) -> None:
    server.put("survival", CONTENT)


@contextmanager
def readers(mounted: Mounted, seconds: float) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that read all files for so long."""
    paths = sorted(str(path) for path in mounted.path.glob("*"))
    assert len(paths) == 3
    started = [
        subprocess.Popen(
            [sys.executable, "-c", READER, how, str(seconds), *paths],
            stdout=subprocess.PIPE, text=True,
        )
        for how in ("map", "read")
    ]  # fmt: skip
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate(timeout=60)


def assert_right(started: list[subprocess.Popen[str]]) -> None:
    wanted = {
        name.removeprefix("m/"): hashlib.sha256(content).hexdigest()
        for name, content in CONTENT.items()
    }
    for process in started:
        output, _ = process.communicate(timeout=90)
        assert process.returncode == 0
        seen = [line.split() for line in output.splitlines()]
        assert len(seen) >= 3
        assert all(wanted[name] == digest for name, digest in seen)


@contextmanager
def user_of(mounted: Mounted, code: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has told that it uses a mount, and goes on when it is told a line."""
    user = subprocess.Popen(
        [sys.executable, "-c", code, mounted.path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert user.stdout is not None
    try:
        user.stdout.readline()
        yield user
    finally:
        user.kill()
        user.wait(timeout=60)


def listings(s3: S3) -> int:
    return sum("list-type" in request for request in s3.requests())


def kill_worker(mounted: Mounted) -> None:
    worker = mounted.worker
    os.kill(worker, signal.SIGKILL)
    wait_until_gone(worker)
    wait_for(lambda: any_worker(mounted), timeout_s=60)


def any_worker(mounted: Mounted) -> bool:
    try:
        return mounted.worker > 0
    except AssertionError:
        return False


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("cache", [(), ("--cache-dir=none", "--page-cache=off")])
def test_readers_notice_nothing_of_dying_workers(
    mount: Callable[..., Mounted], cache: tuple[str, ...]
) -> None:
    """LAZYFS_KILLS=50 makes the long version."""
    kills = int(os.environ.get("LAZYFS_KILLS", "3"))
    seed = random.randrange(1 << 32)
    print("seed", seed)
    pauses = random.Random(seed)
    mounted = mount("s3://survival/m", "--block-size=1MiB", *cache)
    with readers(mounted, 1.5 * kills) as started:
        for _ in range(kills):
            time.sleep(pauses.uniform(0, 2))
            kill_worker(mounted)
        assert_right(started)
    # One that is killed while it starts has not resumed anything yet.
    died = "was ended by SIGKILL; another one continues"
    mounted.wait_for_log(died, kills)
    assert mounted.log().count(died) == kills
    mounted.wait_for_log("resumed s3://survival/m")
    assert "Traceback" not in mounted.log()


def test_open_files_stay_open(mount: Callable[..., Mounted], s3: S3) -> None:
    """Handles, mapped files and working directories of before are good afterwards."""
    mounted = mount("s3://survival/m", "--prefetch=off", "--cache-dir=none")
    code = """
import hashlib, mmap, os, sys
os.chdir(sys.argv[1])
file = open(sorted(os.listdir("."))[0], "rb")
view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
before = os.fstat(file.fileno())
print(flush=True)
sys.stdin.readline()
assert os.fstat(file.fileno()) == before
assert os.stat(file.name) == before
assert hashlib.sha256(view).hexdigest() == hashlib.sha256(file.read()).hexdigest()
print(os.getcwd(), hashlib.sha256(view).hexdigest())
"""
    with user_of(mounted, code) as user:
        listed = listings(s3)
        kill_worker(mounted)
        output, _ = user.communicate("go on\n", timeout=60)
        assert user.returncode == 0
        first = hashlib.sha256(next(iter(CONTENT.values()))).hexdigest()
        assert output.split() == [str(mounted.path), first]
        assert listings(s3) == listed, "what was listed is known"


def test_a_changed_object_is_not_mixed(mount: Callable[..., Mounted], s3: S3) -> None:
    s3.put("changing", {"m/file": bytes(MIB), "m/other": b"other"})
    mounted = mount("s3://changing/m", "--prefetch=off", "--cache-dir=none")
    assert shell("stat -c %s file", mounted.path).stdout == f"{MIB}\n"
    s3.put("changing", {"m/file": b"1" * MIB, "m/new": b"new"})
    kill_worker(mounted)
    answer = shell("cat file", mounted.path)
    assert "Stale file handle" in answer.stderr
    assert shell("cat other", mounted.path).stdout == "other"
    assert shell("ls", mounted.path).stdout == "file\nother\n", "a mount is a snapshot"


def test_large_trees_stay_as_listed(mount: Callable[..., Mounted], s3: S3) -> None:
    """A directory that was looked at stays; one that was not is listed as S3 has it then."""
    s3.put_many("wide", {f"seen/{number:04}": b"x" for number in range(1100)})
    s3.put("wide", {"unseen/a": b"a"})
    mounted = mount("s3://wide", "--prefetch=off")
    assert shell("ls seen | wc -l", mounted.path).stdout == "1100\n"
    inodes = shell("ls -i seen | sha256sum", mounted.path).stdout
    s3.put("wide", {"seen/new": b"x", "unseen/b": b"b"})
    kill_worker(mounted)
    assert shell("ls -i seen | sha256sum", mounted.path).stdout == inodes
    assert shell("ls unseen", mounted.path).stdout == "a\nb\n"


def test_upgrade_under_load(mount: Callable[..., Mounted]) -> None:
    mounted = mount("s3://survival/m", "--block-size=1MiB")
    before = mounted.worker
    with readers(mounted, 4) as started:
        time.sleep(1)
        answer = lazyfs("upgrade", mounted.path)
        assert (answer.returncode, answer.stderr) == (0, "")
        assert mounted.worker != before
        assert_right(started)
    assert "Traceback" not in mounted.log()


def test_a_detached_mount_in_use_is_still_served(mount: Callable[..., Mounted]) -> None:
    """Who still reads a mount that is in no tree any more would wait for a dead worker for ever."""
    mounted = mount("s3://survival/m", "--prefetch=off", "--cache-dir=none")
    code = """
import hashlib, mmap, os, sys
os.chdir(sys.argv[1])
files = [open(name, "rb") for name in sorted(os.listdir("."))]
print(flush=True)
sys.stdin.readline()
for file in files:
    print(hashlib.sha256(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)).hexdigest())
"""
    with user_of(mounted, code) as user:
        try:
            assert lazyfs("umount", "--lazy", mounted.path).returncode == 0
            kill_worker(mounted)
            output, _ = user.communicate("go on\n", timeout=60)
            expected = [hashlib.sha256(each).hexdigest() for each in CONTENT.values()]
            assert output.split() == expected
            wait_until_gone(mounted.pid)
        finally:
            with suppress(ProcessLookupError):
                mounted.kill(signal.SIGTERM)
    assert "ERROR" not in mounted.log()


def test_upgrade_without_a_mount(tmp_path: Path) -> None:
    answer = lazyfs("upgrade", tmp_path)
    assert answer.returncode == 1
    assert answer.stderr == f"lazyfs: {tmp_path}: no lazyfs daemon serves it\n"


def test_a_worker_keeps_serving_without_its_supervisor(mount: Callable[..., Mounted]) -> None:
    mounted = mount("s3://survival/m", "--prefetch=off")
    os.kill(mounted.pid, signal.SIGKILL)
    wait_until_gone(mounted.pid)
    assert shell("sha256sum * | wc -l", mounted.path).stdout == "3\n"
    worker = mounted.worker
    assert lazyfs("umount", mounted.path).returncode == 0
    wait_until_gone(worker)


def test_a_stale_mount_is_replaced(mount: Callable[..., Mounted]) -> None:
    """Supervisor killed, then worker: the mount is lost, and the next one takes its place."""
    mounted = mount("s3://survival/m", "--prefetch=off")
    mounted.kill_all()
    answer = subprocess.run(["ls", mounted.path], capture_output=True, text=True, timeout=60)
    assert answer.returncode != 0
    assert "not connected" in answer.stderr or "connection abort" in answer.stderr
    again = lazyfs("mount", "s3://survival/m", mounted.path, *mounted.arguments)
    assert (again.returncode, again.stderr) == (0, "")
    assert len(shell("ls", mounted.path).stdout.split()) == 3
    assert lazyfs("umount", mounted.path).returncode == 0


@pytest.fixture
def supervised(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Supervisor, KeeperClient]]:
    """A mount whose keeper is in this process, as in the CSI driver."""
    keeper = Keeper()

    def connect() -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        threading.Thread(target=keeper.serve, args=[ours], daemon=True).start()
        return theirs

    (tmp_path / "mnt").mkdir()
    options: dict[str, str | list[str]] = {"endpoint-url": s3.url, "cache-dir": "none"}
    credentials = StaticCredentials("testing", "testing")
    spec = MountSpec("s3://survival/m", str(tmp_path / "mnt"), options, credentials)
    monkeypatch.setenv("LAZYFS_RUNTIME_DIR", RUNTIME_DIRECTORY)
    supervisor = Supervisor(spec, connect, leash=True)
    supervisor.start()
    yield supervisor, KeeperClient(connect())
    supervisor.stop()
    assert not is_mounted(tmp_path / "mnt")


def test_another_protocol_is_refused(supervised: tuple[Supervisor, KeeperClient]) -> None:
    """A libfuse that answers FUSE_INIT otherwise does not go on with the session."""
    supervisor, keeper = supervised
    kept = keeper.fetch(supervisor.name)
    beginning = json.loads(read_whole(kept["session"]))
    for descriptor in kept.values():
        os.close(descriptor)
    beginning["init_answer"] = "00" + beginning["init_answer"][2:]
    keeper.store(supervisor.name, {"session": memory_file("x", json.dumps(beginning).encode())})
    opened = subprocess.Popen(["sleep", "60"], cwd=supervisor.name)
    try:
        before = supervisor.pid
        assert before is not None
        os.kill(before, signal.SIGKILL)
        wait_for(lambda: supervisor.alive and supervisor.pid != before)
        wait_for(lambda: "3" in shell(f"ls {supervisor.name} | wc -l", Path("/")).stdout)
        lost = subprocess.run(
            ["ls", f"/proc/{opened.pid}/cwd/"], capture_output=True, text=True, timeout=60
        )
        assert lost.returncode != 0, "what used the old mount is told so"
    finally:
        opened.kill()
        opened.wait(timeout=60)


def test_the_end_while_a_worker_is_replaced(
    supervised: tuple[Supervisor, KeeperClient],
) -> None:
    """What is in use is detached, by whoever comes first, and its users are told."""
    supervisor, keeper = supervised
    opened = subprocess.Popen(["sleep", "60"], cwd=supervisor.name)
    try:
        assert supervisor.pid is not None
        os.kill(supervisor.pid, signal.SIGKILL)
        supervisor.stop()
        assert not is_mounted(Path(supervisor.name))
        assert keeper.names() == []
        lost = subprocess.run(
            ["ls", f"/proc/{opened.pid}/cwd/"], capture_output=True, text=True, timeout=60
        )
        assert lost.returncode != 0
    finally:
        opened.kill()
        opened.wait(timeout=60)


def test_kills_of_starting_workers_do_not_make_readers_wait_longer_and_longer(
    supervised: tuple[Supervisor, KeeperClient], caplog: pytest.LogCaptureFixture
) -> None:
    supervisor, _ = supervised
    killed: set[int] = set()
    while len(killed) < 6:
        wait_for(lambda: supervisor.alive and supervisor.pid not in killed)
        assert supervisor.pid is not None
        killed.add(supervisor.pid)
        os.kill(supervisor.pid, signal.SIGKILL)
    wait_for(lambda: "3" in shell(f"ls {supervisor.name} | wc -l", Path("/")).stdout)
    ending = re.compile(r"another one continues(?: in ([\d.]+) s)?$")
    told = [ending.search(text) for text in caplog.messages]
    pauses = [float(found[1] or 0) for found in told if found]
    assert len(pauses) == 6 and max(pauses) == 1.0


def test_unmounting_does_not_affect_another_mount(
    supervised: tuple[Supervisor, KeeperClient],
    mount: Callable[..., Mounted],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel gives the device number of what was unmounted to the next mount."""
    supervisor, _ = supervised
    aborted: list[str] = []
    # Not everywhere is fusectl mounted, without which nothing is aborted.
    monkeypatch.setattr(mount_syscalls, "abort", aborted.append)
    worker = supervisor.pid
    assert worker is not None
    os.kill(worker, signal.SIGSTOP)
    ending = threading.Thread(target=supervisor.stop)
    ending.start()
    try:
        wait_for(lambda: not is_mounted(Path(supervisor.name)))
        entry = mount_syscalls.find_mount(mount("s3://survival/m", "--prefetch=off").path)
    finally:
        with suppress(ProcessLookupError):  # after a while it is killed
            os.kill(worker, signal.SIGCONT)
        ending.join(60)
    assert entry is not None
    assert entry.device not in aborted


LEADER = """
import os, signal, socket, sys, threading
from pathlib import Path
from lazyfs.handover.keeper import KeeperClient
from lazyfs.store.credentials import StaticCredentials
from lazyfs.process.mount_spec import MountSpec
from lazyfs.process.supervisor import Supervisor
mountpoint, keeper, endpoint = sys.argv[1:]
def connect():
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(keeper)
    return connection
options = {"endpoint-url": endpoint, "cache-dir": "none"}
spec = MountSpec("s3://survival/m", mountpoint, options, StaticCredentials("testing", "testing"))
supervisor = Supervisor(spec, connect, leash=True)
supervisor.start()
print(supervisor.pid, flush=True)
sys.stdin.read()
supervisor.stop()
"""


def test_another_process_continues_if_the_leader_dies(s3: S3, tmp_path: Path) -> None:
    """As when the CSI node plugin is restarted: the keeper, a process of its own, has it all."""
    socket_path = Path(RUNTIME_DIRECTORY) / "keeper"
    code = "import lazyfs.handover.keeper, pathlib, sys; {}(pathlib.Path(sys.argv[1]))"
    code = code.format("lazyfs.handover.keeper.Keeper().serve_at")
    keeper = subprocess.Popen([sys.executable, "-c", code, socket_path])
    wait_for(socket_path.is_socket)
    (tmp_path / "mnt").mkdir()

    def lead() -> tuple[subprocess.Popen[str], int]:
        leader = subprocess.Popen(
            [sys.executable, "-c", LEADER, tmp_path / "mnt", socket_path, s3.url],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip
        assert leader.stdout is not None
        return leader, int(leader.stdout.readline())

    leader, worker = lead()
    try:
        user = subprocess.Popen(["sleep", "60"], cwd=tmp_path / "mnt")
        leader.kill()
        leader.communicate(timeout=60)
        wait_until_gone(worker)
        leader, worker = lead()
        assert shell(f"ls /proc/{user.pid}/cwd/ | wc -l", Path("/")).stdout == "3\n"
        user.kill()
        user.wait(timeout=60)
        leader.communicate("", timeout=60)
        assert leader.returncode == 0
        assert not is_mounted(tmp_path / "mnt")
    finally:
        leader.kill()
        leader.wait(timeout=60)
        keeper.kill()
        keeper.wait(timeout=60)
        shell(f"umount -l {tmp_path}/mnt", Path("/"))
