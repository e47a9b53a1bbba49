"""The credentials of a volume: those of a Secret, of a pod's service account, or none.

    secrets of the call           the keys in them
    roleArn of the volume         the pod's service-account token, which STS exchanges for keys of
                                  that role (AssumeRoleWithWebIdentity)
    neither                       the node plugin's own, as botocore finds them, or unsigned
                                  requests with noSignRequest

kubelet brings a token when a pod is published, and a newer one by publishing again, if the
CSIDriver object has `tokenRequests` and `requiresRepublish`
(https://kubernetes-csi.github.io/docs/token-requests.html). Pure: no I/O, and no value of a secret
or a token in any message.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from csi.errors import InvalidArgumentError
from csi.volume_attributes import Volume, credentials_of
from lazyfs.store.credentials import Credentials, WebIdentity

# Keys of a publish call's attributes; the tokens may be among its secrets instead (CSIDriver,
# serviceAccountTokenInSecrets).
TOKENS = "csi.storage.k8s.io/serviceAccount.tokens"
ACCOUNT = "csi.storage.k8s.io/serviceAccount.name"
NAMESPACE = "csi.storage.k8s.io/pod.namespace"
# The audience of tokens for STS; with other providers, the only token is used.
AUDIENCE = "sts.amazonaws.com"
# https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRoleWithWebIdentity.html
LONGEST_SESSION_NAME = 64


def of_stage(volume: Volume, secrets: Mapping[str, str]) -> Credentials | None:
    """The credentials of a NodeStageVolume call.

    Raises:
        InvalidArgumentError: the secrets are malformed, or contradict the volume.
    """
    credentials = credentials_of(secrets)
    if credentials is not None and volume.role_arn:
        raise InvalidArgumentError(
            "roleArn and a secret with keys: the volume can be read with one of them; leave one out"
        )
    return credentials


def of_publish(
    volume: Volume, secrets: Mapping[str, str], attributes: Mapping[str, str]
) -> Credentials | None:
    """The credentials of a NodePublishVolume call.

    Args:
        attributes: `volume_context`, including what kubelet added.

    Raises:
        InvalidArgumentError: something required is missing or malformed.
    """
    if volume.role_arn is None:
        return of_stage(volume, secrets)
    of_stage(volume, secrets)
    namespace, account = attributes.get(NAMESPACE), attributes.get(ACCOUNT)
    if not namespace or not account:
        raise InvalidArgumentError(
            "roleArn needs to know the pod: the CSIDriver object must have podInfoOnMount: true"
        )
    tokens = secrets.get(TOKENS) or attributes.get(TOKENS)
    if not tokens:
        raise InvalidArgumentError(
            "roleArn needs the pod's service-account token: the CSIDriver object must have "
            f"tokenRequests with audience {AUDIENCE}, and requiresRepublish: true"
        )
    return WebIdentity(volume.role_arn, session_name(namespace, account), _token(tokens))


def session_name(namespace: str, account: str) -> str:
    """The session name of a service account in STS and its logs, unique for each account.

    A namespace has no dots, so no two accounts share a name. A long name ends in `@` and a digest;
    no name in Kubernetes contains an `@`, so no account can get the name of another.
    """
    name = f"{namespace}.{account}"
    if len(name) <= LONGEST_SESSION_NAME:
        return name
    digest = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
    return f"{name[: LONGEST_SESSION_NAME - len(digest) - 1]}@{digest}"


def owner_of(volume_id: str, attributes: Mapping[str, str]) -> str:
    """The owner of the credentials in a NodePublishVolume call: the pods of a service account.

    Args:
        attributes: `volume_context`, including what kubelet added.
    """
    namespace, account = attributes.get(NAMESPACE), attributes.get(ACCOUNT)
    return f"{namespace}/{account}" if namespace and account else f"volume {volume_id}"


def _token(text: str) -> str:
    """The token for STS of `{"AUDIENCE": {"token": ..., "expirationTimestamp": ...}}`."""
    try:
        by_audience = json.loads(text)
        of_sts = by_audience.get(AUDIENCE)
        if of_sts is None and len(by_audience) == 1:
            (of_sts,) = by_audience.values()
        token = None if of_sts is None else of_sts["token"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InvalidArgumentError(f"{TOKENS} is not what kubelet sends") from None
    if not isinstance(token, str) or not token:
        raise InvalidArgumentError(
            f"{TOKENS} has no token for {AUDIENCE}; it has {', '.join(sorted(by_audience))}"
        )
    return token
