"""Errors of RPCs, and the only map from the project's errors to gRPC codes.

Codes as in the specification's table of general errors and those of each RPC
(https://github.com/container-storage-interface/spec/blob/v1.12.0/spec.md#error-scheme).
"""

from __future__ import annotations

from grpc import StatusCode

from lazyfs import errors
from lazyfs.errors import DaemonError, LazyfsError
from lazyfs.handover.keeper import KeeperError


class RpcError(LazyfsError):
    """An RPC ends with this code and message.

    Args:
        code: of the specification's tables.
        message: one line for a person: what, of which volume or field, and what to do.
    """

    def __init__(self, code: StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class InvalidArgumentError(RpcError):
    """A field of the request is missing or not allowed."""

    def __init__(self, message: str) -> None:
        super().__init__(StatusCode.INVALID_ARGUMENT, message)


# An error that is not here is one of ours: INTERNAL.
_CODES: dict[str, StatusCode] = {
    kind.__name__: code
    for kind, code in (
        (errors.OptionError, StatusCode.INVALID_ARGUMENT),
        (errors.AccessDeniedError, StatusCode.PERMISSION_DENIED),
        (errors.CredentialsExpiredError, StatusCode.UNAUTHENTICATED),
        (errors.NoSuchBucketError, StatusCode.NOT_FOUND),
        (errors.ObjectGoneError, StatusCode.NOT_FOUND),
        (errors.ObjectChangedError, StatusCode.FAILED_PRECONDITION),
        (errors.WrongRegionError, StatusCode.INVALID_ARGUMENT),
        (errors.BadRequestError, StatusCode.INVALID_ARGUMENT),
        (errors.UntrustedError, StatusCode.FAILED_PRECONDITION),
        (errors.ThrottledError, StatusCode.UNAVAILABLE),
        (errors.UnavailableError, StatusCode.UNAVAILABLE),
        (errors.BadResponseError, StatusCode.UNAVAILABLE),
        (KeeperError, StatusCode.UNAVAILABLE),
    )
}


def code_of(error: LazyfsError | KeeperError) -> StatusCode:
    """The gRPC code of an error; of a daemon's error that of what the daemon said it was."""
    if isinstance(error, RpcError):
        return error.code
    kind = error.kind if isinstance(error, DaemonError) else type(error).__name__
    return _CODES.get(kind, StatusCode.INTERNAL)
