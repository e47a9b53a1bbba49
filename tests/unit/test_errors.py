"""What S3 says, and what a reader gets."""

from __future__ import annotations

import errno

import pytest

from lazyfs.errors import classify, classify_text


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


def test_text() -> None:
    kind, cause = classify_text(
        "Error performing GET http://x/y in 1s - Server returned non-2xx status code: "
        "503 Service Unavailable: <Error><Code>SlowDown</Code></Error>\n\nDebug source: ..."
    )
    assert kind.transient and cause == "503 SlowDown"
    kind, cause = classify_text(
        "HTTP error: error sending request\n\nDebug source:\nOs {\n  code: 111,\n"
        '  kind: ConnectionRefused,\n  message: "Connection refused",\n}'
    )
    assert kind.transient and cause == "HTTP error: error sending request: Connection refused"
    kind, cause = classify_text(
        "HTTP error: error sending request\n\nDebug source:\nerror: InvalidCertificate(\n"
        "    Other(\n  OtherError(\n   CaUsedAsEndEntity,\n"
    )
    assert not kind.transient and "CaUsedAsEndEntity" in cause
