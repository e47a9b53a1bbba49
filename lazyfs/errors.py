"""All errors of the project, and the only mapping from S3 answers to errnos.

A message is one line: what happened, to which object or path, and what to do. `SourceError` has the
`errno` that a reader of the mount gets, and says whether a retry may help (`transient`). The retry
loop needs nothing else.
"""

from __future__ import annotations

import errno
from typing import ClassVar


class LazyfsError(Exception):
    """Base class of all errors that are shown to the user as one line."""

    exit_code: int = 1


class OptionError(LazyfsError):
    """An option or argument is unknown, malformed or out of range."""

    exit_code = 2


class MountError(LazyfsError):
    """The mountpoint or FUSE is not usable."""


class CannotResumeError(MountError):
    """This daemon cannot take over the FUSE session; the source has to be mounted again."""


class DaemonError(LazyfsError):
    """A daemon refused to mount or to take over, with this message.

    Attributes:
        exit_code: for the command line.
        kind: the name of the error's class in the daemon.
        status: exit status of its process.
    """

    def __init__(self, message: str, exit_code: int, kind: str = "", status: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.kind = kind
        self.status = status


class CacheError(LazyfsError):
    """The cache directory cannot be used."""


class SourceError(LazyfsError):
    """S3 did not return what was requested.

    Attributes:
        errno: the error of a read of the mount if retries do not help.
        transient: a retry may help.
    """

    errno: ClassVar[int] = errno.EIO
    transient: ClassVar[bool] = False


class AccessDeniedError(SourceError):
    """The credentials do not permit this, or there are none."""

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
    """The bucket is in another region than the one given."""


class BadRequestError(SourceError):
    """S3 rejected the request, and a retry would not change that."""


class UntrustedError(SourceError):
    """The endpoint's certificate is not trusted."""


class ThrottledError(SourceError):
    """S3 asks for fewer requests (503 SlowDown, 429)."""

    transient = True


class UnavailableError(SourceError):
    """S3 gave no usable answer: 5xx, connection refused or broken, DNS, timeout."""

    transient = True


class CredentialsExpiredError(SourceError):
    """The credentials have expired or were replaced; the next attempt loads new ones."""

    errno = errno.EACCES
    transient = True


class BadResponseError(SourceError):
    """The body is not the requested range (too short, too long, another range)."""

    transient = True


# Codes from https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html and what MinIO,
# Ceph and moto send for the same causes. Any other code is classified by its HTTP status.
_BY_CODE: dict[str, type[SourceError]] = {
    "AccessDenied": AccessDeniedError,
    "AllAccessDisabled": AccessDeniedError,
    "AccountProblem": AccessDeniedError,
    "InvalidObjectState": AccessDeniedError,  # archived in Glacier
    "ExpiredToken": CredentialsExpiredError,
    # They were valid at mount, so they were rotated: new ones will follow.
    "InvalidAccessKeyId": CredentialsExpiredError,
    "SignatureDoesNotMatch": CredentialsExpiredError,
    "InvalidToken": CredentialsExpiredError,
    "TokenRefreshRequired": CredentialsExpiredError,
    # From STS, about a pod's token, which is renewed: docs.aws.amazon.com/STS/latest/APIReference/
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


# Hints for the user, by error code.
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


def hint_for(status: int | None, code: str | None) -> str:
    """A hint for the user about an error of S3, to append to its message; may be empty."""
    kind = classify(status, code)
    if code in _HINTS:
        return f"; {_HINTS[code]}"
    if kind is AccessDeniedError:
        return "; the permissions s3:ListBucket and s3:GetObject are needed"
    if kind is WrongRegionError:
        return "; set --region to the bucket's region"
    return ""


def classify(status: int | None, code: str | None) -> type[SourceError]:
    """The error class for an HTTP status and the `<Code>` of S3's error body, if there are any."""
    if code in _BY_CODE:
        return _BY_CODE[code]
    if status is None or status >= 500:
        return UnavailableError
    return _BY_STATUS.get(status, BadRequestError)
