"""What S3 says, and what a reader gets."""

from __future__ import annotations

import errno

import pytest

from lazyfs.errors import classify, hint_for


@pytest.mark.parametrize(
    ("status", "code", "number", "transient"),
    [
        (403, "AccessDenied", errno.EACCES, False),
        (403, None, errno.EACCES, False),
        (403, "RequestTimeTooSkewed", errno.EACCES, True),
        (403, "SignatureDoesNotMatch", errno.EACCES, True),
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


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "SignatureDoesNotMatch", "secretAccessKey"),
        (403, "InvalidAccessKeyId", "does not know this accessKeyId"),
        (403, "AccessDenied", "s3:GetObject"),
        (403, None, "s3:GetObject"),
        (403, "InvalidObjectState", "restore"),
        (301, "PermanentRedirect", "--region"),
    ],
)
def test_a_refusal_says_what_to_do(status: int, code: str | None, said: str) -> None:
    assert said in hint_for(status, code)
    assert ("permission" in hint_for(status, code)) == (said == "s3:GetObject")


def test_nothing_is_advised_where_waiting_helps() -> None:
    assert hint_for(503, "SlowDown") == hint_for(None, None) == hint_for(404, "NoSuchKey") == ""
