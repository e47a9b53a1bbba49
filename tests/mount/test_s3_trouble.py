"""Readers while S3 fails in many ways."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from gate import Gate
from mounting import Mounted, python, shell
from s3 import S3

pytestmark = pytest.mark.fuse

BODY = random.Random(9).randbytes(3 << 20)
OPTIONS = ["--prefetch=off", "--block-size=1MiB"]
READ_ERRNO = """
import errno, sys
try:
    print(len(open(sys.argv[1], "rb").read()))
except OSError as error:
    print(errno.errorcode[error.errno])
"""


@pytest.fixture(autouse=True)
def bucket(s3: S3) -> None:
    s3.put("trouble", {"m/file": BODY})


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "status", "status": 503, "code": "SlowDown", "times": 4},
        {"kind": "status", "status": 500, "code": "InternalError", "times": 4},
        {"kind": "status", "status": 429, "code": "TooManyRequests", "times": 4},
        {"kind": "truncate", "times": 3},
        {"kind": "reset", "times": 3},
        {"kind": "corrupt_range", "times": 3},
        {"kind": "status", "status": 400, "code": "ExpiredToken", "times": 2},
        {"kind": "status", "status": 403, "code": "InvalidAccessKeyId", "times": 2},
        {"kind": "status", "status": 403, "code": "RequestTimeTooSkewed", "times": 2},
        {"kind": "slow", "seconds": 0.1, "times": 3},
    ],
    ids=lambda fault: fault.get("code", fault["kind"]),
)
def test_readers_see_nothing_of_transient_errors(
    mount: Callable[..., Mounted], s3: S3, fault: dict[str, object]
) -> None:
    mounted = mount("s3://trouble/m", *OPTIONS)
    s3.fault("GET /trouble/m/file", **fault)
    check = "import sys; assert open(sys.argv[1], 'rb').read() == open(sys.argv[2], 'rb').read()"
    local = mounted.path.parent / "local"
    local.write_bytes(BODY)
    python(check, mounted.path / "file", local)
    wasted = 0 if fault["kind"] == "slow" else int(str(fault["times"]))
    assert len(s3.data_requests()) >= 3 + wasted


def test_an_object_that_s3_does_not_give_holds_up_no_other_one(
    mount: Callable[..., Mounted], s3: S3
) -> None:
    s3.put("trouble", {"two/broken": bytes(24 << 20), "two/file": BODY})
    mounted = mount("s3://trouble/two", *OPTIONS, "--io-timeout=60s")
    s3.fault("GET /trouble/two/broken", "status", status=503, code="SlowDown", times=10**6)
    readers = """
import os, sys, threading
file = os.open(sys.argv[1], os.O_RDONLY)
for number in range(24):
    threading.Thread(target=os.pread, args=[file, 1, number << 20], daemon=True).start()
