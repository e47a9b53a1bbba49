"""The rights of a mount's processes, and what a crash reveals."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounting import Mounted, shell
from s3 import S3

from lazyfs.process import privileges

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0, reason="others have no rights to give up"),
]
DAC_READ_SEARCH = 1 << 2
CAPABILITIES = ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")


@pytest.fixture(scope="module", autouse=True)
def bucket(server: S3) -> None:
    shards = {f"m/model-{n:05}-of-00004.safetensors": os.urandom(4 << 20) for n in range(1, 5)}
    server.put("rights", {"m/config.json": b"{}", **shards})


@pytest.fixture
def open_cache() -> Iterator[Path]:
    """A cache below directories that all users can pass, as /var/cache is.

    Tests name it before `mount`, so that mounts end before it is removed.
    """
    directory = Path(tempfile.mkdtemp(prefix="lazyfs-"))
    directory.chmod(0o755)
    yield directory / "cache"
    shutil.rmtree(directory)


def statuses(pid: int) -> Iterator[dict[str, str]]:
    """What the kernel says of each thread of a process (proc(5), status)."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        text = (task / "status").read_text()
        yield dict(re.findall(r"^(\w+):\s*(.*)$", text, re.MULTILINE))


def uid_of(pid: int) -> int:
    return int(next(statuses(pid))["Uid"].split()[0])


