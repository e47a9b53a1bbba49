"""The effect of the prefetch options, counted at the server."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable

import numpy as np
import pytest
from mounting import Mounted, environment, lazyfs, python, shell
from s3 import CREDENTIALS, S3
from safetensors.numpy import save
from test_models import LOAD, model, settle

pytestmark = pytest.mark.fuse

BLOCK = 256 << 10


def layers(count: int) -> bytes:
    """A shard with a tensor of 4 blocks for each layer."""
    return save({f"layers.{n}.w": np.full(BLOCK, n, "float32") for n in range(count)})


def blocks_of(s3: S3, path: str) -> set[int]:
    """Which blocks of an object were asked for."""
    return {
        int(span.removeprefix("bytes=").split("-")[0]) // BLOCK
        for asked, span in s3.data_requests()
        if asked.endswith(path) and span
    }


def test_nothing_is_fetched_before_a_file_is_opened(mount: Callable[..., Mounted], s3: S3) -> None:
    s3.put("onopen", model(""))
    s3.forget()
    mounted = mount("s3://onopen", "--block-size=256KiB", "--prefetch-on=open")
    shell("ls -lR", mounted.path)
    assert settle(s3) == set()
    shell("cat config.json", mounted.path)
    assert settle(s3) == set(model(""))


def test_headers_and_small_files_alone(mount: Callable[..., Mounted], s3: S3) -> None:
    s3.put("heads", model(""))
    s3.forget()
    mount("s3://heads", "--block-size=256KiB", "--prefetch=headers")
    assert settle(s3) == set(model(""))
    assert len(s3.data_requests()) == len(model("")), "the first block of each"


def test_only_tensors_that_are_wanted(mount: Callable[..., Mounted], s3: S3) -> None:
    s3.put("some", {"model.safetensors": layers(10)})
    s3.forget()
    mounted = mount("s3://some", "--block-size=256KiB", r"--tensors=^layers\.[45]\.")
    settle(s3)
    assert blocks_of(s3, "model.safetensors") == {0, *range(16, 25)}
    assert "'layers.9.w': 2359296.0" in python(LOAD, mounted.path / "model.safetensors")


def test_tensor_stops_where_its_reader_stops(mount: Callable[..., Mounted], s3: S3) -> None:
    s3.put("part", {"model.safetensors": layers(40)})
    s3.forget()
    mounted = mount("s3://part", "--block-size=256KiB", "--prefetch=tensor", "--read-ahead=0")
    code = """
import sys
from safetensors import safe_open
with safe_open(sys.argv[1], framework="np") as opened:
    print(float(opened.get_tensor("layers.3.w").sum()))
"""
    assert float(python(code, mounted.path / "model.safetensors")) == 3 * BLOCK
    settle(s3)
    asked = blocks_of(s3, "model.safetensors")
    assert len(asked) < 30, "of 161 blocks: the header, the tensor, a little of what follows"


def test_skipped_tensors_of_a_rank_are_reported(mount: Callable[..., Mounted], s3: S3) -> None:
    """The whole model is brought, and half of it is read."""
    s3.put("half", {"model.safetensors": layers(20)})
    mounted = mount("s3://half", "--block-size=256KiB", "--page-cache=off", "--read-ahead=0")
    settle(s3)
    assert "skipped by" not in lazyfs("status", mounted.path).stdout
    code = """
import sys
from safetensors import safe_open
with safe_open(sys.argv[1], framework="np") as opened:
    for layer in range(10):
        opened.get_tensor(f"layers.{layer}.w").sum()
    opened.get_tensor("layers.19.w").sum()