print("begun", flush=True)
sys.stdin.read()
os._exit(0)
"""
    with subprocess.Popen(
        [sys.executable, "-c", readers, mounted.path / "broken"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as waiting:  # fmt: skip
        assert waiting.stdout is not None
        waiting.stdout.readline()
        time.sleep(3)  # by now S3 has refused each of them, and the limit of requests is low
        began_s = time.monotonic()
        shell("cat file > /dev/null", mounted.path)
        took_s = time.monotonic() - began_s
        s3.forget()
        waiting.communicate(timeout=60)
    assert took_s < 15


def test_a_stuck_connection_does_not_stall_a_load(mount: Callable[..., Mounted], s3: S3) -> None:
    mounted = mount("s3://trouble/m", *OPTIONS)
    # If the reader waited for the first request, it would not end in time.
    s3.fault("GET /trouble/m/file", "hang", seconds=90)
    python(READ_ERRNO, mounted.path / "file")


@pytest.fixture
def gate(s3: S3) -> Iterator[Gate]:
    """What stands between the mounts of a test and S3."""
    gate = Gate(s3.url)
    yield gate
    gate.close()


def test_an_endpoint_that_was_gone(mount: Callable[..., Mounted], gate: Gate) -> None:
    """Readers wait and then go on; the log has one line when it takes long, and one at the end."""
    mounted = mount("s3://trouble/m", *OPTIONS, f"--endpoint-url={gate.url}")
    gate.close()
    reader = subprocess.Popen(
        ["sha256sum", mounted.path / "file"], stdout=subprocess.PIPE, text=True
    )
    try:
        mounted.wait_for_log("waiting for s3://trouble/m/file")
        assert reader.poll() is None
        gate.open()
        output, _ = reader.communicate(timeout=60)
    finally:
        reader.kill()
        reader.communicate(timeout=60)
    assert output.split()[0] == hashlib.sha256(BODY).hexdigest()
    mounted.wait_for_log("answered after")
    assert mounted.log().count("waiting for") <= 3, "one for each block at most"


@pytest.mark.parametrize("how", ["close", "stick"])
def test_nothing_hangs_on_a_dead_endpoint(
    mount: Callable[..., Mounted], gate: Gate, how: str
) -> None:
    """A reader, also of a mapped file, can be killed; the mount can be taken away."""
    mounted = mount("s3://trouble/m", *OPTIONS, f"--endpoint-url={gate.url}")
    assert shell("ls", mounted.path).stdout == "file\n"
    getattr(gate, how)()
    touch = (
        "import mmap, sys; file = open(sys.argv[1]);"
        "mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)[5000]"
    )
    for command in (["cat"], [sys.executable, "-c", touch]):
        reader = subprocess.Popen([*command, mounted.path / "file"], stdout=subprocess.DEVNULL)
        time.sleep(1)
        assert reader.poll() is None, "it waits"
        reader.kill()
        reader.wait(timeout=60)
    assert shell("stat file", mounted.path).returncode == 0
    mounted.end()


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "AccessDenied", "EACCES"),
        (404, "NoSuchKey", "ESTALE"),
        (412, "PreconditionFailed", "ESTALE"),
        (400, "InvalidRequest", "EIO"),
    ],
)
def test_errors_that_a_retry_cannot_fix_are_reported_at_once(
    mount: Callable[..., Mounted], s3: S3, status: int, code: str, expected: str
) -> None:
    mounted = mount("s3://trouble/m", *OPTIONS)
    s3.fault("GET /trouble/m/file", "status", status=status, code=code, times=1000)
    assert python(READ_ERRNO, mounted.path / "file").strip() == expected
    mounted.wait_for_log(code)
    assert "trouble/m/file" in mounted.log()
    s3.forget()
    assert python(READ_ERRNO, mounted.path / "file").strip() == str(len(BODY))


def test_lasting_errors_end_with_their_cause(mount: Callable[..., Mounted], s3: S3) -> None:
    mounted = mount("s3://trouble/m", *OPTIONS, "--io-timeout=6s")
    s3.fault("GET /trouble/m/file", "status", status=503, code="SlowDown", times=10_000)
    began_s = time.monotonic()
    assert python(READ_ERRNO, mounted.path / "file").strip() == "EIO"
    assert 6 <= time.monotonic() - began_s < 11, "once, though the kernel asks twice"
    mounted.wait_for_log("SlowDown")
    s3.forget()
    time.sleep(2)
    assert python(READ_ERRNO, mounted.path / "file").strip() == str(len(BODY))


def test_a_replaced_object_never_mixes_bytes(mount: Callable[..., Mounted], s3: S3) -> None:
    mounted = mount("s3://trouble/m", *OPTIONS)
    assert shell("head -c 1000 file | md5sum", mounted.path).returncode == 0
    s3.put("trouble", {"m/file": bytes(len(BODY))})
    assert python(READ_ERRNO, mounted.path / "file").strip() == "ESTALE"
    mounted.wait_for_log("listed with the ETag")
    # What was fetched before is still the old object, and a new mount shows the new one.
    again = mount("s3://trouble/m", *OPTIONS)
    assert python("import sys; print(set(open(sys.argv[1],'rb').read()))", again.path / "file") == (
        "{0}\n"
    )
    s3.client.delete_object(Bucket="trouble", Key="m/file")
    assert python(READ_ERRNO, mounted.path / "file").strip() == "ESTALE"
