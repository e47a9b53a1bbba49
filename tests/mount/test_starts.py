"""Failed starts leave nothing, and no request ends one worker after another."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mounting import (
    Mounted,
    descriptors,
    environment,
    is_mounted,
    lazyfs,
    shell,
    wait_for_log,
    wait_until_gone,
    workers,
)
from s3 import S3

pytestmark = pytest.mark.fuse


@pytest.fixture(scope="module", autouse=True)
def bucket(server: S3) -> None:
    server.put("faults", {"m/file": b"content", "m/big": bytes(20 << 20)})


def kill_worker(mounted: Mounted, number: signal.Signals) -> None:
    """Kill the worker with a signal, and wait until another one serves."""
    before = mounted.log().count("resumed s3://")
    worker = mounted.worker
    os.kill(worker, number)
    wait_until_gone(worker)
    mounted.wait_for_log("resumed s3://", before + 1)
    time.sleep(0.5)  # the kernel asks it again


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_request_that_ends_workers(
    mount: Callable[..., Mounted], s3: S3, number: signal.Signals
) -> None:
    """It is answered by the third one; where somebody killed them from outside it is served."""
    mounted = mount("s3://faults/m", "--prefetch=off", "--cache-dir=none")
    s3.fault("GET /faults/m/big", "status", status=503, code="SlowDown", times=100_000)
    reader = subprocess.Popen(
        ["cat", mounted.path / "big"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        time.sleep(1)
        for _ in range(2):
            assert reader.poll() is None, "it waits"
            kill_worker(mounted, number)
        if number == signal.SIGSEGV:
            _, complaint = reader.communicate(timeout=60)
            assert "Input/output error" in complaint
            mounted.wait_for_log("workers died on this request")
        else:
            assert reader.poll() is None, "it waits"
        assert shell("cat file", mounted.path).stdout == "content"
        s3.forget()
        if number == signal.SIGKILL:
            reader.communicate(timeout=60)
            assert reader.returncode == 0
        else:  # an orderly end forgets what was refused
            assert lazyfs("upgrade", mounted.path).returncode == 0
            assert shell("cat big | wc -c", mounted.path).stdout.strip() == str(20 << 20)
    finally:
        reader.kill()
        reader.communicate(timeout=60)


@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.05, 0.1])
def test_a_worker_that_is_killed_while_it_starts(s3: S3, tmp_path: Path, delay_s: float) -> None:
    """Right after the mount is there, or a little later: nothing dead is left."""
    path = tmp_path / "mnt"
    path.mkdir()
    options = [f"--endpoint-url={s3.url}", "--cache-dir=none", f"--log-file={tmp_path}/log"]
    command = [sys.executable, "-m", "lazyfs", "mount", "s3://faults/m", str(path), *options]
    mounting = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    worker = 0
    while not is_mounted(path):
        assert mounting.poll() is None
        worker = worker or next((pid for pid, words in workers() if str(path) in words), 0)
    time.sleep(delay_s)
    os.kill(worker, signal.SIGKILL)
    _, complaint = mounting.communicate(timeout=60)
    if mounting.returncode == 0:  # it was ready before that
        assert shell("cat file", path).stdout == "content"
        assert lazyfs("umount", path).returncode == 0
    else:
        assert "SIGKILL" in complaint and complaint.count("\n") == 1
    assert not is_mounted(path)
    assert lazyfs("status").stdout == ""


def test_an_interrupted_command_leaves_no_mount(s3: S3, tmp_path: Path) -> None:
    """Ctrl-C while S3 does not answer."""
    path = tmp_path / "mnt"
    path.mkdir()
    s3.fault(r"GET /faults", "hang", seconds=2)
    options = [f"--endpoint-url={s3.url}", "--cache-dir=none", f"--log-file={tmp_path}/log"]
    command = [sys.executable, "-m", "lazyfs", "mount", "s3://faults/m", str(path), *options]
    mounting = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)

    def wait_for_worker(*, running: bool) -> None:
        until_s = time.monotonic() + 60
        while any(str(path) in words for _, words in workers()) is not running:
            assert time.monotonic() < until_s
            time.sleep(0.05)

    wait_for_worker(running=True)
    mounting.send_signal(signal.SIGINT)
    _, complaint = mounting.communicate(timeout=60)
    assert (mounting.returncode, complaint.strip()) == (130, "")
    wait_for_worker(running=False)
    assert not is_mounted(path)
    assert lazyfs("status").stdout == ""


def test_a_runtime_directory_with_a_long_path(s3: S3, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    directory = tmp_path / ("x" * (103 - len(str(tmp_path)) - 1))
    answer = lazyfs(
        "mount", "s3://faults/m", tmp_path / "mnt", f"--endpoint-url={s3.url}",
        "--cache-dir=none", f"--log-file={tmp_path}/log",
        env=environment(LAZYFS_RUNTIME_DIR=str(directory)),
    )  # fmt: skip
    assert answer.returncode == 1
    assert "too long for sockets" in answer.stderr and "LAZYFS_RUNTIME_DIR" in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert not is_mounted(tmp_path / "mnt")


def test_an_upgrade_is_no_death(mount: Callable[..., Mounted]) -> None:
    mounted = mount("s3://faults/m", "--prefetch=off")
    before = descriptors(mounted.pid)
    for _ in range(3):
        worker = mounted.worker
        assert lazyfs("upgrade", mounted.path).returncode == 0
        assert mounted.worker != worker
    assert restarts(mounted) == 0
    assert "WARNING" not in mounted.log()
    assert descriptors(mounted.pid) <= before
    kill_worker(mounted, signal.SIGKILL)
    assert restarts(mounted) == 1


def restarts(mounted: Mounted) -> int:
    status = json.loads(lazyfs("status", "--json", mounted.path).stdout)
    return int((status[0] if isinstance(status, list) else status)["restarts"])


def test_many_descriptors_in_the_supervisor(tmp_path: Path, s3: S3) -> None:
    """A node plugin has thousands; its watchers must see a worker die all the same."""
    path = tmp_path / "mnt"
    path.mkdir()
    code = f"""
