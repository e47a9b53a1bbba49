"""Traces of mounts, as an OpenTelemetry collector receives them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from collector import Collector, attributes
from mounting import Mounted, environment, lazyfs, shell
from s3 import S3
from test_models import model, settle

pytestmark = pytest.mark.fuse

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(autouse=True, scope="module")
def _objects(server: S3) -> None:
    server.put("traced", model("m/"))


@pytest.fixture
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.stop()


@pytest.fixture
def mount_with(
    mount: Callable[..., Mounted], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Mounted]:
    """Make a mount with variables in its environment."""

    def make(variables: dict[str, str], *options: str) -> Mounted:
        for name, text in variables.items():
            monkeypatch.setenv(name, text)
        return mount("s3://traced/m", *options)

    return make


def test_a_mount_its_requests_and_its_load(
    mount_with: Callable[..., Mounted], s3: S3, collector: Collector
) -> None:
    variables = {**collector.environment, "TRACEPARENT": f"00-{TRACE}-{PARENT}-01"}
    mounted = mount_with(variables, "--block-size=256KiB")
    settle(s3)
    shell("cat *.safetensors | wc -c", mounted.path)
    (root,) = collector.wait_for("mount")
    assert root.trace_id.hex() == TRACE and root.parent_span_id.hex() == PARENT
    assert attributes(root)["lazyfs.source"] == "s3://traced/m"
    assert attributes(root)["lazyfs.mountpoint"] == str(mounted.path)
    (load,) = collector.wait_for("first load")
    assert attributes(load)["lazyfs.bytes"] == sum(map(len, model("").values()))
    assert attributes(load)["lazyfs.limit"] in ("reader", "network", "disk")
    assert root.end_time_unix_nano <= load.start_time_unix_nano < load.end_time_unix_nano
    asked = s3.data_requests()
    gets = collector.wait_for("S3.GetObject", lambda spans: len(spans) >= len(asked))
    keys = sorted(attributes(span)["aws.s3.key"] for span in gets)
    assert keys == sorted(path.split("/", 2)[2] for path, _ in asked)
    assert sum(attributes(span)["http.response.body.size"] for span in gets) == sum(
        map(len, model("").values())
    )
    (listing,) = collector.named("S3.ListObjectsV2")
    for span in (load, listing, *gets):
        assert (span.trace_id, span.parent_span_id) == (root.trace_id, root.span_id)
    assert set(collector.services.values()) == {"lazyfs"}


def test_failures_and_the_next_worker_are_traced(
    mount_with: Callable[..., Mounted], s3: S3, collector: Collector
) -> None:
    variables = {**collector.environment, "OTEL_SERVICE_NAME": "models"}
    mounted = mount_with(variables, "--prefetch=off")
    s3.fault("GET /traced/m/config", "status", status=503, code="SlowDown", times=2)
    assert shell("cat config.json", mounted.path).stdout == "{}"
    gets = collector.wait_for("S3.GetObject", lambda spans: len(spans) == 3)
    assert [span.status.code for span in gets] == [2, 2, 0]  # ERROR, ERROR, UNSET
    os.kill(mounted.worker, signal.SIGKILL)
    _, resumed = collector.wait_for("mount", lambda spans: len(spans) == 2)
    assert attributes(resumed)["lazyfs.resumed"] is True
    assert set(collector.services.values()) == {"models"}


def test_a_mount_that_is_refused(server: S3, tmp_path: Path, collector: Collector) -> None:
    answer = lazyfs(
        "mount", "s3://traced/nothing", tmp_path, f"--endpoint-url={server.url}",
        "--cache-dir=none", env=environment(**collector.environment),
    )  # fmt: skip
    assert answer.returncode == 1
    (span,) = collector.named("mount")  # sent before the process ended
    assert span.status.code == 2


@pytest.mark.parametrize(
    "variables",
    [{"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"},
     {"OTEL_TRACES_SAMPLER": "always_off"}],
)  # fmt: skip
def test_off(
    mount_with: Callable[..., Mounted], collector: Collector, variables: dict[str, str]
) -> None:
    mounted = mount_with({**collector.environment, **variables})
    shell("cat * | wc -c", mounted.path)
    mounted.end()
    assert not collector.spans


def test_an_unreachable_collector(mount_with: Callable[..., Mounted]) -> None:
    mounted = mount_with({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"})
    assert shell("cat config.json", mounted.path).stdout == "{}"
    mounted.end()
    assert "WARNING" not in mounted.log()


def test_unsupported_protocols(mount_with: Callable[..., Mounted]) -> None:
    variables = {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    mounted = mount_with(variables)
    mounted.wait_for_log("no traces: OTLP over grpc is not supported")
    assert shell("cat config.json", mounted.path).stdout == "{}"


def test_nothing_is_imported_for_it_when_it_is_off() -> None:
    code = (
        "import sys; import lazyfs.process.mount, lazyfs.process.worker_process as s;"
        "assert s.child_environment() is None;"
        "print([name for name in sys.modules if 'opentelemetry' in name or 'traced' in name])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"
