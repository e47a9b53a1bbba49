"""A local S3 server with a configurable speed: nginx over a directory.

It implements the part of S3 that lazyfs and its peers use: ListObjects (both versions), HeadBucket,
HeadObject, GetObject with Range and If-Match. It sends bodies with sendfile, so it uses little of
the cores that it shares with its client. Needs Debian's `nginx-light` or `nginx` with
`libnginx-mod-http-lua`, and root for the throttled link.

Profiles:

    unlimited   no limits
    tls         the same over https, with a certificate of its own (needs openssl)
    s3like      30 ms to the first byte, 90 MB/s per connection, as seen with one S3 host
    throttled   30 ms to the first byte, and all connections share one link of 250 MB/s: a token
                bucket (tc-tbf) on the loopback device
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BUCKET = "bench"
PROFILES = ("unlimited", "s3like", "throttled", "tls")
DEFAULT_LINK = 250_000_000

CONFIG = """
daemon off;
load_module /usr/lib/nginx/modules/ndk_http_module.so;
load_module /usr/lib/nginx/modules/ngx_http_lua_module.so;
worker_processes 2;
pid {base}/nginx.pid;
error_log {base}/error.log warn;
events {{ worker_connections 4096; }}
http {{
    log_format counted
        '$msec $request_time $request_method $status $body_bytes_sent $request_uri';
    access_log {base}/access.log counted;
    client_body_temp_path {base}/body; proxy_temp_path {base}/proxy; fastcgi_temp_path {base}/fcgi;
    uwsgi_temp_path {base}/uwsgi; scgi_temp_path {base}/scgi;
    sendfile on; tcp_nopush on; keepalive_requests 1000000; etag off;
    default_type application/octet-stream;
    lua_package_path "{base}/?.lua;;";
    init_by_lua_block {{ listing = require "listing" }}
    server {{
        listen 127.0.0.1:{port} backlog=1024 {ssl};
        {tls}
        root {root};
        location = /{bucket} {{ content_by_lua_block {{ listing.answer() }} }}
        location = /{bucket}/ {{ content_by_lua_block {{ listing.answer() }} }}
        location /{bucket}/ {{
            alias {directory}/;
            access_by_lua_block {{ listing.admit() {delay} }}
            header_filter_by_lua_block {{ listing.name() }}
            {rate}
            error_page 404 = @missing;
        }}
        location @missing {{
            internal;
            content_by_lua_block {{
                ngx.status = 404
                ngx.say("<Error><Code>NoSuchKey</Code><Message>missing</Message></Error>")
            }}
        }}
    }}
}}
"""

TLS = "ssl_certificate {base}/server.pem; ssl_certificate_key {base}/server.key;"

LISTING = """
local objects = {{
{rows}
}}
local M, etags = {{}}, {{}}
for _, o in ipairs(objects) do etags["/{bucket}/" .. o[1]] = '"' .. o[3] .. '"' end

-- ETags look as S3's do: some clients take what nginx makes for a count of parts.
function M.admit()
    local wanted = ngx.var.http_if_match
    if wanted ~= nil and wanted ~= "*" and wanted ~= etags[ngx.var.uri] then
        ngx.status = 412
        ngx.say("<Error><Code>PreconditionFailed</Code><Message>other ETag</Message></Error>")
        return ngx.exit(412)
    end
    ngx.req.clear_header("If-Match")
end

function M.name()
    if ngx.status == 200 or ngx.status == 206 then ngx.header.ETag = etags[ngx.var.uri] end
end

local function encode(text)
    return (text:gsub("[^%w%-%._~/]", function(c) return string.format("%%%02X", c:byte()) end))
end

