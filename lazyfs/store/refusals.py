"""The meaning of S3's error answers: a table. Pure.

`RULES` is the only map from an answer of S3 to an error of the project; `docs/S3.md` shows it
(`docs/make_refusals.py`). An error says what a reader gets and whether waiting may help.

The first rule that applies decides. Codes are from
https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html and what MinIO, Ceph, R2 and
others send for the same causes. An answer without a code is not from S3 but from a proxy before it:
an ingress whose pods are being replaced answers 404, a web application firewall 403.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lazyfs.errors import (
    AccessDeniedError,
    ArchivedError,
    BadRequestError,
    CredentialsExpiredError,
    NoSuchBucketError,
    NotSupportedError,
    ObjectChangedError,
    ObjectGoneError,
    SourceError,
    ThrottledError,
    UnavailableError,
    WrongRegionError,
)
from lazyfs.store.listing import seconds_of

LONGEST_MESSAGE = 300
# How much of the text of an error answer is read.
MOST_TEXT = 64 << 10
# Some services name the region of a bucket only in the message.
_EXPECTED_REGION = re.compile(r"expecting '([a-z0-9-]{1,64})'")


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the table.

    Attributes:
        cause: the text for the docs.
        error: the resulting error.
        codes: the codes in S3's error body; `KMS.*` stands for all codes that begin with `KMS.`.
        statuses: the HTTP statuses, for an answer with a code that no rule names.
        uncoded: the statuses also count without a code.
    """

    cause: str
    error: type[SourceError]
    codes: tuple[str, ...] = ()
    statuses: tuple[int, ...] = ()
    uncoded: bool = True


RULES = (
    Rule(
        "S3 asks for fewer requests",
        ThrottledError,
        ("SlowDown", "SlowDownRead", "SlowDownWrite", "Throttling", "ThrottlingException",
         "ThrottledException", "RequestThrottled", "RequestThrottledException",
         "RequestLimitExceeded", "TooManyRequests", "TooManyRequestsException",
         "BandwidthLimitExceeded", "KMS.ThrottlingException"),
        (429,),
    ),
    Rule(
        "S3 or its key service fails for the moment",
        UnavailableError,
        ("InternalError", "ServiceUnavailable", "RequestTimeout", "OperationAborted",
         "ConditionalRequestConflict", "IDPCommunicationError", "KMS.DependencyTimeoutException",
         "KMS.InternalException", "KMS.KMSInternalException"),
        (408, 425, 500, 502, 503, 504, 507, 508, 509, 520, 521, 522, 523, 524, 525, 526, 527, 529,
         530, 598, 599),
    ),
    Rule(
        "credentials expired or were replaced, or the clock of this machine is wrong",
        CredentialsExpiredError,
        ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired",
         "InvalidAccessKeyId", "InvalidToken", "InvalidClientTokenId", "InvalidIdentityToken",
         "UnrecognizedClientException", "RequestTimeTooSkewed"),
    ),
    Rule(
        "the signature does not match the secret that S3 knows",
        CredentialsExpiredError,
        ("SignatureDoesNotMatch",),
    ),
    Rule(
        "the object is archived: it must be restored first",
        ArchivedError,
        ("InvalidObjectState",),
    ),
    Rule(
        "the object was deleted",
        ObjectGoneError,
        ("NoSuchKey", "NoSuchVersion", "NoSuchObject"),
        (404, 410),
        uncoded=False,
    ),
    Rule(
        "the object was replaced, or is shorter than it was listed",
        ObjectChangedError,
        ("PreconditionFailed", "InvalidRange"),
        (412, 416),
    ),
    Rule(
        "there is no such bucket",
        NoSuchBucketError,
        ("NoSuchBucket", "NoSuchAccessPoint", "NoSuchMultiRegionAccessPoint", "InvalidBucketName"),
    ),
    Rule(
        "the bucket is in another region",
        WrongRegionError,
        ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException",
         "IncorrectEndpoint"),
        (301,),
    ),
    Rule(
        "the service does not know the request",
        NotSupportedError,
        ("NotImplemented", "XNotImplemented"),
        (501,),
    ),
    Rule(
        "access is denied",
        AccessDeniedError,
        ("AccessDenied", "AccessDeniedException", "AllAccessDisabled", "AccountProblem",
         "IDPRejectedClaim", "InvalidPayer", "NotSignedUp", "UnauthorizedAccess"),
        (401, 403),
        uncoded=False,
    ),
    Rule(
        "the encryption key cannot be used",
        BadRequestError,
        ("KMS.*",),
    ),
    Rule(
        "a proxy needs a password",
        BadRequestError,
        (),
        (407,),
    ),
)  # fmt: skip
# What to do about a refusal.
_HINTS = {
    "SignatureDoesNotMatch": "secretAccessKey (AWS_SECRET_ACCESS_KEY) does not belong to this "
    "access key",
    "InvalidAccessKeyId": "the endpoint does not know this accessKeyId (AWS_ACCESS_KEY_ID)",
    "ExpiredToken": "sessionToken (AWS_SESSION_TOKEN) has expired",
    "InvalidToken": "sessionToken (AWS_SESSION_TOKEN) does not belong to these keys",
    "RequestTimeTooSkewed": "set the clock of this machine",
    "InvalidObjectState": "the object is archived: restore it first",
    "AllAccessDisabled": "all access to the bucket is disabled",
    "AccountProblem": "S3 has blocked the account",
    "InvalidIdentityToken": "the role does not trust this identity provider or audience",
}
# For answers that no rule names.
WITH_ANOTHER_CODE = BadRequestError
WITHOUT_A_CODE = UnavailableError


