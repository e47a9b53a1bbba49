"""What a worker loads with trio and botocore, and what does not end it."""

import fcntl
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import trio

from lazyfs.errors import MountError
from lazyfs.helper_process import HelperProcesses
from lazyfs.listed_object import File
from lazyfs.pagecache.walker import Walker
from lazyfs.process import worker_process
from lazyfs.process.mount_helpers import LOOK_UP, MountHelpers
from lazyfs.process.privileges import Rights
from lazyfs.process.worker_channel import SupervisorChannel, WorkerChannel
from lazyfs.process.worker_files import rights_for
from lazyfs.process.worker_process import next_pause_s, wait_for_end, was_told_to_end
from lazyfs.user import worker_ids

# In a process of its own: botocore looks for awscrt once.
IMPORT = """
import sys
import lazyfs.store.boto
from botocore.compat import EC
print(EC is not None, "_awscrt" in sys.modules)
from awscrt import checksums  # what verifies whole objects can have it
"""


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("[default]\nregion = eu-west-1\n", "False False"),
        ("[profile me]\nlogin_session = arn:aws:sts::1:assumed-role/me\n", "True True"),
        (None, "False False"),
    ],
)
def test_loads_awscrt_only_for_profiles_of_aws_login(tmp_path, config, expected):
    path = tmp_path / "config"
    if config is not None:
        path.write_text(config)
    said = subprocess.run(
        [sys.executable, "-c", IMPORT], env={"AWS_CONFIG_FILE": str(path)},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert said.stdout.strip() == expected


@pytest.mark.parametrize(
    ("state", "pending", "expected"),
    [
        ("S", 0, False),
        ("D", 0, False),
        ("D", 1 << signal.SIGTERM - 1, False),
        ("D", 1 << signal.SIGKILL - 1, True),
        ("S", 1 << signal.SIGKILL - 1, False),  # it is about to end
        ("Z", 0, True),
        (None, 0, True),
    ],
)
def test_a_process_never_runs_again(monkeypatch, state, pending, expected):
    status = [] if state is None else [state, "1"]
    monkeypatch.setattr(worker_process, "_status", lambda pid: status)
    monkeypatch.setattr(worker_process, "_field", lambda pid, name: f"{pending:016x}")
    assert worker_process.is_over(5) is expected


def test_a_process_that_waits_for_a_disk_is_named(monkeypatch):
    """A process that waits for one that it has forked without a copy is in the same state."""
    code = """
import ctypes, os, time
libc = ctypes.CDLL(None)
if libc.vfork() == 0:
    time.sleep(600)
"""
    waiting = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        until = time.monotonic() + 60
        while not (said := worker_process.stuck_of(waiting.pid)):
            assert time.monotonic() < until
        assert said == [
            f"process {waiting.pid} waits for a disk and cannot be killed; "
            "it ends when the disk answers"
        ]
    finally:
        os.killpg(waiting.pid, signal.SIGKILL)
        waiting.wait()
    assert worker_process.stuck_of(waiting.pid) == []
    assert worker_process.is_over(waiting.pid)


def test_serves_on_where_no_process_can_be_started(monkeypatch, caplog):
    """As in a container whose number of processes is limited."""
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    helpers = MountHelpers(Path("/mnt"), os.getuid(), lambda: True)
    serving = threading.Thread(target=helpers.serve, args=[theirs])
    serving.start()

    async def look_up():
        async with trio.open_nursery() as nursery:
            walker = Walker(lambda file: file.name, HelperProcesses(ours), nursery)
            walker.look_up([File(2, 1, "f", "f", 1, "e", 0)])

    trio.run(look_up)
    ours.close()
    serving.join(timeout=30)
    assert "/nonexistent" in caplog.text


def test_serves_on_without_a_supervisor(caplog):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()

    async def look_up():
        async with trio.open_nursery() as nursery:
            walker = Walker(lambda file: file.name, HelperProcesses(ours), nursery)
            walker.look_up([File(2, 1, "f", "f", 1, "e", 0)])

    trio.run(look_up)
    assert "cannot be looked up ahead" in caplog.text


def test_helpers_stay_below_the_mountpoint(tmp_path):
    """What a worker asks for may have been chosen by somebody who took it over."""
    (tmp_path / "mnt/in").mkdir(parents=True)
    (tmp_path / "mnt/in/file").write_bytes(b"x" * 5000)
    (tmp_path / "outside").write_bytes(b"x" * 5000)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    helpers = MountHelpers(tmp_path / "mnt", os.getuid(), lambda: True)
    serving = threading.Thread(target=helpers.serve, args=[theirs])
    serving.start()
    # Not in memory is what they say of a hole; and nothing, of what they may not look at.
    with (tmp_path / "mnt/in/hole").open("wb") as hole:
        hole.truncate(1 << 20)
    with (tmp_path / "hole").open("wb") as hole:
        hole.truncate(1 << 20)
    os.mkfifo(tmp_path / "mnt/in/pipe")

    def asked(path, real):
        return [str(path), real.stat().st_ino, [[0, 4096]]]

    wanted = [
        asked("in/hole", tmp_path / "mnt/in/hole"),
        asked("../hole", tmp_path / "hole"),
        asked(tmp_path / "hole", tmp_path / "hole"),
        # Links, with which the filesystem of a worker that was taken over can answer.
        asked("in/link", tmp_path / "hole"),
        asked("out/hole", tmp_path / "hole"),
        asked("in/pipe", tmp_path / "mnt/in/pipe"),
    ]
    (tmp_path / "mnt/in/link").symlink_to(tmp_path / "hole")
    (tmp_path / "mnt/out").symlink_to(tmp_path)
    found = trio.run(HelperProcesses(ours).run, "dropped", json.dumps(wanted).encode())
    assert json.loads(found) == [[0], [], [], [], [], []]
    assert trio.run(HelperProcesses(ours).run, "another", b"") == b""
    ours.close()
    serving.join(timeout=30)


def test_a_worker_runs_no_program_to_load_trio():
    """That would be ldconfig(8), for the names of threads."""
    code = (
        "import subprocess\n"
        "from lazyfs.process.worker import _without_ldconfig\n"
        "def refuse(*_, **__): raise AssertionError\n"
        "subprocess.Popen = refuse\n"
        "with _without_ldconfig():\n"
        "    import trio\n"
        "async def main():\n"
        "    name = lambda: open('/proc/thread-self/comm').read()\n"
        "    print(await trio.to_thread.run_sync(name, thread_name='named'))\n"
        "trio.run(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "named", done.stderr


@pytest.mark.parametrize(
    ("directories", "is_inside"),
    [("", True), ("in", True), ("\0in/deep\0", True), ("out", False), ("in/out", False),
     ("..", False), ("in/../..", False)],
)  # fmt: skip
def test_names_are_looked_up_below_the_mountpoint(tmp_path, directories, is_inside):
    """`out` and `in/out` are links out of the mount."""
    (tmp_path / "mnt/in/deep").mkdir(parents=True)
    (tmp_path / "mnt/out").symlink_to("/etc")
    (tmp_path / "mnt/in/out").symlink_to(tmp_path)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", LOOK_UP, tmp_path / "mnt"],
        input=directories.encode(), capture_output=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode == 0) == is_inside, done.stderr


@pytest.mark.usefixtures("for_all")
def test_a_worker_gets_the_rights_that_its_files_need(monkeypatch):
    if worker_ids() is None:
        pytest.skip("needs root")
    place = Path(tempfile.mkdtemp())
    monkeypatch.setenv("AWS_CONFIG_FILE", str(place / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setattr(sys, "path", ["/"])

    def rights(*cache, **more):
        return rights_for(map(Path, cache), **{"uses_own_credentials": True, **more})

    cache = place / "cache"
    try:
        assert rights(cache) is Rights.READ_ALL_FILES  # of root alone
        assert rights() is Rights.NONE
        place.chmod(0o755)
        assert rights(cache, place / "another") is Rights.NONE
        assert rights(cache, "/root/x") is Rights.READ_ALL_FILES
        (place / "config").write_text("[default]")
        (place / "config").chmod(0o644)
        # It may name files that others cannot read.
        assert rights(cache) is Rights.READ_ALL_FILES
        assert rights(cache, uses_own_credentials=False) is Rights.NONE
        (place / "ca.pem").touch(0o600)
        bundled = rights(cache, uses_own_credentials=False, ca_bundle=place / "ca.pem")
        assert bundled is Rights.READ_ALL_FILES
        (place / "config").chmod(0o600)
        assert rights(cache, uses_own_credentials=False) is Rights.READ_ALL_FILES
    finally:
        shutil.rmtree(place)


def test_serves_on_if_its_readiness_report_is_lost():
    """Its supervisor was killed while it began."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    SupervisorChannel(ours).ready("1", 0)


def test_says_why_it_cannot_mount_when_its_supervisor_is_gone():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    with pytest.raises(MountError, match="supervisor"):
        SupervisorChannel(ours).mount("s3://b", allow_other=False, read_ahead_bytes=0)


def test_a_line_beyond_the_1023rd_descriptor():
    """A node plugin has some hundred volumes, each with several descriptors."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    high = socket.socket(fileno=fcntl.fcntl(theirs.detach(), fcntl.F_DUPFD_CLOEXEC, 1500))
    channel = WorkerChannel(high)
    assert channel.receive(time.monotonic()) is None
    SupervisorChannel(ours).refuse("no " * 100_000, 2, "OptionError")
    said = channel.receive(time.monotonic() + 5)
    assert said is not None and said["error"].startswith("no no") and said["exit_code"] == 2
    ours.close()
    assert channel.receive(time.monotonic() + 5) == {}
    high.close()


def test_a_worker_that_was_told_to_end_did_not_die():
    ends = {"exit": 0, "kill -TERM $$": 0, "exit 1": 1, "kill -SEGV $$": 1, "kill -KILL $$": 1}
    for command, died in ends.items():
        code = subprocess.run(["bash", "-c", command], check=False).returncode
        assert was_told_to_end(code) is not bool(died), command


def test_the_end_of_a_worker_is_noticed_at_once(monkeypatch):
    """`lazyfs umount` waits for it."""
    monkeypatch.setattr(worker_process, "POLL_S", 3600)
    code = "import signal, time; signal.alarm(1); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code]) as worker:
        assert wait_for_end(worker) == -signal.SIGALRM


@pytest.mark.parametrize("killed", [True, False])
def test_the_pause_before_the_next_worker_is_short_or_a_small_part_of_the_outage(killed):
    """`killed`: from outside. Otherwise workers refuse to start, for as long as something fails."""
    now_s = pause_s = 0.0
    for _ in range(200):
        pause_s = next_pause_s(pause_s, None if killed else now_s)
        assert pause_s <= (1.0 if killed else max(4.0, now_s / 10) + 1e-9)
        now_s += pause_s + 0.5
    assert pause_s == (1.0 if killed else 30.0)