function M.answer()
    local args = ngx.req.get_uri_args()
    if ngx.req.get_method() == "HEAD" then return ngx.exit(200) end
    if args.location ~= nil then
        ngx.header.content_type = "application/xml"
        return ngx.say("<LocationConstraint></LocationConstraint>")
    end
    local prefix, delimiter = args.prefix or "", args.delimiter or ""
    if type(prefix) ~= "string" then prefix = "" end
    if type(delimiter) ~= "string" then delimiter = "" end
    local most = tonumber(args["max-keys"]) or 1000
    local v2 = args["list-type"] == "2"
    local after = args["continuation-token"] or args["start-after"] or args.marker or ""
    if type(after) ~= "string" then after = "" end
    local out, seen, count, last, more = {{}}, {{}}, 0, nil, false
    for _, o in ipairs(objects) do
        local key = o[1]
        if key:sub(1, #prefix) == prefix then
            local cut = delimiter ~= "" and key:find(delimiter, #prefix + 1, true)
            local shown = cut and key:sub(1, cut) or key
            if shown > after and not seen[shown] then
                if count == most then more = true break end
                seen[shown] = true
                count = count + 1
                last = shown
                if cut then
                    out[#out + 1] = "<CommonPrefixes><Prefix>" .. encode(shown)
                        .. "</Prefix></CommonPrefixes>"
                else
                    out[#out + 1] = "<Contents><Key>" .. encode(key) .. "</Key><Size>" .. o[2]
                        .. "</Size><ETag>&quot;" .. o[3] .. "&quot;</ETag><LastModified>" .. o[4]
                        .. "</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
                end
            end
        end
    end
    ngx.header.content_type = "application/xml"
    ngx.say('<?xml version="1.0" encoding="UTF-8"?>',
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>{bucket}</Name>',
        "<Prefix>", encode(prefix), "</Prefix><MaxKeys>", most, "</MaxKeys><KeyCount>", count,
        "</KeyCount><EncodingType>url</EncodingType><IsTruncated>", tostring(more),
        "</IsTruncated>",
        more and ("<NextContinuationToken>" .. encode(last) .. "</NextContinuationToken>"
            .. "<NextMarker>" .. encode(last) .. "</NextMarker>") or "",
        table.concat(out), "</ListBucketResult>")
end

return M
"""


@dataclass(frozen=True, slots=True)
class Requests:
    """Requests to the origin since a mark."""

    lists: int
    heads: int
    gets: int
    bytes: int


class Origin:
    """A running origin.

    Attributes:
        url: the endpoint.
        directory: the directory that it serves as the bucket `bench`.
        certificate: file with the CA certificate, if it serves https.
        environment: environment variables for its clients.
    """

    def __init__(self, directory: Path, url: str, base: Path, certificate: Path | None) -> None:
        self.directory = directory
        self.url = url
        self.certificate = certificate
        self.environment = environment(certificate)
        self._log = base / "access.log"
        self._mark = 0

    def mark(self) -> None:
        """Start to count."""
        self._mark = self._log.stat().st_size

    def requests(self) -> Requests:
        """Requests since the mark."""
        lists = heads = gets = size = 0
        with open(self._log) as log:
            log.seek(self._mark)
            for line in log:
                _, _, method, status, sent, uri = line.split(" ", 5)
                if not uri.strip().partition("?")[0].removeprefix(f"/{BUCKET}").strip("/"):
                    lists += method == "GET"
                elif method == "HEAD":
                    heads += 1
                elif status in ("200", "206"):
                    gets += 1
                    size += int(sent)
        return Requests(lists, heads, gets, size)

    def first_range(self) -> float:
        """When the first GET of a block since the mark arrived, in seconds since the epoch.

        That is a range of more than one byte: one byte shows whether an object can be read.

        Raises:
            SystemExit: there was none.
        """
        with open(self._log) as log:
            log.seek(self._mark)
            lines = [line.split(" ", 5) for line in log]
        began = [
            float(end) - float(took)
            for end, took, _, status, sent, _ in lines
            if status == "206" and int(sent) > 1
        ]
        if not began:
            raise SystemExit("bench: the origin was not asked for a block")
        return min(began)


@contextlib.contextmanager
def serve(directory: Path, profile: str, link: int = DEFAULT_LINK) -> Iterator[Origin]:
    """Serve a directory tree as the bucket `bench`.

    Args:
        profile: one of `PROFILES`.
        link: bytes per second of the throttled link.
    """
    tls = profile == "tls"
    if shutil.which("nginx") is None:
        raise SystemExit("bench: nginx is missing: apt-get install nginx libnginx-mod-http-lua")
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lazyfs-origin-")))
        base.chmod(0o755)
        port = _free_port()
        if profile == "throttled":
            stack.enter_context(_shaped_link(link))
        settings = {
            "base": base, "root": directory, "directory": directory, "bucket": BUCKET,
            "port": port,
            "tls": TLS.format(base=base) if tls else "",
            "ssl": "ssl" if tls else "",
            "delay": "ngx.sleep(0.03)" if profile in ("s3like", "throttled") else "",
            "rate": "limit_rate 90m;" if profile == "s3like" else "",
        }  # fmt: skip
        (base / "nginx.conf").write_text("user root;\n" + CONFIG.format(**settings))
        (base / "listing.lua").write_text(LISTING.format(rows=_index(directory), bucket=BUCKET))
        certificate = _make_certificate(base) if tls else None
        process = subprocess.Popen(
            ["nginx", "-p", base, "-e", base / "error.log", "-c", base / "nginx.conf"]
        )
        stack.callback(stop, process)
        url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
        origin = Origin(directory, url, base, certificate)
        _wait_until_up(port, process, base)
        origin.mark()
        yield origin


def _index(directory: Path) -> str:
    """All files in key order, as rows of a Lua table."""
    rows = []
    for path in sorted(directory.rglob("*"), key=lambda p: p.relative_to(directory).as_posix()):
        if path.is_file():
            modified = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(path.stat().st_mtime))
            key = path.relative_to(directory).as_posix().replace('"', '\\"')
            size = path.stat().st_size
            rows.append(f'{{"{key}", "{size}", "{etag(path)}", "{modified}"}},')
    return "\n".join(rows)


def etag(path: Path) -> str:
    """The ETag of a file, without quotes. It changes when the file is rewritten."""
    status = path.stat()
    identity = f"{path} {status.st_mtime_ns} {status.st_size}"
    return hashlib.md5(identity.encode(), usedforsecurity=False).hexdigest()


@contextlib.contextmanager
def _shaped_link(rate: int) -> Iterator[None]:
    """Limit the loopback device to `rate` bytes per second."""
    words = ["dev", "lo", "root", "tbf", "rate", f"{rate * 8}bit", "burst", "1mb",
             "latency", "200ms"]  # fmt: skip
    try:
        subprocess.run(["tc", "qdisc", "replace", *words], check=True, timeout=20)
        yield
    finally:
        subprocess.run(["tc", "qdisc", "del", "dev", "lo", "root"], check=True, timeout=20)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _make_certificate(base: Path) -> Path:
    """Create a certificate for 127.0.0.1, signed by a new CA. Returns the file of the CA."""
    for name, extra in (
        ("authority", []),
        ("server", ["-CA", "authority.pem", "-CAkey", "authority.key", "-addext",
                    "basicConstraints=critical,CA:FALSE", "-addext",
                    "subjectAltName=IP:127.0.0.1"]),
    ):  # fmt: skip
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
             f"/CN={name}", "-out", f"{name}.pem", "-keyout", f"{name}.key", *extra],
            cwd=base, check=True, capture_output=True, timeout=60,
        )  # fmt: skip
    return base / "authority.pem"


def _wait_until_up(port: int, process: subprocess.Popen[bytes], base: Path) -> None:
    deadline = time.monotonic() + 15
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=2).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                log = base / "error.log"
                text = log.read_text() if log.exists() else ""
                raise SystemExit(f"bench: nginx did not start: {text.strip()}") from None
            time.sleep(0.05)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that this program started."""
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(timeout=10)


def environment(certificate: Path | None = None) -> dict[str, str]:
    """Environment for clients of an origin: dummy credentials, and none of the user's settings.

    Args:
        certificate: file of the CA to trust, for https.
    """
    kept = {k: v for k, v in os.environ.items() if not re.match("AWS_|LAZYFS_|RCLONE_", k)}
    kept |= {
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }
    return kept | ({"AWS_CA_BUNDLE": str(certificate)} if certificate else {})
