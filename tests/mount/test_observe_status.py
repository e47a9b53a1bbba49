"""`lazyfs status` and `lazyfs mount --wait`, over real mounts, in a terminal and piped."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounting import Mounted, lazyfs, shell
from s3 import S3
from terminal import in_terminal
from test_models import model

pytestmark = pytest.mark.fuse

MIB = 1 << 20


@pytest.fixture(autouse=True, scope="module")
def _objects(server: S3) -> None:
    server.put("seen", model("m/") | {"plain/file [bold]": bytes(3 * MIB)})


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A mountpoint for mounts that a test makes by itself."""
    path = tmp_path / "place"
    path.mkdir()
    yield path
    lazyfs("umount", "--lazy", path)


def mount_arguments(server: S3, place: Path, *options: str) -> list[object]:
    return [
        "mount", "s3://seen/m", place, f"--endpoint-url={server.url}",
        f"--cache-dir={place.parent / 'cache'}", f"--log-file={place.parent / 'log'}",
        "--block-size=256KiB", *options,
    ]  # fmt: skip


def status_json(mounted: Mounted) -> dict[str, object]:
    answer = lazyfs("status", mounted.path, "--json")
    assert answer.returncode == 0, answer.stderr
    described: dict[str, object] = json.loads(answer.stdout)
    return described


def test_status_agrees_with_the_server(mount: Callable[..., Mounted], s3: S3) -> None:
    mounted = mount("s3://seen/plain", "--prefetch=off", "--block-size=1MiB")
    assert shell("cat file* | wc -c", mounted.path).stdout.strip() == str(3 * MIB)
    status = status_json(mounted)
    assert status["fetched_blocks"] == len(s3.data_requests()) == 3
    assert status["fetched_bytes"] == status["fetched_on_demand_bytes"] == 3 * MIB
    assert (status["files"], status["size_bytes"]) == (1, 3 * MIB)
    assert status["restarts"] == status["readers_waiting"] == 0
    assert sum(status["hits"].values()) == status["reads"]  # type: ignore[attr-defined]
    assert status["hits"]["s3"] >= 3  # type: ignore[index]
    assert status["trouble"] is status["last_error"] is None


def test_status_is_readable(mount: Callable[..., Mounted]) -> None:
    mounted = mount("s3://seen/plain", "--prefetch=off")
    shell("cat file*", mounted.path)
    one = lazyfs("status", mounted.path)
    assert one.returncode == 0
    assert "\x1b" not in one.stdout
    assert "3MiB from S3 in 1 blocks" in one.stdout
    table = lazyfs("status").stdout
    assert str(mounted.path) in table and "serving, no prefetch" in table
    code, text, raw = in_terminal("status")
    assert code == 0 and "MOUNTPOINT" in text and "\x1b[1m" in raw
    code, text, raw = in_terminal("status", mounted.path)
    assert code == 0 and "s3://seen/plain" in text.replace("\r\n", "")
    _, _, raw = in_terminal("status", NO_COLOR="1")
    assert "\x1b[3" not in raw


def test_status_names_waiting_readers_and_the_reason(mount: Callable[..., Mounted], s3: S3) -> None:
    mounted = mount("s3://seen/plain", "--prefetch=off", "--block-size=1MiB")
    s3.fault("GET /seen/plain/file", "hang", seconds=20, times=2)
    reader = subprocess.Popen(["head", "-c", "100", mounted.path / "file [bold]"])
    try:
        while not (status := status_json(mounted))["waiting"]:
            time.sleep(0.05)
        (waiting,) = status["waiting"]  # type: ignore[misc]
        assert waiting["file"] == "file [bold]"
        assert waiting["opened_by"] == [{"pid": reader.pid, "command": "head"}]
        text = lazyfs("status", mounted.path).stdout
        assert f"for file [bold] at 0B, opened by head ({reader.pid})" in text
    finally:
        reader.kill()
        reader.wait(timeout=60)


def test_errors_and_restarts_are_counted(mount: Callable[..., Mounted], s3: S3) -> None:
    mounted = mount("s3://seen/plain", "--prefetch=off", "--block-size=1MiB")
    s3.fault("GET /seen/plain/file", "status", status=503, code="SlowDown", times=2)
    shell("cat file*", mounted.path)
    status = status_json(mounted)
    assert status["retries"] == {"throttled": 2}
    assert "SlowDown" in str(status["last_error"])
    subprocess.run(["kill", "-9", str(mounted.worker)], check=True)
    shell("cat file*", mounted.path)
    while (status := status_json(mounted))["restarts"] != 1:
        time.sleep(0.1)
    assert "1 restart of its worker" in lazyfs("status", mounted.path).stdout


def test_status_without_a_mount(tmp_path: Path) -> None:
    answer = lazyfs("status", tmp_path)
    assert answer.returncode == 1
    assert answer.stderr.startswith(f"lazyfs: {tmp_path}: no lazyfs daemon serves it")
    assert lazyfs("status", "--json").stdout.strip() == "[]"
    assert lazyfs("status").returncode == 0


