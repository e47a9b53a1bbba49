"""The configuration of nginx for one node of a fleet. Pure.

The configuration ensures that the cache never does this:

- *Give a reader what S3 denies it.* For each request, the door sends S3 a request for one byte of
  the same version with the reader's own signature (`auth_request`). Only that byte, of that
  version, permits the request; any other answer does not, whatever its status. The answer is cached
  under the signature, so it never applies to another reader. In doubt the door refuses: then lazyfs
  asks S3.
- *Store anything but S3's answer to the key.* A key is host, path, ETag and range, separated by
  line feeds, which none of them can contain. Only GETs of one range of one version, without a
  query, are accepted; only the headers named here are passed on; only a 206 with the requested ETag
  and range is stored; and the administrator must have named the host, which is reached by TLS if
  its URL says so.
- *Keep a bad answer.* lazyfs finds what nginx cannot compare, such as a length that differs from
  the range. It then repeats the request with `X-Lazyfs-Refresh: 1`: shelves get the range anew, and
  the new answer replaces the stored one.
- *Answer strangers.* A shelf does not ask S3 about readers, because doors do. So it answers only
  the doors of the fleet, which it knows by address, and by certificate if there is one.
- *Follow S3's hints.* `X-Accel-*`, `Cache-Control` and similar headers of an object are ignored.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from lazyfs.fleet.groups import groups
from lazyfs.fleet.settings import FleetSettings, Origin

# The assumed size of a block; the number of keys follows from it (8,000 keys take 1 MB of memory).
_BLOCK_BYTES = 1 << 20
_KEYS_IN_MIB = 8000

_TEMPLATE = r"""# Written by lazyfs fleet-cache; changes are lost.
daemon off;
{user}
worker_processes {workers};
worker_shutdown_timeout 60s;
pid {run}/nginx.pid;
error_log stderr warn;
events {{ worker_connections {connections}; }}
http {{
    access_log off;
    server_tokens off;
    default_type application/octet-stream;
    sendfile on;
    tcp_nopush on;
    aio threads;
    keepalive_requests 100000;
    keepalive_timeout 75s;
    client_max_body_size 1;
    large_client_header_buffers 8 16k;
    client_body_temp_path {run}/tmp;
    proxy_temp_path {run}/tmp;
    fastcgi_temp_path {run}/tmp;
    uwsgi_temp_path {run}/tmp;
    scgi_temp_path {run}/tmp;
    root {run}/tmp; # nothing of it is served
    {resolver}

    map $http_host $origin {{
        default "";
{origins}
    }}
    map "$request_method $http_if_match" $has_version {{
        default 0;
        '~^GET "[!#-~]{{1,256}}"$' 1;
    }}
    map "$http_range $is_args" $has_range {{
        default 0;
        "~^bytes=[0-9]{{1,19}}-[0-9]{{1,19}} $" 1;
    }}
    map "$has_version$has_range" $is_taken {{ default 0; 11 1; }}
    map "$upstream_http_etag\n$http_if_match" $is_other_version {{
        default 1;
        '~^("[!#-~]+")\n\1$' 0;
    }}
    map "$upstream_http_content_range\n$http_range" $is_other_range {{
        default 1;
        "~^bytes[ =]([0-9]+-[0-9]+)/[0-9]+\nbytes=\1$" 0;
    }}
    map $upstream_http_content_range $is_other_byte {{
        default 1;
        "~^bytes[ =]0-0/[0-9]+$" 0;
    }}
    # A verdict that was stored has no status: only 206 is stored. If S3's first address failed, the
    # status has both, as in "502, 206": the last one counts.
    map "$verdict\n$verdict_range\n$verdict_etag\n$http_if_match" $is_permitted {{
        default 0;
        '~^((?:[0-9]+, )*206)?\nbytes[ =]0-0/[0-9]+\n("[!#-~]+")\n\2$' 1;
    }}
    map $http_x_lazyfs_refresh $is_refresh {{ default ""; 1 1; }}

    proxy_cache_path {cache} levels=2:2 use_temp_path=off keys_zone=blocks:{keys}m
        max_size={size} min_free={reserve} inactive=365d loader_files=1000;
    proxy_cache_path {run}/verdicts levels=2 use_temp_path=off keys_zone=verdicts:16m
        max_size=64m inactive={verdict}s;

{rings}

    proxy_http_version 1.1;
    proxy_pass_request_headers off;
    proxy_pass_request_body off;
{headers}
    proxy_set_header Range $http_range;
    proxy_ignore_headers X-Accel-Redirect X-Accel-Expires X-Accel-Limit-Rate X-Accel-Buffering
        X-Accel-Charset Expires Cache-Control Set-Cookie Vary;
    proxy_buffer_size 16k;
    proxy_buffers 16 64k;
    proxy_busy_buffers_size 256k;
    proxy_connect_timeout 2s;
    proxy_read_timeout 55s;
    proxy_ssl_protocols TLSv1.2 TLSv1.3;
    proxy_ssl_server_name on;
    proxy_ssl_verify on;
    proxy_ssl_verify_depth 5;
    proxy_ssl_trusted_certificate {authorities};

    # The door.
    server {{
        listen {door} backlog=4096;
        if ($origin = "") {{ return 421; }}
        if ($is_taken = 0) {{ return 400; }}

        location / {{
            auth_request /.lazyfs-verdict;
            auth_request_set $verdict $upstream_status;
            auth_request_set $verdict_range $upstream_http_content_range;
            auth_request_set $verdict_etag $upstream_http_etag;
            error_page 401 403 500 = @refused;
            # It comes after the verdict; there is no such file.
            try_files /.lazyfs-none @permitted;
        }}
        location @permitted {{
            if ($is_permitted = 0) {{ return 403; }}
            proxy_max_temp_file_size 0;
{to_shelves}
        }}
        location = /.lazyfs-verdict {{
            internal;
            proxy_cache verdicts;
            proxy_cache_key "$http_host\n$request_uri\n$http_if_match\n$http_authorization";
            proxy_cache_valid 206 {verdict}s;
            proxy_no_cache $is_other_version $is_other_byte;
            proxy_cache_lock on;
            proxy_cache_lock_timeout 20s;
            proxy_cache_lock_age 20s;
            proxy_method GET;
            # nginx takes none of those above where a header is set.
{headers}
            proxy_set_header Range "bytes=0-0";
            proxy_pass $origin$request_uri;
        }}
        location @refused {{
            if ($verdict ~ "(^|, )404$") {{ return 404; }}
            if ($verdict ~ "(^|, )412$") {{ return 412; }}
            if ($verdict ~ "(^|, )503$") {{ return 503 "<Error><Code>SlowDown</Code></Error>"; }}
            if ($verdict ~ "(^|, )[34][0-9]+$") {{ return 403; }}
            return 502; # S3 cannot be reached
        }}
    }}

    # The shelf.
    server {{
        listen {shelf} backlog=4096{tls};
{certificates}
{strangers}
        error_page 403 = @stranger;
        if ($origin = "") {{ return 421; }}
        if ($is_taken = 0) {{ return 400; }}
        proxy_cache_valid 206 365d;
        proxy_no_cache $is_other_version $is_other_range;
        proxy_cache_bypass $is_refresh;
        proxy_cache_lock on;
        proxy_cache_lock_timeout 90s;
        proxy_cache_lock_age 90s;
{levels}
        # The list of addresses is behind by a few seconds when a node is new: the next shelf.
        location @stranger {{ return 502; }}
    }}
}}
"""
# The headers that are passed on to shelves and to S3, besides the range. Empty ones are not sent.
_HEADERS = (
    "Host $http_host",
    'Connection ""',
    'Content-Length ""',
    "User-Agent $http_user_agent",
    'Accept-Encoding "identity, gzip"',
    "Authorization $http_authorization",
    "X-Amz-Date $http_x_amz_date",
    "X-Amz-Content-SHA256 $http_x_amz_content_sha256",
    "X-Amz-Security-Token $http_x_amz_security_token",
    "X-Amz-Request-Payer $http_x_amz_request_payer",
    "If-Match $http_if_match",
    "X-Lazyfs-Refresh $is_refresh",
)
_RING = """
    upstream {name} {{
        hash "$http_host$request_uri$http_if_match$http_range" consistent;
{servers}
        keepalive 128;
    }}
