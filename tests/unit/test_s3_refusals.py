"""What S3 says, and what a reader gets."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from lazyfs import errors
from lazyfs.errors import SourceError
from lazyfs.store.refusals import RULES, Refusal, classify

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("status", "code", "number", "waits"),
    [
        (403, "AccessDenied", errno.EACCES, False),
        (401, "WhoAreYou", errno.EACCES, False),
        (403, "RequestTimeTooSkewed", errno.EACCES, True),
        (403, "SignatureDoesNotMatch", errno.EACCES, True),
        (403, "InvalidObjectState", errno.EACCES, False),
        (404, "NoSuchKey", errno.ESTALE, False),
        (404, "NoSuchBucket", errno.ENOENT, False),
        (404, "SomethingNew", errno.ESTALE, False),
        (412, None, errno.ESTALE, False),
        (416, "InvalidRange", errno.ESTALE, False),
        (416, None, errno.ESTALE, False),
        (429, None, errno.EIO, True),
        (400, "ExpiredToken", errno.EACCES, True),
        (400, "InvalidRequest", errno.EIO, False),
        (400, "KMS.DisabledException", errno.EIO, False),
        (400, "KMS.SomethingNew", errno.EIO, False),
        (400, "KMS.ThrottlingException", errno.EIO, True),
        (500, "KMS.InternalException", errno.EIO, True),
        (500, None, errno.EIO, True),
        (500, "SomethingNew", errno.EIO, True),
        (506, "SomethingNew", errno.EIO, True),
        (None, "SomethingNew", errno.EIO, False),
        (501, "NotImplemented", errno.EIO, False),
        (501, None, errno.EIO, False),
        (503, "SlowDown", errno.EIO, True),
        (599, None, errno.EIO, True),
        (None, None, errno.EIO, True),
        # Without a code it is not S3 that answers.
        (400, None, errno.EIO, True),
        (401, None, errno.EIO, True),
        (403, None, errno.EIO, True),
        (404, None, errno.EIO, True),
        (405, None, errno.EIO, True),
        (407, None, errno.EIO, False),
    ],
)
def test_table(status: int | None, code: str | None, number: int, waits: bool) -> None:
    kind = classify(status, code)
    assert (kind.errno, kind.transient) == (number, waits)


def test_no_code_is_in_two_rules() -> None:
    codes = [code for rule in RULES for code in rule.codes]
    assert len(codes) == len(set(codes))


def told(status: int, body: str, **headers: str) -> SourceError:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Refusal.of(status, named, body.encode()).error("s3://b/k")


def test_messages_contain_the_answer_of_s3() -> None:
    error = told(
        400,
        "<Error><Code>KMS.DisabledException</Code><Message>arn:aws:kms:x &amp; y is\n disabled."
        "</Message><RequestId>R7</RequestId></Error>",
    )
    assert error.errno == errno.EIO
    assert str(error) == (
        "s3://b/k: 400 KMS.DisabledException: arn:aws:kms:x & y is disabled. (request R7)"
    )


@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (403, "SignatureDoesNotMatch", "secretAccessKey"),
        (403, "InvalidAccessKeyId", "does not know this accessKeyId"),
        (403, "AccessDenied", "s3:GetObject"),
        (403, "InvalidObjectState", "restore"),
        (301, "PermanentRedirect", "--region"),
        (404, "NoSuchBucket", "check its name"),
    ],
)
def test_a_refusal_says_what_to_do(status: int, code: str, advice: str) -> None:
    text = str(told(status, f"<Code>{code}</Code>"))
    assert advice in text
    assert ("permission" in text) == (code == "AccessDenied")


def test_there_is_no_advice_if_waiting_helps() -> None:
    assert ";" not in str(told(503, "<Code>SlowDown</Code>"))


def test_a_code_may_be_in_a_header() -> None:
    error = told(404, "", x_amz_error_code="NoSuchKey")
    assert isinstance(error, errors.ObjectGoneError)


def test_errors_of_gateways_say_so() -> None:
    error = told(404, "default backend - 404")
    assert error.transient
    assert str(error) == (
        "s3://b/k: 404, without an error code of S3: it comes from a proxy or gateway"
    )


def test_a_proxy_that_needs_a_password_is_named() -> None:
    said = "407: the proxy needs a user and a password (HTTP_PROXY, HTTPS_PROXY)"
    assert str(told(407, "<html></html>")) == f"s3://b/k: {said}"


def test_refused_head_requests_have_no_error_code() -> None:
    refusal = Refusal.of(403, {}, b"", headed=True)
    assert isinstance(refusal.error("x"), errors.AccessDeniedError)
    assert "gateway" not in str(refusal.error("x"))


@pytest.mark.parametrize(
    ("headers", "after_s"),
    [
        ({}, 0),
        ({"retry_after": "7"}, 7),
        ({"retry_after": " 120 "}, 120),
        ({"retry_after": "-5"}, 0),
        ({"retry_after": "9" * 400}, 0),
        ({"retry_after": "soon"}, 0),
        # A date is one of the service's clock, whatever ours says.
        ({"retry_after": "Tue, 14 Nov 2023 22:13:50 GMT", "date": "Tue, 14 Nov 2023 22:13:20 GMT"},
         30),
        ({"retry_after": "Tue, 14 Nov 2023 22:13:20 GMT", "date": "Tue, 14 Nov 2023 22:13:50 GMT"},
         0),
        ({"retry_after": "Tue, 14 Nov 2023 22:13:20 GMT"}, 0),
    ],
)  # fmt: skip
def test_how_long_the_service_says_to_wait(headers: dict[str, str], after_s: float) -> None:
    assert told(503, "<html>", **headers).retry_after_s == after_s


def test_foreign_text_is_one_line_of_bounded_length() -> None:
    error = told(400, "<Code>A\x1b[31mB</Code><Message>" + "x\u202e" * 5000 + "</Message>")
    assert str(error).isprintable()
    assert len(str(error)) < 500


def test_the_page_has_the_table() -> None:
    printed = subprocess.run(
        [sys.executable, ROOT / "docs/make_refusals.py", "--print"],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    assert (ROOT / "docs/S3.md").read_text() == printed, "run: make docs"
