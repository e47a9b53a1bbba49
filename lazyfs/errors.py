"""All errors of the project. `store/refusals.py` maps answers of S3 to them.

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
        retry_after_s: how long S3 said to wait before the next request; 0: it did not say.
    """

    errno: ClassVar[int] = errno.EIO
    transient: ClassVar[bool] = False
    retry_after_s: float = 0.0


class AccessDeniedError(SourceError):
    """The credentials do not permit this, or there are none."""

    errno = errno.EACCES


class ArchivedError(AccessDeniedError):
    """The object is in an archive (Glacier) and must be restored before it can be read."""


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


class NotSupportedError(BadRequestError):
    """The service does not know this kind of request."""


class TooManyNamesError(SourceError):
    """There are more names than fit into the memory for them."""


class FaultError(SourceError):
    """A bug of lazyfs prevented an answer. The log has its traceback (`lazyfs/faults.py`)."""


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
