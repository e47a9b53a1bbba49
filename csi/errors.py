"""Errors of RPCs, and the only mapping from lazyfs errors to gRPC codes.

Codes as in the specification's table of general errors and those of each RPC
(https://github.com/container-storage-interface/spec/blob/v1.12.0/spec.md#error-scheme).
"""

from __future__ import annotations

import re

from grpc import StatusCode

from lazyfs import errors
from lazyfs.errors import DaemonError, LazyfsError
from lazyfs.handover.keeper import KeeperError


class RpcError(LazyfsError):
    """Ends an RPC with a code and a message.

    Args:
        code: one of the specification's tables.
        message: one line: what is wrong, with which volume or field, and what to do.
    """

    def __init__(self, code: StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class InvalidArgumentError(RpcError):
    """A field of the request is missing or not allowed.

    csi-provisioner 6 retries only after five minutes (sig-storage-lib-external-provisioner,
    isInfeasibleError), so do not use it for errors that a user can correct in a claim or a Secret.
    """

    def __init__(self, message: str) -> None:
        super().__init__(StatusCode.INVALID_ARGUMENT, message)


class MendableError(RpcError):
    """The annotation or the Secret that a request refers to is wrong.

    csi-provisioner retries when the claim changes, and after pauses that grow from a second.
    """

    def __init__(self, message: str) -> None:
        super().__init__(StatusCode.FAILED_PRECONDITION, message)


# S3's id of a request (`told_request`).
_REQUEST_ID = re.compile(r" \(request [^)]*\)")
# Any other error is a fault of lazyfs: INTERNAL.
_CODES: dict[str, StatusCode] = {
    kind.__name__: code
    for kind, code in (
        (errors.OptionError, StatusCode.INVALID_ARGUMENT),
        (errors.AccessDeniedError, StatusCode.PERMISSION_DENIED),
        (errors.CredentialsExpiredError, StatusCode.UNAUTHENTICATED),
        (errors.NoSuchBucketError, StatusCode.NOT_FOUND),
        (errors.ObjectGoneError, StatusCode.NOT_FOUND),
        (errors.ObjectChangedError, StatusCode.FAILED_PRECONDITION),
        (errors.WrongRegionError, StatusCode.FAILED_PRECONDITION),
        (errors.BadRequestError, StatusCode.FAILED_PRECONDITION),
        (errors.UntrustedError, StatusCode.FAILED_PRECONDITION),
        (errors.ThrottledError, StatusCode.UNAVAILABLE),
        (errors.UnavailableError, StatusCode.UNAVAILABLE),
        (errors.BadResponseError, StatusCode.UNAVAILABLE),
        (KeeperError, StatusCode.UNAVAILABLE),
    )
}


def code_of(error: LazyfsError | KeeperError) -> StatusCode:
    """The gRPC code of an error; for a DaemonError, that of the error in the daemon."""
    if isinstance(error, RpcError):
        return error.code
    kind = error.kind if isinstance(error, DaemonError) else type(error).__name__
    return _CODES.get(kind, StatusCode.INTERNAL)


def without_ids(message: str) -> str:
    """A message without request ids, which are in the log.

    Kubernetes counts repeated events with equal text, and makes a new event for any other text.
    """
    return _REQUEST_ID.sub("", message)