@pytest.mark.parametrize("what", ["headers", "model"])
def test_wait_returns_when_the_model_is_here(server: S3, s3: S3, place: Path, what: str) -> None:
    answer = lazyfs(*mount_arguments(server, place, f"--wait={what}", "--json"))
    assert answer.returncode == 0, answer.stderr
    fetched = {path.rpartition("/")[2] for path, _ in s3.data_requests()}
    assert fetched == set(model(""))
    lines = [json.loads(line) for line in answer.stdout.splitlines()]
    total = sum(map(len, model("").values()))
    assert lines[-1]["finished"] and lines[-1]["total_bytes"] == total
    if what == "model":
        assert lines[-1]["done_bytes"] == total
        assert lazyfs("status", place).stdout.count("(100%) on this machine") == 1


def test_wait_shows_progress_in_a_pipe_and_in_a_terminal(server: S3, place: Path) -> None:
    answer = lazyfs(*mount_arguments(server, place, "--wait=model"))
    assert answer.returncode == 0
    assert answer.stdout == ""
    assert "(100%)" in answer.stderr.splitlines()[-1]
    assert "done in" in answer.stderr.splitlines()[-1]
    lazyfs("umount", place)
    code, text, raw = in_terminal(*mount_arguments(server, place, "--wait=model"))
    assert code == 0
    assert "MiB" in text and "━" in text and "\x1b[" in raw


def test_wait_for_a_model_without_room(s3: S3, place: Path) -> None:
    s3.put("roomy", {"m/model.safetensors": bytes(80 * MIB)})
    options = ["--wait=model", "--cache-dir=none", "--memory-limit=64MiB", "--page-cache=off"]
    arguments = mount_arguments(s3, place, "--block-size=8MiB", *options)
    arguments[1] = "s3://roomy/m"
    answer = lazyfs(*arguments)
    assert answer.returncode == 1
    assert "of 80MiB before it is read: use a --cache-dir" in answer.stderr
    assert lazyfs("umount", place).returncode == 0, "it is mounted all the same"


@pytest.mark.parametrize(
    "options",
    [
        ["--wait=model", "--foreground"],
        ["--wait=model", "--prefetch=off", "--cache-dir=none"],
        ["--wait=headers", "--prefetch=off"],
        ["--wait=headers", "--prefetch-on=open"],
    ],
)
def test_wait_for_what_is_never_fetched_is_refused(
    server: S3, place: Path, options: list[str]
) -> None:
    answer = lazyfs(*mount_arguments(server, place, *options))
    assert answer.returncode == 2
    assert answer.stderr.startswith("lazyfs: --wait") and answer.stderr.count("\n") == 1
    assert lazyfs("status", place).returncode == 1, "nothing was mounted"


@pytest.mark.parametrize("policy", ["headers", "tensor"])
def test_wait_for_headers_when_only_they_are_prefetched(
    server: S3, s3: S3, place: Path, policy: str
) -> None:
    options = [f"--prefetch={policy}", "--wait=headers"]
    assert lazyfs(*mount_arguments(server, place, *options)).returncode == 0
    fetched = {path.rpartition("/")[2] for path, _ in s3.data_requests()}
    assert fetched == set(model(""))
    blocks = sum(-(-len(content) // (256 << 10)) for content in model("").values())
    assert len(s3.data_requests()) < blocks / 2


@pytest.mark.parametrize(
    "options", [["--prefetch=off"], ["--prefetch-on=open"], ["--preset=browse"]]
)
def test_wait_fetches_a_model_that_is_not_prefetched(
    server: S3, s3: S3, place: Path, options: list[str]
) -> None:
    answer = lazyfs(*mount_arguments(server, place, "--wait=model", "--json", *options))
    assert answer.returncode == 0, answer.stderr
    last = json.loads(answer.stdout.splitlines()[-1])
    total = sum(map(len, model("").values()))
    assert (last["done_bytes"], last["total_bytes"], last["finished"]) == (total, total, True)
    s3.forget()
    assert shell("cat * | wc -c", place).stdout.strip() == str(total)
    assert not s3.data_requests(), "it was all in the cache"


def test_wait_for_a_model_with_an_unreadable_shard(s3: S3, place: Path) -> None:
    shards = {f"m/model-0000{n}-of-00002.safetensors": bytes(300_000) for n in (1, 2)}
    s3.put("archived", shards)
    s3.forget()
    refused = {"status": 403, "code": "InvalidObjectState"}
    s3.fault("GET /archived/m/model-00002", "status", times=10**6, **refused)
    arguments = mount_arguments(s3, place, "--wait=model")
    arguments[1] = "s3://archived/m"
    answer = lazyfs(*arguments)
    assert answer.returncode == 1
    last = answer.stderr.splitlines()[-1]
    assert "only 293KiB of 585.9KiB could be fetched" in last, answer.stderr
    assert "model-00002" in last and "archived" in last
    assert lazyfs("umount", place).returncode == 0


def test_wait_where_there_is_no_model(server: S3, place: Path) -> None:
    arguments = mount_arguments(server, place, "--wait=model")
    arguments[1] = "s3://seen/plain"
    answer = lazyfs(*arguments)
    assert answer.returncode == 1
    assert "nothing is prefetched" in answer.stderr
    assert lazyfs("umount", place).returncode == 0, "it is mounted all the same"
