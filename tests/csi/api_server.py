"""A small Kubernetes API server: objects by path, over real HTTP."""

from __future__ import annotations

import http.server
import json
import ssl
import threading
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

NAMESPACE = "lazyfs-system"


class FakeApiServer:
    """Answers as the API server does for what the driver asks.

    Args:
        directory: where a service account is put, as kubelet does it.
        tls: a certificate and its key, to serve https, and the authority to trust.
    """

    def __init__(self, directory: Path, tls: tuple[Path, Path, Path] | None = None) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.token = "token-1"
        self.forbidden: set[str] = set()
        self.failures = 0
        self.requests: list[str] = []
        self.account = directory
        directory.mkdir(exist_ok=True)
        (directory / "namespace").write_text(NAMESPACE)
        (directory / "token").write_text(self.token)
        handler = type("Handler", (_Handler,), {"cluster": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        if tls:
            certificate, key, authority = tls
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, key)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            (directory / "ca.crt").write_bytes(authority.read_bytes())
        scheme = "https" if tls else "http"
        self.url = f"{scheme}://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def renew_token(self, token: str) -> None:
        """Accept only this one from now on, and have it where kubelet puts it."""
        self.token = token
        (self.account / "token").write_text(token)

    def claim(self, namespace: str, name: str, annotations: dict[str, str] | None = None) -> None:
        """Put a PersistentVolumeClaim."""
        path = f"/api/v1/namespaces/{namespace}/persistentvolumeclaims/{name}"
        metadata: dict[str, Any] = {"name": name, "namespace": namespace}
        if annotations:
            metadata["annotations"] = annotations
        self.objects[path] = {"kind": "PersistentVolumeClaim", "metadata": metadata}

    def config_maps(self) -> list[dict[str, Any]]:
        """All ConfigMaps."""
        return [each for path, each in self.objects.items() if "/configmaps/" in path]

    def stop(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    cluster: FakeApiServer
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet
    lock = threading.Lock()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.lock:
            status, answer = self._decide(body)
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _decide(self, body: bytes) -> tuple[int, Any]:
        cluster, parts = self.cluster, urlsplit(self.path)
        cluster.requests.append(f"{self.command} {parts.path}")
        if cluster.failures:
            cluster.failures -= 1
            return 503, {"message": "etcd is away"}
        if self.headers.get("Authorization") != f"Bearer {cluster.token}":
            return 401, {"message": "Unauthorized"}
        kind = parts.path.split("/")[5]
        if kind in cluster.forbidden:
            return 403, {"message": f"{kind} is forbidden"}
        if self.command == "POST":
            made = json.loads(body)
            path = f"{parts.path}/{made['metadata']['name']}"
            if path in cluster.objects:
                return 409, {"message": "already exists", "reason": "AlreadyExists"}
            cluster.objects[path] = made
            return 201, made
        if parts.path.endswith("/configmaps"):
            return 200, self._list(parts.path, parse_qs(parts.query))
        if parts.path not in cluster.objects:
            return 404, {"message": f"{parts.path} not found"}
        if self.command == "DELETE":
            del cluster.objects[parts.path]
            return 200, {"status": "Success"}
        return 200, cluster.objects[parts.path]

    def _list(self, path: str, query: dict[str, list[str]]) -> Any:
        (selector,) = query["labelSelector"]
        key, _, value = selector.partition("=")
        found = [
            each
            for where, each in sorted(self.cluster.objects.items())
            if where.startswith(f"{path}/") and each["metadata"]["labels"].get(key) == value
        ]
        begin, size = int(query.get("continue", ["0"])[0]), int(query["limit"][0])
        more = begin + size < len(found)
        return {
            "items": found[begin : begin + size],
            "metadata": {"continue": str(begin + size)} if more else {},
        }

    def log_message(self, *arguments: object) -> None:
        pass
