"""What S3 says, and what a reader gets."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from lazyfs import errors
from lazyfs.errors import SourceError
from lazyfs.store.refusals import RULES, Refusal, classify, printable

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


ALL_TOLD = (
    "<Error><Code> A{0} </Code><Message>B{0}</Message><RequestId>C{0}</RequestId>"
    "<Region>D{0}</Region><ServerTime>2026-01-02T03:04:05Z</ServerTime></Error>"
)


def test_a_refusal_has_what_the_body_tells() -> None:
    found = Refusal.of(400, {}, ALL_TOLD.format("").encode())
    assert found == Refusal(400, "A", "B", "D", "C", False, 0.0, 1767323045)


def test_headers_say_better_who_answered_and_where_the_bucket_is() -> None:
    headers = {
        "x-amz-request-id": "R", "x-amz-bucket-region": "eu-west-1", "x-amz-error-code": "E",
        "date": "Tue, 14 Nov 2023 22:13:20 GMT", "retry-after": "3",
    }  # fmt: skip
    found = Refusal.of(400, headers, ALL_TOLD.format("").encode(), headed=True)
    assert found == Refusal(400, "A", "B", "eu-west-1", "R", True, 3.0, 1767323045)
    found = Refusal.of(400, headers, b"")
    assert found == Refusal(400, "E", "", "eu-west-1", "R", False, 3.0, 1_700_000_000)


def test_all_that_a_refusal_tells_is_of_bounded_length() -> None:
    found = Refusal.of(400, {}, ALL_TOLD.format("x" * 1000).encode())
    told = [len(text) for text in (found.code, found.message, found.region, found.request)]
    assert told == [128, 300, 64, 128]


@pytest.mark.parametrize(
    ("message", "region"),
    [
        ("the region 'us-east-1' is wrong; expecting 'eu-north-1'", "eu-north-1"),
        ("the region 'us-east-1' is wrong", ""),
        ("expecting 'EU'", ""),
        (f"expecting '{'a' * 65}'", ""),
    ],
)
def test_some_services_name_the_region_in_the_message_only(message: str, region: str) -> None:
    assert Refusal.of(400, {}, f"<Message>{message}</Message>".encode()).region == region


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (404, "404, without an error code of S3: it comes from a proxy or gateway"),
        (499, "499, without an error code of S3: it comes from a proxy or gateway"),
        (500, "500, without an error code of S3"),
        (412, "412, without an error code of S3"),
    ],
)
def test_an_answer_without_a_code_says_so(status: int, text: str) -> None:
    assert str(told(status, "")) == f"s3://b/k: {text}"


def test_a_bucket_that_does_not_exist_is_named_so() -> None:
    error = told(404, "<Code>NoSuchBucket</Code>", x_amz_request_id="R1")
    said = "there is no such bucket (404 NoSuchBucket (request R1))"
    assert str(error) == f"s3://b/k: {said}; check its name and the endpoint"


@pytest.mark.parametrize(
    ("text", "line"),
    [("a\n  b\tc ", "a b c"), ("a\x1bb\u202ec", "a?b?c"), ("ä € 模", "ä € 模"), ("", "")],
)
def test_foreign_text_is_printable(text: str, line: str) -> None:
    assert printable(text) == line


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
