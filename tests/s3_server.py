"""A moto S3 that counts requests and misbehaves on demand; run as a program of its own.

It is a process apart from the tests and from the daemon, so that none of them waits for another's
interpreter lock. Below `/_test/` it takes orders: `GET requests`, `DELETE requests`, `PUT fault`,
`PUT objects`, `PUT access` (the access keys that are let in, "" for unsigned requests; null: all).
A fault is JSON: {"match": regex on "METHOD /path?query", "kind": ..., "times": N}, perhaps with a
"range", the value of the header, and with kinds
`status` (with "status" and "code"), `hang` (with "seconds"), `truncate`, `reset`, `corrupt_range`,
`slow` (the body in ten parts, one in every "seconds"), `headers` ("add" in the
place of those that begin with "without").
"""

from __future__ import annotations

import json
import logging
import re
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import WSGIRequestHandler, make_server


class Middleware:
    """Counts, and applies faults."""

    def __init__(self, application: Any) -> None:
        self.application = application
        self.requests: list[dict[str, Any]] = []
        self.faults: list[dict[str, Any]] = []
        self.let_in: list[str] | None = None
        self.lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ.get("RAW_URI") or environ["PATH_INFO"]
        if path.startswith("/_test/"):
            return self.control(method, path, environ, start_response)
        line = f"{method} {path}"
        with self.lock:
            if method in ("GET", "HEAD"):
                self.requests.append({"line": line, "range": environ.get("HTTP_RANGE")})
            wanted = environ.get("HTTP_RANGE")
            fault = next(
                (
                    f
                    for f in self.faults
                    if re.search(f["match"], line) and f.get("range", wanted) == wanted
                ),
                None,
            )
            if fault:
                fault["times"] -= 1
                self.faults = [f for f in self.faults if f["times"] > 0]
        if not fault and not self.may_enter(environ):
            code = "InvalidAccessKeyId" if "HTTP_AUTHORIZATION" in environ else "AccessDenied"
            fault = {"kind": "status", "status": 403, "code": code}
        if fault:
            return self.misbehave(fault, environ, start_response)
        return self.application(environ, start_response)

    def may_enter(self, environ: dict[str, Any]) -> bool:
        found = re.search("Credential=([^/]*)", environ.get("HTTP_AUTHORIZATION", ""))
        return self.let_in is None or (found[1] if found else "") in self.let_in

    def control(
        self, method: str, path: str, environ: dict[str, Any], start_response: Any
    ) -> Iterable[bytes]:
        answer: Any = None
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        with self.lock:
            if path == "/_test/requests":
                answer = self.requests
                if method == "DELETE":
                    self.requests = []
            elif path == "/_test/access":
                self.let_in = json.loads(body)
            elif path == "/_test/objects":
                put_many(**json.loads(body))
            elif method == "DELETE":
                self.faults = []
            else:
                self.faults.append(json.loads(body))
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(answer).encode()]

    def misbehave(
        self, fault: dict[str, Any], environ: dict[str, Any], start_response: Any
    ) -> Iterable[bytes]:
        if fault["kind"] == "status":
            code = fault.get("code", "Fault")
            headers = [("Content-Type", "application/xml"), *fault.get("headers", {}).items()]
            start_response(f"{fault['status']} Fault", headers)
            return [f"<Error><Code>{code}</Code><Message>as told</Message></Error>".encode()]
        if fault["kind"] == "hang":
            time.sleep(fault["seconds"])
            return self.application(environ, start_response)
        if fault["kind"] == "reset":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
        if fault["kind"] == "corrupt_range":

            def shifted(status: str, headers: list[tuple[str, str]], info: Any = None) -> Any:
                wrong = [
                    (k, v if k.lower() != "content-range" else "bytes 1-2/3") for k, v in headers
                ]
                return start_response(status, wrong, info)

            return self.application(environ, shifted)
        if fault["kind"] == "headers":

            def with_more(status: str, headers: list[tuple[str, str]], info: Any = None) -> Any:
                kept = [one for one in headers if not one[0].lower().startswith(fault["without"])]
                return start_response(status, [*kept, *fault["add"].items()], info)

            return self.application(environ, with_more)
        if fault["kind"] == "slow":
            return self.slow(self.application(environ, start_response), fault["seconds"])
        assert fault["kind"] == "truncate"
        return self.half(self.application(environ, start_response))

    @staticmethod
    def half(body: Iterable[bytes]) -> Iterator[bytes]:
        whole = b"".join(body)
        yield whole[: len(whole) // 2]
        raise ConnectionResetError

    @staticmethod
    def slow(body: Iterable[bytes], seconds: float) -> Iterator[bytes]:
        whole = b"".join(body)
        part = -(-len(whole) // 10) or 1
        for start in range(0, len(whole), part):
            time.sleep(seconds)
            yield whole[start : start + part]


def put_many(bucket: str, keys: list[str]) -> None:
    """Put objects whose content is their key, without a request for each."""
    backend = s3_backends["123456789012"]["aws"]
    for key in keys:
        backend.put_object(bucket, key, key.encode())


class Handler(WSGIRequestHandler):
    """HTTP/1.1 with connections kept open, as S3 has them, and a quiet log."""

    protocol_version = "HTTP/1.1"

    def make_environ(self) -> dict[str, Any]:
        environ = super().make_environ()
        environ["RAW_URI"] = self.path
        return environ

    def log(self, *args: Any) -> None:
        pass


def main() -> None:
    """Serve until standard input ends; prints the port. Arguments, for TLS: certificate, key."""
    logging.disable(logging.CRITICAL)
    application = Middleware(DomainDispatcherApplication(create_backend_app))
    tls = (sys.argv[1], sys.argv[2]) if len(sys.argv) > 1 else None
    server = make_server(
        "127.0.0.1", 0, application, threaded=True, request_handler=Handler, ssl_context=tls
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