import os, resource, signal, socket, threading, time
from lazyfs.handover.keeper import Keeper
from lazyfs.process.mount_spec import MountSpec
from lazyfs.process.supervisor import Supervisor
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
keeper = Keeper()
def connect():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    threading.Thread(target=keeper.serve, args=[ours], daemon=True).start()
    return theirs
for _ in range(1100):
    os.dup(0)
options = {{"endpoint-url": {s3.url!r}, "cache-dir": "none"}}
spec = MountSpec("s3://faults/m", {str(path)!r}, options)
supervisor = Supervisor(spec, connect, leash=True)
supervisor.start()
before = supervisor.pid
os.kill(before, signal.SIGKILL)
until = time.monotonic() + 60
while supervisor.pid == before or not supervisor.alive or supervisor.trouble:
    assert time.monotonic() < until
    time.sleep(0.05)
supervisor.stop()
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment(), timeout=120, check=False
    )
    assert answer.returncode == 0
    assert not is_mounted(path)


@pytest.mark.parametrize("limits", ["-Sn 64", "-n 256", "-n 64"])
def test_few_open_files(s3: S3, tmp_path: Path, limits: str) -> None:
    """A low soft limit is raised; a low hard one means fewer requests at once, or a refusal."""
    shards = {f"few/model-{n:05}-of-00060.safetensors": os.urandom(300_000) for n in range(1, 61)}
    s3.put("descriptors", shards)
    (tmp_path / "mnt").mkdir()
    mount = (
        f"ulimit {limits}; exec {sys.executable} -m lazyfs mount s3://descriptors/few "
        f"{tmp_path}/mnt --endpoint-url={s3.url} --cache-dir={tmp_path}/cache "
        f"--log-file={tmp_path}/log --block-size=256KiB"
    )
    answer = subprocess.run(
        ["bash", "-c", mount], env=environment(), capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    if limits == "-n 64":
        assert answer.returncode == 1
        assert "only 64 open files are allowed here" in answer.stderr
        assert answer.stderr.count("\n") == 1 and not is_mounted(tmp_path / "mnt")
        return
    assert answer.returncode == 0, answer.stderr
    try:
        if limits == "-n 256":
            wait_for_log((tmp_path / "log").read_text, "requests at once instead of")
        wanted = hashlib.sha256(b"".join(content for _, content in sorted(shards.items())))
        seen = shell("cat * | sha256sum", tmp_path / "mnt").stdout
        assert seen.split()[0] == wanted.hexdigest()
        log = (tmp_path / "log").read_text()
        assert "Too many open files" not in log
        assert ("requests at once instead of" in log) is (limits == "-n 256")
        if limits == "-n 256":
            more = lazyfs("set", tmp_path / "mnt", "max-concurrency=64")
            assert more.returncode == 2
            assert "max-concurrency: 64 is too many for the files" in more.stderr
            assert lazyfs("set", tmp_path / "mnt", "max-concurrency=8").returncode == 0
    finally:
        assert lazyfs("umount", tmp_path / "mnt").returncode == 0
