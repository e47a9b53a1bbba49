"""`lazyfs report` names what limited a load."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from mounting import TIMEOUT_S, Mounted, environment, lazyfs, python
from s3 import S3
from safetensors.numpy import save
from terminal import in_terminal

pytestmark = pytest.mark.fuse

MIB = 1 << 20
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
# Reads both shards as a loader does.
LOAD = """
import sys
from safetensors import safe_open
for shard in sys.argv[2:]:
    with safe_open(f"{sys.argv[1]}/{shard}", framework="np") as opened:
        for name in sorted(opened.keys()):
            opened.get_tensor(name).sum()
"""


@pytest.fixture(autouse=True, scope="module")
def _objects(server: S3) -> None:
    tensors = {str(number): np.full(MIB // 4, number, "float32") for number in range(4)}
    server.put("reported", {f"m/{shard}": save(tensors) for shard in SHARDS})


def load(mounted: Mounted, *shards: str) -> None:
    python(LOAD, mounted.path, *(shards or SHARDS))


def report(mounted: Mounted) -> dict[str, Any]:
    path = mounted.path.parent / "report.json"
    answer = lazyfs("report", mounted.path, "-o", path)
    assert answer.returncode == 0, answer.stderr
    told: dict[str, Any] = json.loads(path.read_text())
    assert answer.stderr.strip() == told["verdict"]["headline"]
    return told


def limit(mounted: Mounted) -> str:
    return str(report(mounted)["verdict"]["limit"])


def test_a_cold_load_waits_for_the_network(mount: Callable[..., Mounted], s3: S3) -> None:
    s3.fault("GET /reported/m/model", "slow", seconds=0.4, times=100)
    mounted = mount("s3://reported/m", "--block-size=1MiB")
    # A loader that comes before the plan, on a busy machine, finds nothing prefetched.
    while not mounted.status()["prefetch"]["planned"]:
        time.sleep(0.05)
    load(mounted)
    told = report(mounted)
    assert told["verdict"]["limit"] == "network"
    assert "from disk." in told["verdict"]["facts"][0]
    fetched = [event for event in told["events"] if event["what"] == "fetched"]
    assert sum(event["bytes"] for event in fetched) == sum(
        (mounted.path / shard).stat().st_size for shard in SHARDS
    )
    assert {event["file"] for event in fetched} == set(SHARDS)
    assert told["load"]["is_over"]


def load_while_refused(mounted: Mounted, s3: S3) -> None:
    """A load whose reader already waits when S3 refuses the last 30 of its requests."""
    command = [sys.executable, "-c", LOAD, mounted.path, *SHARDS]
    with subprocess.Popen(command) as loader:
        try:
            wait_until(lambda: has_open(loader.pid, mounted.path / SHARDS[0]))
            s3.forget_requests()
            wait_until(lambda: len(s3.data_requests()) >= 30)
            s3.forget()
            assert loader.wait(TIMEOUT_S) == 0
        finally:
            loader.kill()


def has_open(pid: int, path: Path) -> bool:
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if descriptor.readlink() == path:
                return True
    return False


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_throttled_load(mount: Callable[..., Mounted], s3: S3) -> None:
    s3.fault("GET /reported/m/model", "status", status=503, code="SlowDown", times=100_000)
    mounted = mount("s3://reported/m", "--block-size=1MiB")
    load_while_refused(mounted, s3)
    told = report(mounted)
    assert told["verdict"]["limit"] == "throttled"
    found = re.search(r"S3 asked for fewer requests \((\d+) times\)", told["verdict"]["headline"])
    assert found is not None and int(found[1]) >= 30


def test_a_faulty_load(mount: Callable[..., Mounted], s3: S3) -> None:
    s3.fault("GET /reported/m/model", "status", status=500, code="InternalError", times=100_000)
    mounted = mount("s3://reported/m", "--block-size=1MiB")
    load_while_refused(mounted, s3)
    assert limit(mounted) == "errors"


def test_a_warm_load_does_not_wait_for_the_network(mount: Callable[..., Mounted], s3: S3) -> None:
    first = mount("s3://reported/m", "--block-size=1MiB")
    # Not by a load: while a reader waits, a busy disk need not take all blocks.
    wait_until(lambda: first.status()["ready"]["model"])
    first.end()
    s3.fault("GET /reported/m/model", "hang", seconds=20, times=100)
    second = mount("s3://reported/m", "--block-size=1MiB")
    load(second)
    told = report(second)
    assert told["verdict"]["limit"] in ("reader", "disk")
    assert {event["what"] for event in told["events"]} >= {"loaded"}
    assert "fetched" not in {event["what"] for event in told["events"]}


def test_a_load_in_the_wrong_order(mount: Callable[..., Mounted], s3: S3) -> None:
    options = ["--block-size=1MiB", "--max-concurrency=1"]
    s3.fault("GET /reported/m/model", "slow", seconds=0.05, times=100)
    mounted = mount("s3://reported/m", *options)
    backwards = """
