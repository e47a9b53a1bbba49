"""Every error of the project, and the only map from an S3 answer to an errno.

A message is one line for a person: what happened, to which object or path, and what to do.
`SourceError` carries what a reader of the mount gets (`errno`) and whether waiting may help
(`transient`): the retry loop asks for nothing else.
"""

from __future__ import annotations

import errno
from typing import ClassVar


class LazyfsError(Exception):
    """Base of all errors that are shown to a person as one line."""

    exit_code: int = 1


class OptionError(LazyfsError):
    """An option or argument is unknown, malformed or out of its bounds."""

    exit_code = 2


class MountError(LazyfsError):
    """The mountpoint or FUSE itself is not as it must be."""


class CannotResumeError(MountError):
    """The session cannot go on with this daemon; the mount must be made anew."""


class DaemonError(LazyfsError):
    """What a daemon said when it refused to mount, or to go on.

    Attributes:
        exit_code: for the command line.
        kind: the name of the error's class in the daemon.
        status: that its process ended with.
    """

    def __init__(self, message: str, exit_code: int, kind: str = "", status: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.kind = kind
        self.status = status


class CacheError(LazyfsError):
    """The cache directory cannot be used."""


class SourceError(LazyfsError):
    """S3 did not give what was asked for.

    Attributes:
        errno: what a read of the mount fails with when this error is final.
        transient: waiting and asking again may help.
    """

    errno: ClassVar[int] = errno.EIO
    transient: ClassVar[bool] = False


class AccessDeniedError(SourceError):
    """The credentials are not allowed to do this, or there are none."""

    errno = errno.EACCES


class NoSuchBucketError(SourceError):
    """The bucket does not exist."""

    errno = errno.ENOENT


class ObjectGoneError(SourceError):
    """The object was deleted after the mount listed it."""

    errno = errno.ESTALE


class ObjectChangedError(SourceError):
    """The object was replaced after the mount listed it (its ETag differs)."""

    errno = errno.ESTALE


class WrongRegionError(SourceError):
    """The bucket lives in another region than the one that was named."""


class BadRequestError(SourceError):
    """S3 refused the request in a way that asking again does not change."""


class UntrustedError(SourceError):
    """The endpoint's certificate is not one that we may trust."""


class ThrottledError(SourceError):
    """S3 asks for fewer requests (503 SlowDown, 429)."""

    transient = True


class UnavailableError(SourceError):
    """No usable answer: 5xx, connection refused or broken, DNS, time-out."""

    transient = True


class CredentialsExpiredError(SourceError):
    """The credentials ran out or were replaced; fresh ones are tried before the next attempt."""

    errno = errno.EACCES
    transient = True


class BadResponseError(SourceError):
    """The body is not the range that was asked for (short, long, other range)."""

    transient = True


# Codes from https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html and what MinIO,
# Ceph and moto send for the same causes. A code that is not here is judged by its HTTP status.
_BY_CODE: dict[str, type[SourceError]] = {
    "AccessDenied": AccessDeniedError,
    "AllAccessDisabled": AccessDeniedError,
    "AccountProblem": AccessDeniedError,
    "InvalidObjectState": AccessDeniedError,  # archived in Glacier
    "ExpiredToken": CredentialsExpiredError,
    # They were good when the mount began, so they were rotated: others will be given.
    "InvalidAccessKeyId": CredentialsExpiredError,
    "SignatureDoesNotMatch": CredentialsExpiredError,
    "InvalidToken": CredentialsExpiredError,
    "TokenRefreshRequired": CredentialsExpiredError,
    # Of STS, about a pod's token, which is renewed: docs.aws.amazon.com/STS/latest/APIReference/
    # API_AssumeRoleWithWebIdentity.html
    "InvalidIdentityToken": CredentialsExpiredError,
    "ExpiredTokenException": CredentialsExpiredError,
    "IDPCommunicationError": UnavailableError,
    "IDPRejectedClaim": AccessDeniedError,
    "RequestTimeTooSkewed": CredentialsExpiredError,
    "NoSuchBucket": NoSuchBucketError,
    "NoSuchKey": ObjectGoneError,
    "NoSuchVersion": ObjectGoneError,
    "PreconditionFailed": ObjectChangedError,
    "InvalidRange": ObjectChangedError,  # the object became shorter
    "PermanentRedirect": WrongRegionError,
    "AuthorizationHeaderMalformed": WrongRegionError,
    "IllegalLocationConstraintException": WrongRegionError,
    "SlowDown": ThrottledError,
    "Throttling": ThrottledError,
    "RequestLimitExceeded": ThrottledError,
    "RequestTimeout": UnavailableError,
}

_BY_STATUS: dict[int, type[SourceError]] = {
    301: WrongRegionError,
    401: AccessDeniedError,
    403: AccessDeniedError,
    404: ObjectGoneError,
    408: UnavailableError,
    412: ObjectChangedError,
    416: ObjectChangedError,
    429: ThrottledError,
}


# What to do about a refusal.
_HINTS = {
    "SignatureDoesNotMatch": "the secret access key is not the one of this access key",
    "InvalidAccessKeyId": "the endpoint does not know this access key",
    "ExpiredToken": "the session token has run out",
    "InvalidToken": "the session token is not one of these keys",
    "RequestTimeTooSkewed": "set the clock of this machine",
    "InvalidObjectState": "the object is archived: restore it first",
    "AllAccessDisabled": "the bucket is closed",
    "AccountProblem": "S3 has closed the account",
    "InvalidIdentityToken": "the identity provider or the audience is not what the role trusts",
}


def hint_for(status: int | None, code: str | None) -> str:
    """What a person may do about a refusal of S3, to follow its message; empty if unknown."""
    kind = classify(status, code)
    if code in _HINTS:
        return f"; {_HINTS[code]}"
    if kind is AccessDeniedError:
        return "; the permissions s3:ListBucket and s3:GetObject are needed"
    if kind is WrongRegionError:
        return "; set --region to the bucket's region"
    return ""


def classify(status: int | None, code: str | None) -> type[SourceError]:
    """The error for an HTTP status and the `<Code>` of S3's error body, either may be missing."""
    if code in _BY_CODE:
        return _BY_CODE[code]
    if status is None or status >= 500:
        return UnavailableError
    return _BY_STATUS.get(status, BadRequestError)
