"""Every byte is right, however it is read."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mounting import Mounted, lazyfs, python, shell
from s3 import S3

pytestmark = pytest.mark.fuse

MIB = 1 << 20
# Sizes around every border: nothing, a byte, a page, a block of 256 KiB, several.
SIZES = [0, 1, 4095, 4096, 4097, 256 * 1024 - 1, 256 * 1024, 256 * 1024 + 1, 3 * MIB + 17]

COMPARE_RANGES = """
import json, os, sys
ranges = json.load(sys.stdin) if len(sys.argv) < 4 else json.loads(sys.argv[3])
with open(sys.argv[1], "rb") as mounted, open(sys.argv[2], "rb") as local:
    for offset, length in ranges:
        ours, theirs = (os.pread(f.fileno(), length, offset) for f in (mounted, local))
        assert ours == theirs, (offset, length, len(ours), len(theirs))
print(len(ranges))
"""

COMPARE_MAPPED = """
import mmap, sys
with open(sys.argv[1], "rb") as mounted, open(sys.argv[2], "rb") as local:
    a = mmap.mmap(mounted.fileno(), 0, prot=mmap.PROT_READ)
    b = mmap.mmap(local.fileno(), 0, prot=mmap.PROT_READ)
    # Backwards, so that no read-ahead helps, then whole.
    for offset in range(len(a) - 1, -1, -70000):
        assert a[offset] == b[offset], offset
    assert a[:] == b[:]
"""

COMPARE_DIRECT = """
import mmap, os, sys
local = open(sys.argv[2], "rb").read()
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
buffer = mmap.mmap(-1, 1 << 20)
got = bytearray()
while n := os.preadv(fd, [buffer], len(got)):
    got += buffer[:n]
assert got == local, (len(got), len(local))
"""

MANY_READERS = """
import hashlib, os, sys, threading
root, local, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
names = sorted(os.listdir(local))
wrong = []
def read(start):
    for name in names[start % len(names):] + names[:start % len(names)]:
        a = hashlib.sha256(open(os.path.join(root, name), "rb").read()).digest()
        b = hashlib.sha256(open(os.path.join(local, name), "rb").read()).digest()
        if a != b:
            wrong.append(name)
threads = [threading.Thread(target=read, args=(i,)) for i in range(count)]
[t.start() for t in threads]; [t.join() for t in threads]
assert not wrong, wrong
"""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of all sizes on local disk."""
    directory = tmp_path_factory.mktemp("local")
    generator = random.Random(7)
    for size in SIZES:
        (directory / f"f{size}.bin").write_bytes(generator.randbytes(size))
    return directory


@pytest.fixture(scope="module")
def bucket(server: S3, local: Path) -> str:
    """The same files in S3."""
    server.put("reading", {f"dir/{p.name}": p.read_bytes() for p in local.iterdir()})
    return "s3://reading/dir"


@pytest.mark.parametrize("prefetch", ["model", "sequential", "off"])
@pytest.mark.parametrize("cache", [True, False])
def test_every_file_is_equal(
    mount: Callable[..., Mounted], bucket: str, local: Path, prefetch: str, cache: bool
) -> None:
    options = [f"--prefetch={prefetch}", "--block-size=256KiB"]
    mounted = mount(bucket, *options, *([] if cache else ["--cache-dir=none"]))
    assert shell(f"diff -r {local} {mounted.path}", local).stdout == ""


@pytest.mark.parametrize("page_cache", ["auto", "off"])
def test_mapped_direct_and_shared_reads(
    mount: Callable[..., Mounted], bucket: str, local: Path, page_cache: str
) -> None:
    mounted = mount(bucket, f"--page-cache={page_cache}", "--block-size=256KiB")
    name = f"f{SIZES[-1]}.bin"
    python(COMPARE_MAPPED, mounted.path / name, local / name)
    for size in SIZES:
        python(COMPARE_DIRECT, mounted.path / f"f{size}.bin", local / f"f{size}.bin")
    python(MANY_READERS, mounted.path, local, 32)


def test_many_readers_of_a_cold_mount_in_little_memory(
    mount: Callable[..., Mounted], bucket: str, local: Path
) -> None:
    """The least memory that is allowed, no disk, no page cache: slow, but right and not stuck."""
    options = ["--cache-dir=none", "--page-cache=off", "--memory-limit=64MiB"]
    mounted = mount(bucket, *options, "--block-size=16MiB")
    python(MANY_READERS, mounted.path, local, 64)


def test_any_range_is_equal(mount: Callable[..., Mounted], bucket: str, local: Path) -> None:
    mounted = mount(bucket, "--prefetch=off", "--block-size=256KiB", "--page-cache=off")
    ranges = st.lists(
        st.tuples(st.integers(0, SIZES[-1] + MIB), st.integers(1, 2 * MIB)), min_size=20
    )

    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
    @given(ranges)
    def check(wanted: list[tuple[int, int]]) -> None:
        name = f"f{SIZES[-1]}.bin"
        answer = python(COMPARE_RANGES, mounted.path / name, local / name, json.dumps(wanted))
        assert int(answer) == len(wanted)

    check()


