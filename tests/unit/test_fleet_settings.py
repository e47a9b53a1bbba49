"""The settings of a fleet's cache, and the configuration that is made of them."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from certificates import make_certificates
from ports import free_port

from lazyfs.errors import OptionError
from lazyfs.fleet import service as service_of_fleet
from lazyfs.fleet.groups import groups
from lazyfs.fleet.members import MembersError, members
from lazyfs.fleet.nginx import render
from lazyfs.fleet.service import FleetService
from lazyfs.fleet.settings import FleetSettings, Origin

LEAST: dict[str, Any] = {
    "origins": ["https://s3.eu-west-1.amazonaws.com"],
    "address": "10.0.0.5",
    "members-file": "/etc/lazyfs/members",
}
NGINX = shutil.which("nginx") or "/usr/sbin/nginx"


def settings(**more: Any) -> FleetSettings:
    named = {name.replace("_", "-"): value for name, value in more.items()}
    return FleetSettings.of({**LEAST, **named}, "fleet.toml")


def rendered(*nodes: str, **more: Any) -> str:
    return render(settings(**more), nodes, ["10.0.0.2"], 1 << 40, 1 << 30)


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("https://s3.example.org", Origin("s3.example.org", "https://s3.example.org")),
        ("https://s3.example.org:443", Origin("s3.example.org", "https://s3.example.org:443")),
        ("http://minio:9000", Origin("minio:9000", "http://minio:9000")),
        ("http://[fd00::1]:9000", Origin("[fd00::1]:9000", "http://[fd00::1]:9000")),
        (
            "minio.storage:9000=http://minio.storage.svc.cluster.local:9000",
            Origin("minio.storage:9000", "http://minio.storage.svc.cluster.local:9000"),
        ),
        ("https://*.s3.a.org", Origin("s3.a.org", "https://*.s3.a.org", is_suffix=True)),
    ],
)
def test_origins(text: str, origin: Origin) -> None:
    assert Origin.parse(text) == origin


@pytest.mark.parametrize(
    "text",
    ["s3.example.org", "ftp://a", "https://", "https://*", "https://a/b", "https://u@a",
     'https://a";', "https://a b", "https://a$b", "https://a;b", "x=https://*.a", "https://A",
     'a";}=https://a', "https://a:port", "https://a\n", "https://*.*.a"],
)  # fmt: skip
def test_invalid_origins(text: str) -> None:
    with pytest.raises(OptionError, match=r"origins: .* is not allowed: a list of stores"):
        settings(origins=[text])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"origins": []}, "origins is missing"),
        ({"origins": "https://a"}, "origins: 'https://a' is not allowed"),
        ({"address": ""}, "address: '' is not allowed"),
        ({"address": "node1"}, "address: 'node1' is not allowed: the IP address"),
        ({"members_dns": "fleet.example.org"}, "either members-file or members-dns"),
        ({"members_file": "members"}, "members-file: 'members' is not allowed: an absolute path"),
        ({"cache_dir": "/a b"}, "cache-dir: '/a b' is not allowed"),
        ({"cache_dir": "/a;}"}, "cache-dir"),
        ({"tls_name": "a;b"}, "tls-name"),
        ({"user": "a; b"}, "user"),
        ({"door": "unix:run/x"}, "door: 'unix:run/x' is not allowed"),
        ({"door": "localhost:1"}, "door: 'localhost:1' is not allowed: an IP address and a port"),
        ({"door": "127.0.0.1"}, "door"),
        ({"verdict_time": "1h"}, "verdict-time: '1h' is not allowed: a time from 1s to 600s"),
        ({"cache_size": "1MiB"}, "cache-size"),
        ({"resolvers": ["dns"]}, "resolvers: \\['dns'\\] is not allowed"),
        ({"shelf_port": 0}, "shelf-port"),
        ({"sizes": 1}, "sizes: no such setting; there are origins, door"),
    ],
)
def test_wrong_settings_are_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        settings(**more)


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text('origins = ["https://a"]\nmembers-dns = "fleet.a"\n')
    assert FleetSettings.load(path, "10.1.1.1").address == "10.1.1.1"
    with pytest.raises(OptionError, match="address is missing"):
        FleetSettings.load(path)
    path.write_text("origins =")
    with pytest.raises(OptionError, match="is not valid TOML"):
        FleetSettings.load(path)
    with pytest.raises(OptionError, match="No such file"):
        FleetSettings.load(tmp_path / "other")


def test_all_doors_agree_about_the_shelves() -> None:
    def shelves(*nodes: str) -> list[str]:
        ring = rendered(*nodes).partition("upstream shelves {")[2].partition("}")[0]
        return re.findall(r"server (\S+) max_fails", ring)

    assert shelves("10.0.0.9", "10.0.0.5") == shelves("10.0.0.5", "10.0.0.9")
    assert shelves() == ["10.0.0.5:8781"], "alone before it is known"
    assert shelves("fd00::1") == ["[fd00::1]:8781"]


def test_groups_stay_as_they_are() -> None:
    nodes = [f"10.0.{number // 250}.{number % 250}" for number in range(1000)]
    assert set(groups(nodes[:32], 32).values()) == {0}
    found = groups(nodes, 32)
    sizes = Counter(found.values())
    assert len(sizes) == 32 and max(sizes.values()) < 2 * 32
    assert groups(reversed(nodes), 32) == found
    fewer = groups(nodes[1:], 32)
    assert all(found[node] == group for node, group in fewer.items())
    text = render(settings(address=nodes[7]), nodes, [], 1 << 40, 1 << 30)
    shelves, everybody = text.split("upstream all")
    assert shelves.count("max_fails") == sizes[found[nodes[7]]]
    assert everybody.count("max_fails") == 1000


def test_only_nodes_reach_a_shelf() -> None:
    allowed = re.findall(r"(?:allow|deny) .*;", rendered("10.0.0.9", "10.0.0.7"))
    assert allowed == ["allow 10.0.0.5;", "allow 10.0.0.7;", "allow 10.0.0.9;", "deny all;"]


def test_nginx_asks_for_addresses_of_the_family_of_the_node() -> None:
    """Some DNS servers say that there is no such name where a name has no IPv6 address."""
    one = settings(address="10.0.0.5")
    assert "resolver 10.0.0.2 valid=30s ipv6=off;" in render(one, [], ["10.0.0.2"], 1 << 30, 0)
    six = settings(address="fd00::5")
    assert "resolver 10.0.0.2 valid=30s;" in render(six, [], ["10.0.0.2"], 1 << 30, 0)


def test_members(tmp_path: Path) -> None:
    path = tmp_path / "members"
    found = settings(members_file=str(path))
    path.write_text("# rack 4\n10.0.0.9\n\n10.0.0.5  # the old one\n10.0.0.9\n")
    assert members(found) == ["10.0.0.5", "10.0.0.9"]
    path.write_text("10.0.0.9\n10.0.0.5; deny all\n")
    with pytest.raises(MembersError, match=r"line 2: '10.0.0.5; deny all' is not an IP address"):
        members(found)
    path.unlink()
    with pytest.raises(MembersError, match="No such file"):
        members(found)
    table = {**LEAST, "members-dns": "localhost", "address": "127.0.0.1"}
    del table["members-file"]
    assert members(FleetSettings.of(table, "")) == ["127.0.0.1"]


@pytest.mark.skipif(not Path(NGINX).exists(), reason="nginx is not installed; see .ci/setup")
@pytest.mark.parametrize("tls", [False, True])
def test_nginx_takes_the_configuration(tmp_path: Path, tls: bool) -> None:
    more: dict[str, Any] = {"door": f"unix:{tmp_path}/door.sock"}
    if tls:
        authority, certificate, key = make_certificates(tmp_path / "tls", "DNS:lazyfs-fleet")
        authority.rename(tmp_path / "tls" / "ca.crt")
        certificate.rename(tmp_path / "tls" / "tls.crt")
        key.rename(tmp_path / "tls" / "tls.key")
        more = {"tls_dir": str(tmp_path / "tls"), "door": f"127.0.0.1:{free_port()}"}
    (tmp_path / "run" / "tmp").mkdir(parents=True)
    text = rendered(
        "10.0.0.9", "fd00::1", run_dir=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"),
        address="127.0.0.1", shelf_port=free_port(),
        origins=["https://s3.a.org", "https://*.s3.a.org", "x:9000=http://minio.b:9000"],
        group_size=1,
        **more,
    )  # fmt: skip
    path = tmp_path / "nginx.conf"
    path.write_text(text)
    ran = subprocess.run(
        [NGINX, "-t", "-q", "-e", "stderr", "-c", path], capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr


def test_without_nginx() -> None:
    with pytest.raises(OptionError, match="nginx is not installed"):
        FleetService(settings(), "/nonexistent/nginx")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    """Who can write into the cache decides what everybody reads."""
    (tmp_path / "cache").mkdir()
    os.chown(tmp_path / "cache", 12345, 12345)
    (tmp_path / "members").write_text("10.0.0.5\n")
    service = FleetService(
        settings(
            run_dir=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"), user="root",
            members_file=str(tmp_path / "members"),
        ),
        "/bin/true",
    )  # fmt: skip
    with pytest.raises(OptionError, match="belongs to another user"):
        service.prepare()


# In the place of nginx: takes any configuration, and serves until it is told to end.
FAKE_NGINX = """#!/bin/sh
case "$*" in *-q) exit 0;; esac
echo $$ > "$0.pid"
exec sleep 600
"""


def test_nginx_ends_with_its_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the service ends with: an nginx that is left alone knows no new nodes."""
    program = tmp_path / "nginx"
    program.write_text(FAKE_NGINX)
    program.chmod(0o755)
    (tmp_path / "members").write_text("10.0.0.5\n")
    service = FleetService(
        settings(
            run_dir=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"), user="root",
            members_file=str(tmp_path / "members"), door=f"unix:{tmp_path}/door",
        ),
        str(program),
    )  # fmt: skip

    def fail(_seconds: float) -> None:
        while not (told := tmp_path / "nginx.pid").exists() or not told.read_text():
            time.sleep(0.01)
        raise OptionError("the disk of the cache is gone")

    monkeypatch.setattr(service, "_wait", fail)
    monkeypatch.setattr(service_of_fleet.signal, "signal", lambda *_: None)
    with pytest.raises(OptionError, match="is gone"):
        service.run()
    assert not Path("/proc", (tmp_path / "nginx.pid").read_text().strip()).exists()


def test_the_files_for_a_rack() -> None:
    place = Path(__file__).parents[2] / "deploy" / "fleet"
    found = FleetSettings.load(place / "fleet.toml", "10.0.0.5")
    assert found.members_file == Path("/etc/lazyfs/fleet.members")
    here = dataclasses.replace(found, members_file=place / "fleet.members")
    assert "10.0.0.5" in members(here)
    unit = (place / "lazyfs-fleet.service").read_text()
    assert f"CacheDirectory={found.cache_dir.name}\n" in unit
    assert f"RuntimeDirectory={found.run_dir.name}\n" in unit
    assert "--config /etc/lazyfs/fleet.toml" in unit
