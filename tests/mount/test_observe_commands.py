"""`lazyfs top`, `doctor`, `pause`, `resume`, `set` and `completion`, in a terminal and piped."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mounting import Mounted, lazyfs, shell
from s3 import S3
from terminal import Terminal, in_terminal
from test_control import socket_of
from test_models import model, settle

pytestmark = pytest.mark.fuse

MIB = 1 << 20


@pytest.fixture(autouse=True, scope="module")
def _objects(server: S3) -> None:
    server.put("told", model("m/"))


def test_top_in_a_terminal_and_in_a_pipe(mount: Callable[..., Mounted]) -> None:
    mounted = mount("s3://told/m")
    terminal = Terminal("top", "-d", "0.2")
    try:
        terminal.read_until(lambda text: text.count("MOUNTPOINT") >= 2)
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.finish()[0] == 130
    finally:
        terminal.close()
    piped = lazyfs("top", mounted.path, "-n", "2", "-d", "0.1")
    assert piped.returncode == 0
    assert piped.stdout.count("s3://told/m") == 2
    assert "\x1b" not in piped.stdout
    assert lazyfs("top").returncode == 2


def blocks(s3: S3) -> set[tuple[str, str | None]]:
    """The blocks of 256 KiB that were fetched, once that has come to rest; heads are none."""
    settle(s3)
    return {request for request in s3.data_requests() if request[1] != f"bytes=0-{(64 << 10) - 1}"}


ALL_BLOCKS = sum(-(-len(content) // (256 << 10)) for content in model("").values())


def wait_for_all_blocks(s3: S3) -> None:
    deadline = time.monotonic() + 60
    while len(fetched := blocks(s3)) < ALL_BLOCKS:
        assert time.monotonic() < deadline, sorted(fetched, key=str)


def test_pause_and_resume(mount: Callable[..., Mounted], s3: S3) -> None:
    s3.fault("GET /told/m/model-0000", "slow", seconds=0.2, times=10)
    mounted = mount("s3://told/m", "--block-size=256KiB", "--max-concurrency=1")
    assert lazyfs("pause", mounted.path).returncode == 0
    assert len(blocks(s3)) < ALL_BLOCKS
    assert mounted.status()["prefetch"]["activity"] == "paused"
    assert "paused" in lazyfs("status", mounted.path).stdout
    read = shell("cat model-00002* | wc -c", mounted.path).stdout
    assert int(read) == len(model("")["model-00002-of-00002.safetensors"])
    assert lazyfs("resume", mounted.path).returncode == 0
    wait_for_all_blocks(s3)


def test_set(mount: Callable[..., Mounted]) -> None:
    mounted = mount("s3://told/m", "--prefetch=off")
    assert lazyfs("set", mounted.path, "max-concurrency=3", "log-level=debug").returncode == 0
    assert mounted.status()["requests_limit"] == 3
    assert "max-concurrency=3, log-level=debug" in lazyfs("status", mounted.path).stdout
    for changes, words in (
        (["max-concurrency=many"], "max-concurrency: 'many' is not allowed: "),
        (["max-concurrency=4", "bandwidth-limit=-1"], "bandwidth-limit: '-1' is not allowed: "),
        (["uid=3"], "uid: cannot be changed while mounted; these can: "),
        (["log-level"], "set: 'log-level' is not NAME=VALUE"),
        (["log-level=info", "log-level=debug"], "set: log-level is given twice"),
    ):
        wrong = lazyfs("set", mounted.path, *changes)
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert wrong.stderr.startswith(f"lazyfs: {words}") and wrong.stderr.count("\n") == 1
    assert mounted.status()["requests_limit"] == 3, "nothing of a refused change is done"


def test_in_a_terminal(mount: Callable[..., Mounted], tmp_path: Path) -> None:
    mounted = mount("s3://told/m", "--prefetch=off")
    for arguments in (["pause"], ["resume"], ["set", "log-level=debug", "bandwidth-limit=1GB"]):
        command, *changes = arguments
        assert in_terminal(command, mounted.path, *changes)[:2] == (0, "")
    assert mounted.status()["changed"] == {"log-level": "debug", "bandwidth-limit": "1GB"}
    code, text, _ = in_terminal("set", mounted.path, "log-level=loud", columns=200)
    assert code == 2
    assert text.strip() == "lazyfs: log-level: 'loud' is not allowed: debug, info, warning or error"
    for command in (["pause"], ["resume"], ["set", "log-level=debug"]):
        code, text, _ = in_terminal(command[0], tmp_path, *command[1:], columns=200)
        assert code == 1 and "no lazyfs daemon serves it" in text


def test_changes_outlive_the_worker(mount: Callable[..., Mounted], s3: S3) -> None:
    s3.fault("GET /told/m/model-0000", "slow", seconds=0.2, times=10)
    mounted = mount("s3://told/m", "--block-size=256KiB", "--max-concurrency=1")
    assert lazyfs("pause", mounted.path).returncode == 0
    changes = ["max_concurrency=3", "log-level=debug", "bandwidth-limit=500MB"]
    assert lazyfs("set", mounted.path, *changes).returncode == 0
    assert lazyfs("set", mounted.path, "maxConcurrency=2").returncode == 0
    for restarts in (1, 2):
        before = blocks(s3)
        assert len(before) < ALL_BLOCKS
        os.kill(mounted.worker, signal.SIGKILL)
        while (now := mounted.status()).get("restarts") != restarts or "error" in now:
            time.sleep(0.1)
        assert now["resumes"] == restarts
        assert now["requests_limit"] == 2
        assert now["changed"] == {
            "max-concurrency": "2", "log-level": "debug", "bandwidth-limit": "500MB",
        }  # fmt: skip
        assert blocks(s3) == before, "it fetches nothing"
        assert mounted.status()["prefetch"]["activity"] == "paused"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(socket_of(mounted)))
        client.sendall(b"no request\r\n\r\n")
        client.recv(100)
    mounted.wait_for_log("DEBUG control.conversation")
    assert lazyfs("resume", mounted.path).returncode == 0
    wait_for_all_blocks(s3)


def test_the_log_has_one_line_of_the_first_load(mount: Callable[..., Mounted]) -> None:
    mounted = mount("s3://told/m")
    for _ in range(2):
        shell("cat model-0000*.safetensors | wc -c", mounted.path)
        mounted.wait_for_log("first load: ")
    (line,) = [line for line in mounted.log().splitlines() if "first load" in line]
    assert f"lazyfs report {mounted.path}" in line


def test_doctor_of_a_healthy_source(server: S3, tmp_path: Path) -> None:
    options = [f"--endpoint-url={server.url}", f"--cache-dir={tmp_path / 'cache'}"]
    answer = lazyfs("doctor", "s3://told/m", *options)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "ok      listing: 4 objects" in answer.stdout
    assert "reading: first byte after" in answer.stdout
    assert "\x1b" not in answer.stdout
    assert not list((tmp_path / "cache").glob("doctor*"))
    code, text, raw = in_terminal("doctor", "--cache-dir=none")
    assert code == 0 and "FUSE: /dev/fuse can be opened" in text and "\x1b[32m" in raw


def test_doctor_of_broken_setups(server: S3, tmp_path: Path) -> None:
    found = json.loads(
        lazyfs(
            "doctor", "s3://nowhere/m", f"--endpoint-url={server.url}", "--json",
            f"--cache-dir={tmp_path / 'cache'}",
        ).stdout
    )  # fmt: skip
    (failed,) = [finding for finding in found if finding["state"] == "failed"]
    assert "there is no such bucket" in failed["words"]
    public = tmp_path / "public"
    public.mkdir(mode=0o777)
    public.chmod(0o777)
    answer = lazyfs("doctor", f"--cache-dir={public}")
    assert answer.returncode == 1
    assert "other users could put bytes into it" in answer.stdout
    assert lazyfs("doctor", "http://x").returncode == 2


@pytest.mark.parametrize("shell_name", ["bash", "zsh", "fish"])
def test_completion(shell_name: str) -> None:
    answer = lazyfs("completion", shell_name)
    assert answer.returncode == 0
    assert "_LAZYFS_COMPLETE" in answer.stdout
    if shell_name == "bash":
        subprocess.run(["bash", "-n", "-c", answer.stdout], check=True)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("lazyfs pa", "pause"), ("lazyfs mount --prefet", "--prefetch"), ("lazyfs cache pr", "prune")],
)
def test_completion_offers_what_fits(typed: str, offered: str) -> None:
    last = str(len(typed.split()) - 1)
    pressed = {"_LAZYFS_COMPLETE": "bash_complete", "COMP_WORDS": typed, "COMP_CWORD": last}
    script = Path(sys.executable).with_name("lazyfs")  # as the shell calls it
    answer = subprocess.run(
        [script], env={**os.environ, **pressed}, capture_output=True, text=True, timeout=60,
        check=True,
    )  # fmt: skip
    assert offered in re.split(r"[,\n]", answer.stdout)


@pytest.mark.parametrize("command", ["status", "report", "top", "doctor", "set", "pause", "mount"])
def test_help_needs_no_mount(command: str) -> None:
    answer = lazyfs(command, "--help")
    assert answer.returncode == 0 and "Usage: " in answer.stdout
