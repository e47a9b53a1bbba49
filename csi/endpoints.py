"""The endpoints that inline volumes may name. The administrator decides where nodes connect to.

The node plugin is in the network of its node. If authors of pods could choose any endpoint, they
could reach a metadata service, kubelet, and all services in the cluster. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from lazyfs.errors import OptionError
from lazyfs.store.resolved_source import is_of_aws

AWS, ANY = "aws", "any"
_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?|\[[0-9a-f:.]+\]")
_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)*")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint that may be used.

    Attributes:
        url: the URL to use; made from its parsed parts, so that all parsers agree on it.
        is_named: the administrator wrote exactly this, or it is AWS.
    """

    url: str
    is_named: bool


class AllowedEndpoints:
    """The endpoints of `--allowed-endpoint`.

    Args:
        texts: URLs, `aws` or `any`.

    Raises:
        OptionError: one is neither.
    """

    def __init__(self, texts: Iterable[str] = (AWS,)) -> None:
        self._texts = tuple(texts)
        self._named = set()
        for text in self._texts:
            if text in (AWS, ANY):
                continue
            url = _canonical(text)
            if url is None:
                raise OptionError(
                    f"--allowed-endpoint: {text!r} is not allowed: {AWS}, {ANY}, or a URL such as "
                    "https://minio.storage:9000"
                )
            self._named.add(url)

    def find(self, text: str, default: str | None = None) -> Endpoint | None:
        """The endpoint of that name; None if it may not be used.

        Args:
            default: the endpoint of volumes that name none.
        """
        if text == default:
            return Endpoint(text, is_named=True)
        url = _canonical(text)
        if url is None:
            return None
        if url in self._named or (default is not None and url == _canonical(default)):
            return Endpoint(url, is_named=True)
        if AWS in self._texts and is_of_aws(url):
            return Endpoint(url, is_named=True)
        return Endpoint(url, is_named=False) if ANY in self._texts else None

    def shown(self, default: str | None = None) -> str:
        """The allowed endpoints, for messages."""
        texts = [*([default] if default else []), *self._texts]
        return ", ".join("AWS" if each == AWS else each for each in texts) or "none"


def _canonical(text: str) -> str | None:
    """The normal form of a URL, for comparisons; None if it is not an endpoint."""
    try:
        parts = urlsplit(text)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        return None
    host = f"[{host}]" if ":" in host else host
    path = parts.path.rstrip("/")
    if parts.scheme not in _PORTS or not _HOST.fullmatch(host) or not _PATH.fullmatch(path):
        return None
    shown_port = "" if port in (None, _PORTS[parts.scheme]) else f":{port}"
    url = f"{parts.scheme}://{host}{shown_port}{path}"
    is_whole = text.rstrip("/").lower() in (
        url.lower(), f"{parts.scheme}://{parts.netloc}{path}".lower()
    )  # fmt: skip
    return url if is_whole and "@" not in parts.netloc else None