"""
    python(code, mounted.path / "model.safetensors")
    told = mounted.status()
    assert told["prefetch"]["passed_over_bytes"] > 20 * BLOCK, "of 9 layers of 4 blocks"
    assert "skipped by the reader" in lazyfs("status", mounted.path).stdout


def test_a_loader_of_other_weights_is_followed(mount: Callable[..., Mounted], s3: S3) -> None:
    """vLLM prefers `consolidated*` in some models; nothing in the listing says which."""
    files = model("") | {f"consolidated-{n}.safetensors": layers(10) for n in (1, 2)}
    s3.put("other-weights", files)
    mounted = mount("s3://other-weights", "--block-size=256KiB")
    assert settle(s3) == set(model(""))
    python(LOAD, mounted.path / "consolidated-1.safetensors")
    assert settle(s3) == set(files), "the second one was not opened yet"


def test_requests_for_weights_that_a_loader_does_not_read_are_ended(
    mount: Callable[..., Mounted], s3: S3
) -> None:
    files = model("") | {"consolidated.safetensors": layers(10)}
    s3.put("replaced", files)
    s3.fault("GET /replaced/model-", "slow", times=10**6, seconds=6)  # a minute for each answer
    mounted = mount("s3://replaced", "--block-size=256KiB")
    began_s = time.monotonic()
    while not (told := mounted.status())["in_flight"]:
        assert time.monotonic() < began_s + 20, told
    python(LOAD, mounted.path / "consolidated.safetensors")
    while (told := mounted.status())["requests_in_flight"] > 2:  # two headers
        assert time.monotonic() < began_s + 40, told
    assert told["in_flight"] == 0
    s3.forget()
    name = "model-00001-of-00002.safetensors"
    read = "import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest())"
    digest = hashlib.sha256(files[name]).hexdigest()
    assert python(read, mounted.path / name).strip() == digest


def test_a_second_copy_that_is_included_by_name_comes_too(
    mount: Callable[..., Mounted], s3: S3
) -> None:
    files = model("") | {"consolidated.safetensors": layers(4), "q8.gguf": layers(4)}
    s3.put("asked", files)
    s3.forget()
    include = [f"--include={each}" for each in ("*.json", "model*", "consolidated*")]
    mounted = mount("s3://asked", "--block-size=256KiB", *include)
    assert settle(s3) == set(model("")) | {"consolidated.safetensors"}
    assert blocks_of(s3, "consolidated.safetensors") == set(range(17))
    for what, options in ((mounted.path, []), ("s3://asked", [f"--endpoint-url={s3.url}"])):
        told = lazyfs("inspect", what, *options, *(include if options else []))
        lines = [line.strip() for line in told.stdout.splitlines()]
        (row,) = [at for at, line in enumerate(lines) if line.startswith("consolidated")]
        assert "--include" in lines[row + 1]
        assert row > max(at for at, line in enumerate(lines) if line.startswith("model-"))
        assert "gguf" not in told.stdout


def test_inspect_a_source_and_a_mount(mount: Callable[..., Mounted], s3: S3) -> None:
    s3.put("look", model("") | {"pytorch_model.bin": bytes(1 << 20)})
    mounted = mount("s3://look", "--block-size=256KiB")
    settle(s3)
    s3.forget()
    without = {name: text for name, text in environment().items() if name not in CREDENTIALS}
    answer = lazyfs("inspect", mounted.path, "--json", env=without)
    assert answer.stderr == ""
    told = json.loads(answer.stdout)
    (found,) = told["models"]
    assert [item["path"] for item in found["shards"]] == [
        name for name in sorted(model("")) if name.endswith(".safetensors")
    ]
    assert found["total"]["parameters"] == 4 << 18
    assert found["excluded"][0]["path"] == "pytorch_model.bin"
    assert all(shard["cached_bytes"] == shard["size_bytes"] for shard in found["shards"])
    asked = {path for path, _ in s3.data_requests()}
    assert not any(path.endswith("pytorch_model.bin") for path in asked)
    plain = lazyfs("inspect", "s3://look", f"--endpoint-url={s3.url}", "--cache-dir=none").stdout
    assert "model-00001-of-00002.safetensors" in plain
    assert "F32" in plain and "pytorch_model.bin" in plain
    assert "\x1b" not in plain


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--preset=production", "serving, training or browse"),
        ("--tensors=(a", "a regular expression"),
        ("--tensors=(?=a)", "no look-around"),
    ],
)
def test_invalid_input_is_refused(option: str, message: str, tmp_path) -> None:
    answer = lazyfs("mount", "s3://bucket", tmp_path, option)
    assert answer.returncode == 2
    assert message in answer.stderr
    assert answer.stderr.count("\n") == 1