import os, sys
for shard in sys.argv[2:]:
    descriptor = os.open(f"{sys.argv[1]}/{shard}", os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    for block in (4, 3, 2, 1, 0):
        os.pread(descriptor, 4096, block << 20)
    os.close(descriptor)
"""
    python(backwards, mounted.path, *reversed(SHARDS))
    assert limit(mounted) == "order"


def test_a_load_without_prefetch(mount: Callable[..., Mounted], s3: S3) -> None:
    s3.fault("GET /reported/m/model", "slow", seconds=0.02, times=100)
    mounted = mount("s3://reported/m", "--block-size=1MiB", "--prefetch=off")
    load(mounted)
    told = report(mounted)
    assert told["verdict"]["limit"] == "no_prefetch"
    assert told["verdict"]["advice"] == "Use --prefetch model."


def test_a_limit_that_was_asked_for(mount: Callable[..., Mounted]) -> None:
    # A reader that starts late would find what was prefetched meanwhile.
    options = ["--prefetch-on=open", "--block-size=256KiB", "--bandwidth-limit=4MiB"]
    mounted = mount("s3://reported/m", *options)
    load(mounted)
    told = report(mounted)
    assert told["verdict"]["limit"] == "bandwidth-limit"
    assert "--bandwidth-limit allows 4MiB/s" in told["verdict"]["headline"]


DIRECT = """
import mmap, os, sys
for shard in sys.argv[2:]:
    descriptor = os.open(f"{sys.argv[1]}/{shard}", os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, 1 << 20)
    at = 0
    while n := os.preadv(descriptor, [buffer], at):
        at += n
    os.close(descriptor)
"""


def test_a_direct_load_is_named(mount: Callable[..., Mounted]) -> None:
    options = ["--block-size=1MiB", "--memory-limit=64MiB"]
    told = []
    for page_cache in ("auto", "off"):
        mounted = mount("s3://reported/m", *options, f"--page-cache={page_cache}")
        for _ in range(2):
            python(DIRECT, mounted.path, *SHARDS)
        told.append(report(mounted))
    used, bypassed = (" ".join(each["verdict"]["facts"]) for each in told)
    assert "opened with O_DIRECT" in used and "bypassed" not in used
    assert "O_DIRECT, and their reads bypassed the page cache" in bypassed


def test_a_hot_load_adds_what_it_took_and_no_blocks(mount: Callable[..., Mounted]) -> None:
    mounted = mount("s3://reported/m", "--block-size=1MiB")
    load(mounted)
    first = report(mounted)
    load(mounted)
    second = report(mounted)
    assert 0 < first["load"]["duration_s"] < second["load"]["duration_s"]
    assert second["load"]["is_over"]
    fetched = [event for event in second["events"] if event["what"] == "fetched"]
    assert len({(event["file"], event["block"]) for event in fetched}) == len(fetched)


def test_a_report_before_any_read(mount: Callable[..., Mounted]) -> None:
    mounted = mount("s3://reported/m")
    assert limit(mounted) == "nothing"


def test_pictures_need_no_network(mount: Callable[..., Mounted], tmp_path: Path) -> None:
    mounted = mount("s3://reported/m", "--block-size=1MiB")
    load(mounted)
    for name in ("report.html", "report.svg"):
        assert lazyfs("report", mounted.path, "-o", tmp_path / name).returncode == 0
    html, svg = (tmp_path / "report.html").read_text(), (tmp_path / "report.svg").read_text()
    for text in (html, svg):
        links = re.findall(r"""(?:https?:)?//[^"'\s<)]+""", text.replace("s3://", ""))
        assert set(links) <= {"http://www.w3.org/2000/svg"}
        assert "<script" not in text
    root = ElementTree.fromstring(svg)
    words = " ".join(root.itertext())
    assert "position in the model over time" in words and SHARDS[0][:9] in words
    assert "<h2>Figures" in html and "<h2>Figures" not in svg


def test_a_png_is_drawn_without_a_network(
    mount: Callable[..., Mounted], s3: S3, tmp_path: Path
) -> None:
    s3.fault("GET /reported/m/model", "slow", seconds=0.05, times=100)
    mounted = mount("s3://reported/m", "--block-size=1MiB")
    load(mounted)
    path = tmp_path / "report.png"
    alone = ["unshare", "--net"] if os.geteuid() == 0 else []
    subprocess.run(
        [*alone, sys.executable, "-m", "lazyfs", "report", mounted.path, "-o", path],
        env=environment(), timeout=60, check=True,
    )  # fmt: skip
    picture = imread(path)
    height, width, _ = picture.shape
    assert width >= 1600 and 600 <= height <= 4 * width
    assert path.stat().st_size < 2 * MIB
    colours = {tuple(colour) for colour in (picture[::2, ::2, :3] * 15).round().reshape(-1, 3)}
    assert len(colours) > 8
    assert picture[:60, :, :3].min() < 0.3, "its title can be read"
    # Something is drawn in each fifth of its height.
    for part in np.array_split(picture, 5):
        assert part.std() > 0.02


def test_words_in_a_terminal_and_in_a_pipe(mount: Callable[..., Mounted]) -> None:
    mounted = mount("s3://reported/m")
    load(mounted)
    piped = lazyfs("report", mounted.path).stdout
    assert "best rate over a second" in piped and "\x1b" not in piped
    code, text, _ = in_terminal("report", mounted.path)
    assert code == 0 and "reading took" in text


@pytest.mark.parametrize("name", ["report.pdf", "no/where/report.html"])
def test_report_files_that_cannot_be_written(
    mount: Callable[..., Mounted], tmp_path: Path, name: str
) -> None:
    answer = lazyfs("report", mount("s3://reported/m").path, "-o", tmp_path / name)
    assert answer.returncode == 2
    assert answer.stderr.startswith("lazyfs: --output: ")
    assert lazyfs("report", tmp_path).returncode == 1
