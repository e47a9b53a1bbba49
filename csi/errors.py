"""Errors of RPCs, and the only map from the project's errors to gRPC codes.

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
    """An RPC ends with this code and message.

    Args:
        code: of the specification's tables.
        message: one line for a person: what, of which volume or field, and what to do.
    """

    def __init__(self, code: StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class InvalidArgumentError(RpcError):
    """A field of the request is missing or not allowed.

    csi-provisioner 6 asks again only after five minutes (sig-storage-lib-external-provisioner,
    isInfeasibleError), so this is not for what a user can mend in a claim or a Secret.
    """

    def __init__(self, message: str) -> None:
        super().__init__(StatusCode.INVALID_ARGUMENT, message)


class MendableError(RpcError):
    """What the request refers to, a claim's annotation or a Secret, is not as it must be.

    csi-provisioner asks again when the claim changes, and after pauses that grow from a second.
    """

    def __init__(self, message: str) -> None:
        super().__init__(StatusCode.FAILED_PRECONDITION, message)


# S3's own id of a request (`told_request`).
_REQUEST_ID = re.compile(r" \(request [^)]*\)")
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
    """The gRPC code of an error; of a daemon's error that of what the daemon said it was."""
    if isinstance(error, RpcError):
        return error.code
    kind = error.kind if isinstance(error, DaemonError) else type(error).__name__
    return _CODES.get(kind, StatusCode.INTERNAL)


def without_ids(message: str) -> str:
    """A message without the ids of requests, which the log has.

    Kubernetes counts an event that is repeated word for word, and makes a new one of any other.
    """
    return _REQUEST_ID.sub("", message)