"""
_KEY = "$http_host\\n$request_uri\\n$http_if_match\\n$http_range"
_TO_NODES = """
            proxy_connect_timeout 1s;
            # By this address the others know us.
            proxy_bind {address};
            proxy_next_upstream error timeout http_502 http_504;
            proxy_next_upstream_tries 4;
{between}
            proxy_pass {scheme}://{name};
"""
_FROM_S3 = f"""
            proxy_cache blocks;
            proxy_cache_key "{{level}}{_KEY}";
            proxy_pass $origin$request_uri;
"""
# In a fleet with groups, a shelf gets missing ranges from the ring of all shelves.
_FROM_ALL = f"""
            proxy_cache blocks;
            proxy_cache_key "{_KEY}";
{{headers}}
            proxy_set_header Range $http_range;
            proxy_set_header X-Lazyfs-Level all;
{{to_all}}
"""
_LEVELS = """
        if ($http_x_lazyfs_level = all) {{ rewrite ^ /.lazyfs-all last; }}
        location / {{{from_all}        }}
        location = /.lazyfs-all {{
            internal;{from_s3}        }}
"""
# In a fleet of one ring, a node that is new gets its share from the shelves that had it before: in
# the ring without this node, they are those that the hash selects. They answer with what they have
# stored, and with 404 otherwise. Nobody waits for a lock there: two shelves could wait for each
# other.
_ONE_RING = f"""
        if ($http_x_lazyfs_level = none) {{{{ return 404; }}}}
        if ($http_x_lazyfs_level = kept) {{{{ rewrite ^ /.lazyfs-kept last; }}}}
        location / {{{{
            proxy_cache_lock off;
            proxy_read_timeout 5s;
            proxy_intercept_errors on;
            error_page 403 = @stranger;
            error_page 400 404 418 421 500 502 503 504 = @origin;
            if ($is_refresh) {{{{ return 418; }}}}
            proxy_cache blocks;
            proxy_cache_key "{_KEY}";
{{headers}}
            proxy_set_header Range $http_range;
            proxy_set_header X-Lazyfs-Level kept;
{{to_elders}}
        }}}}
        location = /.lazyfs-kept {{{{
            internal;
            proxy_cache_lock off;
            proxy_cache blocks;
            proxy_cache_key "{_KEY}";
{{headers}}
            proxy_set_header Range $http_range;
            proxy_set_header X-Lazyfs-Level none;
{{to_self}}
        }}}}
        location @origin {{{{{{from_s3}}        }}}}
