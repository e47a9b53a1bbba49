"""The tests' hand on the S3 server of `s3_server.py`."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import boto3

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test-access-key",
    "AWS_SECRET_ACCESS_KEY": "test-secret-key",
    "AWS_DEFAULT_REGION": "us-east-1",
}


class S3:
    """A running server and a client of it.

    Args:
        tls: a certificate and its key, to serve https.
        authority: that the client is to trust.
    """

    def __init__(self, *tls: Path, authority: Path | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("s3_server.py"), *tls],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        scheme = "https" if tls else "http"
        self.url = f"{scheme}://127.0.0.1:{int(self._process.stdout.readline())}"
        self.client = boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
            verify=str(authority) if authority else None,
        )

    def put(self, bucket: str, files: dict[str, bytes]) -> None:
        """Make a bucket if need be, and put objects into it."""
        self.client.create_bucket(Bucket=bucket)
        for key, body in files.items():
            self.client.put_object(Bucket=bucket, Key=key, Body=body)

    def put_many(self, bucket: str, keys: Iterable[str]) -> None:
        """Put many small objects quickly; the content of each is its key."""
        self.client.create_bucket(Bucket=bucket)
        self._control("PUT", "objects", {"bucket": bucket, "keys": list(keys)})

    def requests(self) -> list[str]:
        """`METHOD /path` of all GETs and HEADs since `forget`."""
        return [request["line"] for request in self._control("GET", "requests")]

    def data_requests(self) -> list[tuple[str, str | None]]:
        """Path and range of the GETs of objects since `forget`, but those that ask for access."""
        return [
            (line.split()[1].split("?")[0], request["range"])
            for request in self._control("GET", "requests")
            if (line := request["line"]).startswith("GET /")
            and line.count("/") > 1
            and "list-type" not in line
            and request["range"] != "bytes=0-0"
        ]

    def access_requests(self) -> list[str]:
        """Paths of the objects of which one byte was asked for since `forget`."""
        requests = self._control("GET", "requests")
        return [each["line"].split()[1] for each in requests if each["range"] == "bytes=0-0"]

    def forget(self) -> None:
        """Forget the requests and faults so far, and let everybody in."""
        self._control("PUT", "access", None)
        self.forget_requests()
        self._control("DELETE", "fault")

    def forget_requests(self) -> None:
        """Forget the requests so far, and go on as planned."""
        self._control("DELETE", "requests")

    def fault(self, match: str, kind: str, times: int = 1, **details: Any) -> None:
        """Let the next `times` requests that match go wrong."""
        self._control("PUT", "fault", {"match": match, "kind": kind, "times": times, **details})

    def let_in(self, *access_keys: str) -> None:
        """Refuse all requests but those signed with one of these keys; "" is for unsigned ones."""
        self._control("PUT", "access", access_keys)

    def stop(self) -> None:
        """End the server."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=10)
        self._process.stdout.close()

    def _control(self, method: str, what: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            f"{self.url}/_test/{what}", method=method, data=json.dumps(body).encode()
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