@contextlib.contextmanager
def watched(mountpoint: str) -> Iterator[list[dict[str, str]]]:
    """The status of each thread of each process that is a worker's or was forked from one."""
    seen: list[dict[str, str]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            for process in Path("/proc").iterdir():
                if process.name.isdigit():
                    with contextlib.suppress(OSError):
                        words = (process / "cmdline").read_bytes().split(b"\0")
                        if b"lazyfs.process.worker" in words and mountpoint.encode() in words:
                            seen.extend(statuses(int(process.name)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


def descendants(pid: int) -> Iterator[int]:
    """The processes that a process has started, and those that they have."""
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            yield child
            yield from descendants(child)


def check(status: dict[str, str], allowed: int = 0) -> None:
    assert set(status["Uid"].split()) == set(status["Gid"].split()), status
    assert int(status["Uid"].split()[0]) >= 61184, status
    for name in CAPABILITIES:
        assert not int(status[name], 16) & ~allowed, status
    assert status["NoNewPrivs"] == "1", status
    assert status["Seccomp"] == "2", status


@pytest.mark.usefixtures("for_all")
def test_no_process_of_a_mount_has_rights(
    open_cache: Path, mount: Callable[..., Mounted], tmp_path: Path
) -> None:
    """From the first instruction on: worker and probe, during a load, and the next worker."""
    with watched(str(tmp_path)) as seen:
        mounted = mount("s3://rights/m", f"--cache-dir={open_cache}", "--block-size=256KiB")
    with watched(str(mounted.path)) as later:
        shell("cat * | wc -c", mounted.path)
        os.kill(mounted.worker, signal.SIGKILL)
        # It asks the next worker: nothing is known of such a name.
        shell("ls nothing; cat * | wc -c", mounted.path)
    found = [*seen, *later, *statuses(mounted.worker)]
    assert len({status["Tgid"] for status in found}) > 2, "two workers and a probe"
    assert "lazyfs-probe" in {status["Name"] for status in found}
    for status in found:
        check(status)
    # Its files are shared with other workers of root, and with nobody else.
    for path in (open_cache, *open_cache.rglob("*")):
        assert path.stat().st_mode & 0o007 == 0
        assert path.stat().st_gid >= 61184


@pytest.mark.usefixtures("for_all")
@pytest.mark.parametrize("is_private", [False, True])
def test_processes_that_move_bytes_have_the_rights_of_the_worker(
    open_cache: Path, mount: Callable[..., Mounted], tmp_path: Path, s3: S3, is_private: bool
) -> None:
    """Of a worker without any, and of one whose cache only root can reach."""
    s3.fault("GET /rights/m/", "slow", times=10**6, seconds=0.05)
    cache = tmp_path / "cache" if is_private else open_cache
    mounted = mount("s3://rights/m", f"--cache-dir={cache}", "--movers=2", "--block-size=1MiB")
    shell("cat * | wc -c", mounted.path)
    movers: dict[int, list[dict[str, str]]] = {}

    def are_there() -> bool:  # they stay for half a minute
        for pid in descendants(mounted.worker):
            if b"lazyfs.movers.process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                movers[pid] = list(statuses(pid))
        return len(movers) == 2

    until_s = time.monotonic() + 60
    while not are_there():
        assert time.monotonic() < until_s
        time.sleep(0.05)
    allowed = DAC_READ_SEARCH if is_private else 0
    has = ("Uid", "Gid", "Groups", "Seccomp", "NoNewPrivs", *CAPABILITIES)
    (worker,) = {tuple(status[name] for name in has) for status in statuses(mounted.worker)}
    for each in movers.values():
        for status in each:
            check(status, allowed)
            assert tuple(status[name] for name in has) == worker


def test_what_a_worker_holds_gives_no_power_over_root(
    open_cache: Path, mount: Callable[..., Mounted]
) -> None:
    """If it is taken over: not the record, by which root signals processes, nor the spec."""
    mounted = mount("s3://rights/m", f"--cache-dir={open_cache}")
    worker = Path(f"/proc/{mounted.worker}")
    found = set()
    for link in (worker / "fd").iterdir():
        try:
            target = str(link.readlink())
            info = (worker / "fdinfo" / link.name).read_text()
        except FileNotFoundError:
            continue  # it was closed just now
        flags = int(re.findall(r"flags:\t(\d+)", info)[0], 8)
        if target.endswith(".json"):
            found.add("record")
            assert flags & os.O_ACCMODE == os.O_RDONLY, target
        elif "lazyfs-spec" in target:
            found.add("spec")
            with link.open("rb") as spec:
                assert fcntl.fcntl(spec, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
    assert found == {"record", "spec"}
    # The kernel follows no link with which it could answer.
    line = next(
        line for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if line.split()[4] == str(mounted.path)
    )  # fmt: skip
    assert "nosymfollow" in line.split()[5].split(",")


def test_each_mount_has_a_user_of_its_own(
    open_cache: Path, mount: Callable[..., Mounted], s3: S3
) -> None:
    """The second mount reads what the first one cached; neither can touch the other's process."""
    s3.put("common", {"m/model.safetensors": os.urandom(3 << 20)})
    first = mount("s3://common/m", f"--cache-dir={open_cache}", "--prefetch=off")
    assert shell("cat model.safetensors | wc -c", first.path).stdout.strip() == str(3 << 20)
    first_uid = uid_of(first.worker)
    assert shell("stat -c %u:%g model.safetensors", first.path).stdout.strip() == "0:0"
    first.end()
    again = mount("s3://common/m", f"--cache-dir={open_cache}", "--prefetch=off")
    assert uid_of(again.worker) != first_uid
    s3.forget_requests()
    assert shell("cat model.safetensors | wc -c", again.path).stdout.strip() == str(3 << 20)
    assert s3.data_requests() == []


def test_files_of_root_are_read_where_they_are_needed(mount: Callable[..., Mounted]) -> None:
    """A cache below a directory of root alone: one capability, and nothing else."""
    mounted = mount("s3://rights/m")
    shell("cat * | wc -c", mounted.path)
    for status in statuses(mounted.worker):
        check(status, DAC_READ_SEARCH)


def test_a_cache_of_a_former_version_is_taken_over(
    open_cache: Path, mount: Callable[..., Mounted]
) -> None:
    """It was root's; what else is in the directory stays as it is."""
    open_cache.mkdir(mode=0o755)
    other = open_cache / "notes"
    other.write_text("not of a cache")
    other.chmod(0o644)
    mounted = mount("s3://rights/m", f"--cache-dir={open_cache}", "--prefetch=off")
    shell("cat * | wc -c", mounted.path)
    mounted.end()
    blocks = [each for each in open_cache.rglob("*") if len(each.name) == 30]
    assert blocks
    for path in open_cache.rglob("*"):
        if path != other:
            os.chown(path, 0, 0)
            path.chmod(0o700 if path.is_dir() else 0o600)
    os.chown(open_cache, 0, 0)
    open_cache.chmod(0o755)
    again = mount("s3://rights/m", f"--cache-dir={open_cache}", "--prefetch=off")
    size = shell("cat * | wc -c", again.path).stdout.strip()
    assert int(size) == (16 << 20) + 2
    assert {each for each in open_cache.rglob("*") if len(each.name) == 30} == set(blocks)
    assert other.stat().st_mode & 0o777 == 0o644 and other.stat().st_gid == 0
    assert open_cache.stat().st_mode & 0o7777 == 0o2775


def test_a_worker_has_a_hard_limit_of_memory(mount: Callable[..., Mounted]) -> None:
    """It follows the limit for blocks."""
    mounted = mount("s3://rights/m", "--memory-limit=64MiB", "--prefetch=off")
    limits = Path(f"/proc/{mounted.worker}/limits").read_text()
    (limit,) = re.findall(r"^Max data size +(\d+) ", limits, re.MULTILINE)
    assert int(limit) == privileges.MEMORY_BYTES + privileges.MEMORY_SHARE * (64 << 20)


def test_a_worker_leaves_no_core_dump(mount: Callable[..., Mounted]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    try:
        mounted = mount("s3://rights/m")
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
    for pid in (mounted.worker, mounted.pid):
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)
    # Owned by root and closed to others is what cannot be dumped (proc(5)): a process of the
    # worker's own user may not look at it.
    uid = uid_of(mounted.worker)
    peek = f"cat /proc/{mounted.worker}/environ > /dev/null"
    tried = subprocess.run(
        ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "bash", "-c", peek],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "Permission denied" in tried.stderr