def classify(status: int | None, code: str | None) -> type[SourceError]:
    """The error for an HTTP status and the code of S3's error body; either may be missing."""
    if code:
        for rule in RULES:
            if code in rule.codes:
                return rule.error
        if code.startswith("KMS."):
            return BadRequestError
    for rule in RULES:
        if status in rule.statuses and (code or rule.uncoded):
            return rule.error
    if code:
        return WITH_ANOTHER_CODE if status is None or status < 500 else UnavailableError
    return WITHOUT_A_CODE


def hint_for(kind: type[SourceError], code: str | None) -> str:
    """What the user can do about a refusal, to be appended to its message; empty if unknown."""
    if code in _HINTS:
        return f"; {_HINTS[code]}"
    if kind is AccessDeniedError:
        return "; the permissions s3:ListBucket and s3:GetObject are needed"
    if kind is WrongRegionError:
        return "; set --region to the bucket's region"
    if kind is NoSuchBucketError:
        return "; check its name and the endpoint"
    return ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error answer.

    Attributes:
        code, message: from S3's error body; empty if it has none.
        region: the region of the bucket according to the answer.
        request: S3's own id of the request, with which its operator can find it.
        headed: the answer is to a HEAD, and so has no body with details.
        retry_after_s: how long to wait before the next request; 0: the answer does not say.
        date_s: the service's time of the answer, since the epoch; 0: the answer does not say.
    """

    status: int
    code: str
    message: str
    region: str
    request: str
    headed: bool = False
    retry_after_s: float = 0.0
    date_s: int = 0

    @classmethod
    def of(
        cls, status: int, headers: Mapping[str, str], body: bytes, *, headed: bool = False
    ) -> Refusal:
        """Make a refusal from an answer.

        Args:
            headers: names are in lower case.
            body: the body or its beginning; empty for a HEAD.
        """
        text = body.decode(errors="replace")
        code = _field(text, "Code") or headers.get("x-amz-error-code", "")
        message = _field(text, "Message")
        region = headers.get("x-amz-bucket-region") or _field(text, "Region")
        if not region and (expected := _EXPECTED_REGION.search(message)):
            region = expected[1]
        date_s = seconds_of(_field(text, "ServerTime")) or seconds_of(headers.get("date", ""))
        return cls(
            status,
            printable(code)[:128],
            printable(message)[:LONGEST_MESSAGE],
            printable(region)[:64],
            printable(headers.get("x-amz-request-id") or _field(text, "RequestId"))[:128],
            headed,
            _retry_after_s(headers.get("retry-after", "").strip(), date_s),
            date_s,
        )

    def error(self, what: str) -> SourceError:
        """The error to raise; its message begins with `what`."""
        kind = classify(self.status, self.code or ("HEAD" if self.headed else None))
        said = f"{self.status} {self.code}".strip()
        if self.message:
            said += f": {self.message}"
        elif self.status == 407:
            said += ": the proxy needs a user and a password (HTTP_PROXY, HTTPS_PROXY)"
        elif not (self.code or self.headed):
            said += ", without an error code of S3"
            if kind is UnavailableError and self.status < 500:
                said += ": it comes from a proxy or gateway"
        if self.request:
            said += f" (request {self.request})"
        if kind is NoSuchBucketError:
            said = f"there is no such bucket ({said})"
        error = kind(f"{what}: {said}{hint_for(kind, self.code)}")
        error.retry_after_s = self.retry_after_s
        return error


def printable(text: str) -> str:
    """Foreign text as one line; unprintable characters are shown as `?`."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def _retry_after_s(told: str, date_s: int) -> float:
    """A `Retry-After` in seconds: a number, or a date (RFC 9110, 10.2.3); 0: neither."""
    if re.fullmatch(r"[0-9]{1,9}", told):
        return float(told)
    until_s = seconds_of(told)
    return float(max(0, until_s - date_s)) if until_s and date_s else 0.0


def _field(text: str, name: str) -> str:
    found = re.search(rf"<{name}>([^<]*)</{name}>", text)
    return html.unescape(found[1]).strip() if found else ""