"""
_BETWEEN = """
            proxy_ssl_name {name};
            proxy_ssl_trusted_certificate {files}/ca.crt;
            proxy_ssl_certificate {files}/tls.crt;
            proxy_ssl_certificate_key {files}/tls.key;
"""
_CERTIFICATES = """
        ssl_protocols TLSv1.3;
        ssl_certificate {files}/tls.crt;
        ssl_certificate_key {files}/tls.key;
        ssl_client_certificate {files}/ca.crt;
        ssl_verify_client on;
        ssl_session_cache shared:shelves:4m;
"""


def render(
    settings: FleetSettings,
    members: Sequence[str],
    resolvers: Sequence[str],
    size_bytes: int,
    reserve_bytes: int,
    *,
    as_root: bool = False,
    connections: int = 4096,
) -> str:
    """The configuration.

    Args:
        members: the addresses of all nodes; the same on each node, in any order.
        resolvers: the addresses of DNS servers.
        size_bytes, reserve_bytes: the limits of the cache, in bytes of its filesystem.
        as_root: whether root starts nginx.
        connections: the most connections of each process.
    """
    nodes = sorted(set(members) or {settings.address})
    files = settings.tls_dir
    named = {"files": files, "name": settings.tls_name}
    headers = "\n".join(f"proxy_set_header {each};" for each in _HEADERS)
    between = _BETWEEN.format(**named) if files else ""

    def to(name: str) -> str:
        scheme = "https" if files else "http"
        return _TO_NODES.format(name=name, address=settings.address, scheme=scheme, between=between)

    def ring(name: str, of: list[str], most_fails: int = 1) -> str:
        servers = "\n".join(
            f"        server {_server(each, settings.shelf_port)} "
            f"max_fails={most_fails} fail_timeout=10s;"
            for each in of
        )
        return _RING.format(name=name, servers=servers)

    # Some DNS servers say "no such name" where a name has IPv4 addresses only, and nginx then uses
    # none of these. Nodes with IPv4 addresses need no others.
    family = " ipv6=off" if ipaddress.ip_address(settings.address).version == 4 else ""
    of_group = groups([*nodes, settings.address], settings.group_size)
    near = [each for each in nodes if of_group[each] == of_group[settings.address]]
    rings, levels = ring("shelves", near or nodes), ""
    if len(set(of_group.values())) > 1:
        rings += ring("all", nodes)
        levels = _LEVELS.format(
            from_all=_FROM_ALL.format(headers=headers, to_all=to("all")),
            from_s3=_FROM_S3.format(level="all\\n"),
        )
    elif elders := [each for each in nodes if each != settings.address]:
        # An elder that does not know this node yet refuses, and is asked again nonetheless.
        rings += ring("elders", elders, most_fails=0) + ring("self", [settings.address])
        levels = _ONE_RING.format(
            headers=headers,
            to_elders=to("elders"),
            to_self=to("self"),
            from_s3=_FROM_S3.format(level=""),
        )
    else:
        levels = "        location / {" + _FROM_S3.format(level="") + "        }"
    return _TEMPLATE.format(
        workers=settings.workers,
        user=f"user {settings.user};" if as_root else "",
        connections=connections,
        run=settings.run_dir,
        cache=settings.cache_dir,
        keys=max(8, size_bytes // _BLOCK_BYTES // _KEYS_IN_MIB),
        size=size_bytes,
        reserve=reserve_bytes,
        verdict=f"{settings.verdict_time:.0f}",
        resolver=f"resolver {' '.join(resolvers)} valid=30s{family};" if resolvers else "",
        origins="\n".join(f"        {_mapped(each)}" for each in settings.origins),
        rings=rings,
        levels=levels,
        to_shelves=to("shelves"),
        authorities=settings.ca_bundle,
        door=settings.door,
        shelf=_server(settings.address, settings.shelf_port),
        tls=" ssl" if files else "",
        certificates=_CERTIFICATES.format(**named) if files else "",
        strangers="\n".join(
            [*(f"        allow {each};" for each in sorted({settings.address, *nodes})),
             "        deny all;"]
        ),
        headers=headers,
    )  # fmt: skip


def _mapped(origin: Origin) -> str:
    """A line of the map from hosts to URLs."""
    if origin.is_suffix:
        host = re.escape(origin.host).replace("\\-", "-")
        return f'"~^[a-z0-9][a-z0-9.-]*\\.{host}$" "{origin.scheme}://$http_host";'
    return f'"{origin.host}" "{origin.url}";'


def _server(address: str, port: int) -> str:
    bracketed = f"[{address}]" if ipaddress.ip_address(address).version == 6 else address
    return f"{bracketed}:{port}"
