"""A client for the part of the Kubernetes API that the controller needs.

It uses the pod's own service account and urllib3, which botocore depends on: a full client library
for Kubernetes is larger than all of lazyfs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, urlencode

import urllib3
from grpc import StatusCode

from csi.errors import RpcError

# Where kubelet puts the service account of a pod
# (https://kubernetes.io/docs/tasks/run-application/access-api-from-pod/).
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TIMEOUT = urllib3.Timeout(connect=3.0, read=10.0)
# Retries are safe: objects are created under unique names.
RETRIES = urllib3.Retry(
    total=3,
    backoff_factor=0.1,
    status_forcelist=(429, 500, 502, 503, 504),
    allowed_methods=None,
    redirect=0,
    raise_on_status=False,
)
PAGE = 500

Json = dict[str, Any]


class ApiServer:
    """A connection to the API server. Thread-safe.

    Args:
        url: such as `https://10.0.0.1:443`.
        account: directory with `token`, `namespace` and `ca.crt`, made by kubelet. The token is
            read again for every request, because kubelet renews it.
    """

    def __init__(self, url: str, account: Path) -> None:
        self._url = url
        self._token = account / "token"
        self.namespace = (account / "namespace").read_text().strip()
        authority = account / "ca.crt"
        self._pool = urllib3.PoolManager(
            ca_certs=str(authority) if authority.exists() else None,
            timeout=TIMEOUT,
            retries=RETRIES,
        )

    @classmethod
    def of_this_pod(
        cls, environment: Mapping[str, str] = os.environ, account: Path = SERVICE_ACCOUNT
    ) -> ApiServer | None:
        """The cluster in which this process runs as a pod; None if it does not."""
        host = environment.get("KUBERNETES_SERVICE_HOST")
        port = environment.get("KUBERNETES_SERVICE_PORT", "443")
        if not host or not (account / "token").exists():
            return None
        return cls(f"https://{f'[{host}]' if ':' in host else host}:{port}", account)

    def claim_annotations(self, namespace: str, name: str) -> dict[str, str]:
        """The annotations of a PersistentVolumeClaim.

        Raises:
            RpcError: there is no such claim, or the API server refused.
        """
        claim = self.get(_path(namespace, "persistentvolumeclaims", name))
        if claim is None:
            raise RpcError(
                StatusCode.NOT_FOUND, f"there is no PersistentVolumeClaim {namespace}/{name}"
            )
        return cast(dict[str, str], claim["metadata"].get("annotations") or {})

    def get(self, path: str) -> Json | None:
        """One object; None if there is none. Raises RpcError."""
        return self._ask("GET", path, missing=404)

    def config_map_path(self, name: str = "") -> str:
        """Path of one ConfigMap in this pod's namespace, or of all."""
        return _path(self.namespace, "configmaps", name)

    def create(self, path: str, manifest: Json) -> bool:
        """Create an object in a collection; False if its name exists. Raises RpcError."""
        return self._ask("POST", path, manifest, missing=409) is not None

    def delete(self, path: str) -> None:
        """Delete an object, if it exists. Raises RpcError."""
        self._ask("DELETE", path, missing=404)

    def list(self, path: str, labels: str) -> Iterator[Json]:
        """All objects of a collection that have these labels (`key=value`). Raises RpcError."""
        query = {"labelSelector": labels, "limit": str(PAGE)}
        while True:
            page = self._ask("GET", f"{path}?{urlencode(query)}")
            assert page is not None
            yield from page["items"]
            following = page["metadata"].get("continue")
            if not following:
                return
            query["continue"] = following

    def _ask(
        self, method: str, path: str, body: Json | None = None, missing: int | None = None
    ) -> Json | None:
        """The answer to a request; None if its status is `missing`."""
        try:
            headers = {"Authorization": f"Bearer {self._token.read_text().strip()}"}
            answer = self._pool.request(
                method, self._url + path, json=body, headers=headers, redirect=False
            )
            content = json.loads(answer.data or b"{}")
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise RpcError(
                StatusCode.UNAVAILABLE,
                f"the Kubernetes API gives no usable answer: {type(error).__name__}: {error}",
            ) from error
        if answer.status < 300:
            return cast(Json, content)
        if answer.status == missing:
            return None
        raise _refused(method, path, answer.status, content)


def _path(namespace: str, kind: str, name: str = "") -> str:
    path = f"/api/v1/namespaces/{quote(namespace, safe='')}/{kind}"
    return f"{path}/{quote(name, safe='')}" if name else path


def _refused(method: str, path: str, status: int, content: Any) -> RpcError:
    message = content.get("message", "") if isinstance(content, dict) else ""
    what = f"{method} {path.partition('?')[0]}: the Kubernetes API answers {status}: {message}"
    if status in (401, 403):
        return RpcError(
            StatusCode.PERMISSION_DENIED,
            f"{what}; docs/CSI.md lists the permissions that the controller needs",
        )
    return RpcError(
        StatusCode.UNAVAILABLE if status >= 500 or status == 429 else StatusCode.INTERNAL, what
    )
