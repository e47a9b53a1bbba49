"""Scraped metrics, compared with what the S3 server saw."""

from __future__ import annotations

import os
import signal
import socket
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from mounting import Mounted, lazyfs, shell
from ports import free_port
from prometheus_client.parser import text_string_to_metric_families
from s3 import S3
from test_models import model, settle

from lazyfs.observe.metrics import METRICS

pytestmark = pytest.mark.fuse

MIB = 1 << 20


@pytest.fixture(autouse=True, scope="module")
def _objects(server: S3) -> None:
    server.put("measured", model("m/") | {"plain/file": bytes(4 * MIB)})


@pytest.fixture
def address() -> str:
    """A free port of this machine."""
    return f"127.0.0.1:{free_port()}"


Sample = Callable[..., float]


def scrape(address: str) -> Sample:
    """The samples at an address; gives a function to look them up by name and labels."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples]

    def value(name: str, **labels: Any) -> float:
        found = [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]
        assert found, f"no {name} {labels}"
        return sum(found)

    return value


def test_metrics_agree_with_the_server(mount: Callable[..., Mounted], s3: S3, address: str) -> None:
    mounted = mount("s3://measured/m", "--block-size=256KiB", f"--metrics-address={address}")
    settle(s3)
    shell("cat * | wc -c", mounted.path)
    value = scrape(address)
    volume = str(mounted.path)
    total = sum(map(len, model("").values()))
    gets = len(s3.data_requests())
    listings = sum("list-type=2" in line for line in s3.requests())
    counted = "lazyfs_s3_request_duration_seconds_count"
    assert value(counted, operation="get", volume=volume) == gets
    assert value(counted, operation="list") == listings
    assert value("lazyfs_s3_request_duration_seconds_bucket", operation="get", le="+Inf") == gets
    assert value("lazyfs_s3_received_bytes_total") == total
    assert value("lazyfs_block_bytes_total", source="s3") == total
    assert value("lazyfs_blocks_total", source="s3") == gets
    assert value("lazyfs_s3_request_failures_total") == 0
    assert value("lazyfs_prefetch_wasted_bytes_total") == 0
    assert value("lazyfs_model_bytes") == value("lazyfs_model_present_bytes") == total
    assert value("lazyfs_ready", level="model") == 1
    assert value("lazyfs_up") == 1
    assert value("lazyfs_cache_misses_total") == gets
    assert value("lazyfs_cache_hits_total") == value("lazyfs_cache_failed_writes_total") == 0
    assert value("lazyfs_mount_info", source="s3://measured/m") == 1


def test_reads_and_waits(mount: Callable[..., Mounted], s3: S3, address: str) -> None:
    options = ["--prefetch=off", "--block-size=1MiB", f"--metrics-address={address}"]
    mounted = mount("s3://measured/plain", *options)
    s3.fault("GET /measured/plain/file", "status", status=503, code="SlowDown", times=3)
    assert shell("cat file | wc -c", mounted.path).stdout.strip() == str(4 * MIB)
    value = scrape(address)
    assert value("lazyfs_block_bytes_total", purpose="demand") == 4 * MIB
    assert value("lazyfs_block_bytes_total", purpose="ahead") == 0
    assert value("lazyfs_s3_retries_total", cause="throttled") == 3
    assert value("lazyfs_s3_request_failures_total", operation="get") == 3
    assert value("lazyfs_s3_request_duration_seconds_count", operation="get") == 7
    assert value("lazyfs_stall_seconds_total", cause="throttled") > 0
    assert value("lazyfs_read_duration_seconds_count", tier="s3") >= 4
    assert value("lazyfs_readers_waiting") == value("lazyfs_open_files") == 0


def test_the_next_worker_serves_metrics_at_the_same_address(
    mount: Callable[..., Mounted], address: str
) -> None:
    mounted = mount("s3://measured/m", f"--metrics-address={address}")
    value = scrape(address)
    assert value("lazyfs_worker_restarts_total") == value("lazyfs_mount_resumes_total") == 0
    os.kill(mounted.worker, signal.SIGKILL)
    while True:
        try:
            value = scrape(address)
        except OSError:
            time.sleep(0.1)
            continue
        if value("lazyfs_worker_restarts_total") == 1:
            break
    assert value("lazyfs_mount_resumes_total") == 1


def test_all_declared_metrics_are_measured(mount: Callable[..., Mounted], address: str) -> None:
    nobody = f"--fleet-cache=http://127.0.0.1:{free_port()}"
    mount("s3://measured/m", f"--metrics-address={address}", nobody)
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    told = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    # Counters with a label have no value before anything was counted.
    later = {m.name for m in METRICS if m.labels[:1] in (("cause",), ("result",))}
    of_plugins = {"lazyfs_volume_pod_info"}
    assert told | later | of_plugins == {m.name for m in METRICS}


def test_an_address_that_is_taken(server: S3, tmp_path: Any, address: str) -> None:
    host, _, port = address.partition(":")
    with socket.create_server((host, int(port))):
        answer = lazyfs(
            "mount", "s3://measured/m", tmp_path, f"--endpoint-url={server.url}",
            f"--log-file={tmp_path}.log", "--cache-dir=none", f"--metrics-address={address}",
        )  # fmt: skip
    assert answer.returncode == 1
    assert answer.stderr.startswith(f"lazyfs: --metrics-address: {address}: cannot listen there")
    assert "Address already in use" in answer.stderr


@pytest.mark.parametrize("text", ["9464", "host:", "host:port", ":70000", "::1:80"])
def test_an_invalid_address(tmp_path: Any, text: str) -> None:
    answer = lazyfs("mount", "s3://measured/m", tmp_path, f"--metrics-address={text}")
    assert answer.returncode == 2
    assert "HOST:PORT" in answer.stderr