def test_tools_see_a_plain_read_only_directory(
    mount: Callable[..., Mounted], bucket: str, local: Path, tmp_path: Path
) -> None:
    mounted = mount(bucket)
    for command in (
        "sha256sum *",
        "tar -cf - --sort=name --mode=444 --owner=0 --group=0 --mtime=@0 f* | sha256sum",
        "find . -type f | sort",
        "find . -type f -size +1M | sort",
        "ls -1",
        "du -b --apparent-size -c f* | tail -1",
        "cat f1.bin f4097.bin | md5sum",
        "tail -c 5000 f4097.bin | md5sum",
        "dd if=f3145745.bin bs=1000 skip=7 count=999 status=none | md5sum",
    ):
        here, there = shell(command, mounted.path), shell(command, local)
        assert (here.stdout, here.returncode) == (there.stdout, 0), (command, here.stderr)
    assert shell(f"cp -r . {tmp_path}/copy && diff -r . {tmp_path}/copy", mounted.path).stdout == ""
    listing = shell("ls -laR", mounted.path)
    assert listing.returncode == 0
    assert "-r--r--r--" in listing.stdout
    total = sum(SIZES)
    assert abs(int(shell("df --output=size -B1 . | tail -1", mounted.path).stdout) - total) < 1024


def test_attributes(mount: Callable[..., Mounted], server: S3, bucket: str) -> None:
    mounted = mount(bucket, "--file-mode=440", "--dir-mode=550", "--uid=1234", "--gid=4321")
    code = """
import json, os, sys
s = os.stat(sys.argv[1])
x = {n: os.getxattr(sys.argv[1], n).decode() for n in os.listxattr(sys.argv[1])}
print(json.dumps([oct(s.st_mode), s.st_uid, s.st_gid, s.st_size, s.st_mtime_ns, s.st_ino, x]))
"""
    head = server.client.head_object(Bucket="reading", Key="dir/f4096.bin")
    seen = json.loads(python(code, mounted.path / "f4096.bin"))
    assert seen[:4] == ["0o100440", 1234, 4321, 4096]
    assert seen[4] == int(head["LastModified"].timestamp()) * 10**9
    assert seen[6]["user.lazyfs.key"] == "dir/f4096.bin"
    assert seen[6]["user.lazyfs.etag"] == head["ETag"].strip('"')
    assert "user.lazyfs.cached" not in seen[6], "it changes by itself: copies would keep it"
    cached = shell("getfattr --only-values -n user.lazyfs.cached f4096.bin", mounted.path).stdout
    assert cached.endswith("/4096")
    again = mount(bucket)
    assert json.loads(python(code, again.path / "f4096.bin"))[5] == seen[5], "inode is not stable"


def test_a_walk_through_many_directories_asks_for_a_few_pages(
    mount: Callable[..., Mounted], server: S3
) -> None:
    sizes = {"large": 1500} | {f"m{i:03d}": 10 for i in range(300)}
    keys = [f"{name}/sub/{i:04d}" for name, size in sizes.items() for i in range(size)]
    server.put_many("walked", [*keys, "top.txt"])
    server.forget()
    mounted = mount("s3://walked")

    def listings() -> int:
        return sum("list-type" in line for line in server.requests())

    assert shell("cat m200/sub/0003", mounted.path).stdout == "m200/sub/0003"
    assert listings() <= 4, "at mount, the root, this directory and the one in it"
    find = "find . -type f -printf '%P\n' | LC_ALL=C sort"
    assert shell(find, mounted.path).stdout.split() == [*keys, "top.txt"]
    assert listings() < 20, "not one for each of six hundred directories"
    asked = listings()
    assert lazyfs("upgrade", mounted.path).returncode == 0
    assert shell(find, mounted.path).stdout.split() == [*keys, "top.txt"]
    assert listings() == asked, "what was seen outlives a worker"


def test_directory_of_ten_thousand_objects(mount: Callable[..., Mounted], server: S3) -> None:
    names = [f"{i:05d}.txt" for i in range(10_000)]
    server.put_many("tenthousand", [*(f"d/{name}" for name in names), "top.txt"])
    server.forget()
    mounted = mount("s3://tenthousand", "--prefetch=off")
    # The first directory is shown without listing the ten thousand below.
    assert shell("ls", mounted.path).stdout.split() == ["d", "top.txt"]
    assert len([line for line in server.requests() if "list-type" in line]) == 2
    assert shell("ls d", mounted.path).stdout.split() == names
    assert shell("cat d/09999.txt", mounted.path).stdout == "d/09999.txt"
    assert shell("find . -type f | wc -l", mounted.path).stdout.strip() == "10001"
    # One listing of a directory serves for ever: 1 + 1 + 10 pages.
    assert len([line for line in server.requests() if "list-type" in line]) == 12
