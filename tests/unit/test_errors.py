"""What S3 says, and what a reader gets."""

from __future__ import annotations

import errno

import pytest

from lazyfs.errors import classify


@pytest.mark.parametrize(
    ("status", "code", "number", "transient"),
    [
        (403, "AccessDenied", errno.EACCES, False),
        (403, None, errno.EACCES, False),
        (403, "RequestTimeTooSkewed", errno.EACCES, True),
        (404, "NoSuchKey", errno.ESTALE, False),
        (404, "NoSuchBucket", errno.ENOENT, False),
        (412, None, errno.ESTALE, False),
        (416, "InvalidRange", errno.ESTALE, False),
        (429, None, errno.EIO, True),
        (400, "ExpiredToken", errno.EACCES, True),
        (400, "InvalidRequest", errno.EIO, False),
        (500, None, errno.EIO, True),
        (503, "SlowDown", errno.EIO, True),
        (None, None, errno.EIO, True),
    ],
)
def test_table(status: int | None, code: str | None, number: int, transient: bool) -> None:
    kind = classify(status, code)
    assert (kind.errno, kind.transient) == (number, transient)
