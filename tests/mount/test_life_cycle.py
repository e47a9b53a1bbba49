"""Mounts start and end without leaving anything."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mounting import (
    RUNTIME_DIRECTORY,
    Mounted,
    descriptors,
    environment,
    is_mounted,
    lazyfs,
    shell,
    supervisor_pid,
    wait_until_gone,
    worker_pid,
)
from s3 import S3

pytestmark = pytest.mark.fuse


@pytest.fixture(scope="module", autouse=True)
def bucket(server: S3) -> None:
    server.put("life", {"m/file": b"content", "m/big": bytes(20 << 20)})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("busy", [False, True])
def test_signals_unmount(mount: Callable[..., Mounted], number: signal.Signals, busy: bool) -> None:
    mounted = mount("s3://life/m")
    code = "import sys, time; f = open(sys.argv[1]); f.read(1); print(flush=True); time.sleep(60)"
    reader = subprocess.Popen(
        [sys.executable, "-c", code, mounted.path / "file"], stdout=subprocess.PIPE
    )
    assert reader.stdout is not None
    try:
        reader.stdout.readline()
        if not busy:
            reader.kill()
            reader.wait(timeout=60)
        mounted.kill(number)
        wait_until_gone(mounted.pid)
        assert not is_mounted(mounted.path)
        mounted.wait_for_log("unmounted")
        assert "Traceback" not in mounted.log()
    finally:
        reader.kill()
        reader.wait(timeout=60)
        reader.stdout.close()


def test_a_background_mount_keeps_no_descriptors_of_the_command(s3: S3, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    ours, theirs = os.pipe()
    command = [sys.executable, "-m", "lazyfs", "mount", "s3://life/m", str(tmp_path / "mnt"),
               f"--endpoint-url={s3.url}", f"--cache-dir={tmp_path}/cache",
               f"--log-file={tmp_path}/log"]  # fmt: skip
    # Both outputs are read to their end, which comes when the last process has closed them.
    answer = subprocess.run(
        command, env=environment(), cwd=tmp_path, pass_fds=[theirs], start_new_session=True,
        capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    try:
        os.close(theirs)
        assert (answer.stdout, answer.stderr) == (b"", b"")
        assert os.read(ours, 1) == b""
        worker = worker_pid(tmp_path / "mnt")
        for pid in (worker, supervisor_pid(tmp_path / "mnt")):
            assert os.getsid(pid) == pid
            assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
            assert Path(f"/proc/{pid}/fd/0").readlink() == Path("/dev/null")
            assert Path(f"/proc/{pid}/fd/2").readlink() == tmp_path / "log"
    finally:
        os.close(ours)
        lazyfs("umount", tmp_path / "mnt")


@pytest.mark.parametrize(
    "arguments",
    [
        ["s3://life/m", "{mnt}", "--block-size=7"],
        ["s3://life/m", "{mnt}", "one too many"],
        ["s3://life/m", "--block-size=7", "{mnt}"],
    ],
)
def test_a_wrong_command_leaves_no_process(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "mnt").mkdir()
    answer = lazyfs("mount", *(text.format(mnt=tmp_path / "mnt") for text in arguments))
    assert answer.returncode == 2
    assert answer.stderr.count("\n") == 1
    with pytest.raises(AssertionError, match="no worker"):
        worker_pid(tmp_path / "mnt")


def test_arguments_in_another_order(s3: S3, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "link").symlink_to("mnt")
    for arguments in (["--cache-dir=none", "s3://life/m", "link"],
                      ["s3://life/m", "--cache-dir=none", "link/."]):  # fmt: skip
        answer = subprocess.run(
            [sys.executable, "-m", "lazyfs", "mount", f"--endpoint-url={s3.url}", *arguments,
             f"--log-file={tmp_path}/log"],
            env=environment(), cwd=tmp_path, capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        assert (answer.returncode, answer.stderr) == (0, b"")
        assert shell("cat mnt/file", tmp_path).stdout == "content"
        assert lazyfs("umount", tmp_path / "mnt").returncode == 0


def test_foreground_exits_with_zero(s3: S3, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "lazyfs", "mount", "-f", "s3://life/m", str(tmp_path / "mnt"),
         f"--endpoint-url={s3.url}", f"--cache-dir={tmp_path}/cache", "--log-format=json"],
        env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not is_mounted(tmp_path / "mnt"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    assert shell("cat mnt/file", tmp_path).stdout == "content"
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    lines = [json.loads(line) for line in log.splitlines()]
    assert {"mounted", "served", "unmounted"} <= {line["message"].split()[0] for line in lines}
    assert all(line["mountpoint"] == str(tmp_path / "mnt") for line in lines)
    assert not any("volume" in line for line in lines)
    assert not is_mounted(tmp_path / "mnt")


def test_a_service_manager_is_notified_of_a_mount_from_a_file(s3: S3, tmp_path: Path) -> None:
    """As systemd starts it (Type=notify), with everything in a file."""
    (tmp_path / "mnt").mkdir()
    config = tmp_path / "life.toml"
    config.write_text(
        f'source = "s3://life/m"\nmountpoint = "{tmp_path}/mnt"\nendpoint-url = "{s3.url}"\n'
        f'cache-dir = "{tmp_path}/cache"\n'
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(60)
        manager.bind(str(tmp_path / "notify"))
        process = subprocess.Popen(
            [sys.executable, "-m", "lazyfs", "mount", "-f", "--config", str(config)],
            env=environment(NOTIFY_SOCKET=str(tmp_path / "notify")), stderr=subprocess.DEVNULL,
        )  # fmt: skip
        ready = manager.recv(4096).decode().splitlines()
        assert ready == ["READY=1", f"STATUS=Serving s3://life/m at {tmp_path}/mnt"]
        assert shell("cat mnt/file", tmp_path).stdout == "content"
        assert lazyfs("upgrade", "--config", config).returncode == 0
        assert shell("cat mnt/file", tmp_path).stdout == "content"
        process.send_signal(signal.SIGTERM)
        assert manager.recv(4096) == b"STOPPING=1"
        assert process.wait(20) == 0


def test_umount_after_sigkill_of_all(mount: Callable[..., Mounted]) -> None:
    mounted = mount("s3://life/m")
    assert shell("cat file", mounted.path).stdout == "content"
    mounted.kill_all()
    assert is_mounted(mounted.path)
    answer = lazyfs("umount", mounted.path)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert not is_mounted(mounted.path)


def test_umount_of_a_busy_mount(mount: Callable[..., Mounted]) -> None:
    mounted = mount("s3://life/m")
    user = subprocess.Popen(["sleep", "60"], cwd=mounted.path)
    try:
        answer = lazyfs("umount", mounted.path)
        assert answer.returncode == 1
        assert "in use" in answer.stderr and "--lazy" in answer.stderr
        assert shell("cat file", mounted.path).stdout == "content"
        assert lazyfs("umount", "--lazy", mounted.path).returncode == 0
        assert not is_mounted(mounted.path)
    finally:
        user.kill()
        user.wait(timeout=60)
    wait_until_gone(mounted.pid)


def test_umount_while_a_read_waits_for_s3(mount: Callable[..., Mounted], s3: S3) -> None:
    mounted = mount("s3://life/m", "--prefetch=off")
    s3.fault("GET /life/m/big", "status", status=503, code="SlowDown", times=100_000)
    reader = subprocess.Popen(["cat", mounted.path / "big"], stdout=subprocess.DEVNULL)
    try:
        time.sleep(1)
        assert reader.poll() is None, "it waits"
        assert lazyfs("umount", "--lazy", mounted.path).returncode == 0
        mounted.kill(signal.SIGTERM)
        wait_until_gone(mounted.pid)
        assert reader.wait(timeout=60) == 1
    finally:
        reader.kill()
        reader.wait(timeout=60)


def test_umount_of_other_things(tmp_path: Path) -> None:
    assert "nothing is mounted" in lazyfs("umount", tmp_path).stderr
    assert "not lazyfs" in lazyfs("umount", "/proc").stderr


def test_repeated_mounts_leave_nothing(mount: Callable[..., Mounted], tmp_path: Path) -> None:
    before = set(Path(RUNTIME_DIRECTORY).iterdir())
    for _ in range(3):
        mounted = mount("s3://life/m")
        assert shell("cat big | wc -c", mounted.path).stdout.strip() == str(20 << 20)
        mounted.end()
    assert set(Path(RUNTIME_DIRECTORY).iterdir()) == before


def test_descriptors_do_not_grow(mount: Callable[..., Mounted]) -> None:
    mounted = mount("s3://life/m", "--page-cache=off", "--memory-limit=64MiB", "--block-size=1MiB")
    read = "for i in 1 2 3 4 5; do dd if=big of=/dev/null bs=1M iflag=direct status=none; done"
    shell(read, mounted.path)
    before = descriptors(mounted.worker)
    shell(read, mounted.path)
    shell(read, mounted.path)
    assert descriptors(mounted.worker) <= before + 2


def test_an_ordinary_user_mounts_through_fusermount3(s3: S3) -> None:
    """In a mount namespace of its own, in which everyone may open /dev/fuse, as is usual."""
    if os.geteuid() != 0:
        pytest.skip("every other test here is this one when not run by root")
    home = Path("/tmp") / f"lazyfs-test-{os.getpid()}"
    home.mkdir(mode=0o755)
    os.chown(home, 65534, 65534)
    env = environment(HOME=str(home), LAZYFS_RUNTIME_DIR=f"{home}/run")
    lazy = f"{sys.executable} -m lazyfs"
    user = "setpriv --reuid=65534 --regid=65534 --clear-groups bash -ec"
    session = f"""
        mkdir {home}/mnt; cd /
        {lazy} mount s3://life/m {home}/mnt --endpoint-url={s3.url}
        cat {home}/mnt/file; echo; grep {home}/mnt /proc/mounts
        {lazy} upgrade {home}/mnt
        cat {home}/mnt/file; echo
        {lazy} umount {home}/mnt
        grep {home}/mnt /proc/mounts || echo nothing is left; ls -d {home}/.cache/lazyfs
    """
    prepare = f"mknod -m 666 {home}/fuse c 10 229 && mount --bind {home}/fuse /dev/fuse"
    try:
        answer = subprocess.run(
            ["unshare", "--mount", "bash", "-ec", f"{prepare}; {user} '{session}'"],
            env=env, capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip
        if "No module named" in answer.stderr or "Permission denied: bash" in answer.stderr:
            pytest.skip("this interpreter cannot be read by an ordinary user")
        assert answer.returncode == 0, answer.stderr
        lines = answer.stdout.splitlines()
        assert lines[0] == "content"
        assert lines[1].startswith(f"s3://life/m {home}/mnt fuse.lazyfs ro,nosuid,nodev")
        assert lines[2].startswith(f"{home}/mnt: ")
        assert lines[3:] == ["content", "nothing is left", f"{home}/.cache/lazyfs"]
    finally:
        subprocess.run(["rm", "-rf", "--one-file-system", str(home)], check=True)


def test_mount_helper(s3: S3, tmp_path: Path) -> None:
    """As mount(8) calls it for `mount -t lazyfs` and for fstab."""
    (tmp_path / "mnt").mkdir()
    options = f"ro,nofail,_netdev,x-systemd.automount,endpoint-url={s3.url},cache_dir={tmp_path}/c"
    options += f",block-size=1MiB,log-file={tmp_path}/log,allow_other"
    code = "import lazyfs.cli.fstab as f; f.main()"
    answer = subprocess.run(
        [sys.executable, "-c", code, "s3://life/m", str(tmp_path / "mnt"), "-o", options],
        env=environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    try:
        assert shell("cat mnt/file", tmp_path).stdout == "content"
        mounts = Path("/proc/mounts").read_text()
        line = next(line for line in mounts.splitlines() if str(tmp_path) in line)
        assert line.startswith(f"s3://life/m {tmp_path}/mnt fuse.lazyfs ro,nosuid,nodev")
        assert "allow_other" in line
    finally:
        assert lazyfs("umount", tmp_path / "mnt").returncode == 0
