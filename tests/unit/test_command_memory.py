"""Commands that parse foreign data end alone, with one line, when it takes too much memory."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from urllib.parse import parse_qs, urlsplit

import pytest

COMMAND = """
import sys
from lazyfs.process import privileges
privileges.MEMORY_BYTES, privileges.MEMORY_SHARE = 160 << 20, 0
from lazyfs.cli import main
main(sys.argv[1:])
"""


class Endless(http.server.BaseHTTPRequestHandler):
    """Lists a thousand more keys of nearly a KiB, however often it is asked."""

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        page = int(query.get("continuation-token", ["0"])[0])
        items = "".join(
            f"<Contents><Key>m/{page:08}{number:04}{'x' * 900}</Key><Size>1</Size><ETag>e</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for number in range(1000)
        )
        body = (
            f"<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>{page + 1}"
            f"</NextContinuationToken>{items}</ListBucketResult>"
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("command", ["inspect", "warm"])
def test_a_listing_without_an_end_is_one_line(
    command: str, endpoint: str, tmp_path: object
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, command, "s3://bucket/m", f"--endpoint-url={endpoint}",
         "--no-sign-request", "--memory-limit=64MiB", f"--cache-dir={tmp_path}/cache"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "no more memory" in done.stderr.splitlines()[-1], done.stderr
