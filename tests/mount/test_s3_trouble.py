"""S3 has a bad day while the mount is read."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
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
    ],
    ids=lambda fault: fault.get("code", fault["kind"]),
)
def test_a_reader_sees_nothing_of_passing_trouble(
    mount: Callable[..., Mounted], s3: S3, fault: dict[str, object]
) -> None:
    mounted = mount("s3://trouble/m", *OPTIONS)
    s3.fault("GET /trouble/m/file", **fault)
    check = "import sys; assert open(sys.argv[1], 'rb').read() == open(sys.argv[2], 'rb').read()"
    local = mounted.path.parent / "local"
    local.write_bytes(BODY)
    python(check, mounted.path / "file", local)
    assert len(s3.data_requests()) >= 3 + int(str(fault["times"]))


def test_a_stuck_connection_does_not_stall_a_load(mount: Callable[..., Mounted], s3: S3) -> None:
    mounted = mount("s3://trouble/m", *OPTIONS)
    s3.fault("GET /trouble/m/file", "hang", seconds=15)
    # Were the first request waited for, this would take 15 seconds.
    python(READ_ERRNO, mounted.path / "file", timeout_s=12)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "AccessDenied", "EACCES"),
        (404, "NoSuchKey", "ESTALE"),
        (412, "PreconditionFailed", "ESTALE"),
        (400, "InvalidRequest", "EIO"),
    ],
)
def test_what_waiting_cannot_help_fails_at_once(
    mount: Callable[..., Mounted], s3: S3, status: int, code: str, expected: str
) -> None:
    mounted = mount("s3://trouble/m", *OPTIONS)
    s3.fault("GET /trouble/m/file", "status", status=status, code=code, times=1000)
    assert python(READ_ERRNO, mounted.path / "file", timeout_s=10).strip() == expected
    assert code in mounted.log() and "trouble/m/file" in mounted.log()
    s3.forget()
    assert python(READ_ERRNO, mounted.path / "file").strip() == str(len(BODY))


def test_lasting_trouble_ends_in_an_error_with_its_cause(
    mount: Callable[..., Mounted], s3: S3
) -> None:
    mounted = mount("s3://trouble/m", *OPTIONS, "--io-timeout=2s")
    s3.fault("GET /trouble/m/file", "status", status=503, code="SlowDown", times=10_000)
    assert python(READ_ERRNO, mounted.path / "file", timeout_s=20).strip() == "EIO"
    assert "SlowDown" in mounted.log()


def test_a_replaced_object_never_mixes_bytes(mount: Callable[..., Mounted], s3: S3) -> None:
    mounted = mount("s3://trouble/m", *OPTIONS)
    assert shell("head -c 1000 file | md5sum", mounted.path).returncode == 0
    s3.put("trouble", {"m/file": bytes(len(BODY))})
    assert python(READ_ERRNO, mounted.path / "file").strip() == "ESTALE"
    assert "ObjectChanged" in mounted.log() or "412" in mounted.log()
    # What was fetched before is still the old object, and a new mount shows the new one.
    again = mount("s3://trouble/m", *OPTIONS)
    assert python("import sys; print(set(open(sys.argv[1],'rb').read()))", again.path / "file") == (
        "{0}\n"
    )
    s3.client.delete_object(Bucket="trouble", Key="m/file")
    assert python(READ_ERRNO, mounted.path / "file").strip() == "ESTALE"
