"""Which files of which models are prefetched, counted at the server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from mounting import TIMEOUT_S, Mounted, lazyfs, python, shell
from s3 import S3
from safetensors.numpy import save

pytestmark = pytest.mark.fuse

LOAD = """
import sys
from safetensors import safe_open
with safe_open(sys.argv[1], framework="np") as opened:
    print({name: float(opened.get_tensor(name).sum()) for name in sorted(opened.keys())})
"""


# Prints the names of the files whose first 64 KiB are in the page cache.
WITH_HEADERS = """
import sys
from pathlib import Path
from lazyfs.pagecache.mincore import broken_pieces
mountpoint, *names = Path(sys.argv[1]), *sys.argv[2:]
for name in names:
    with open(mountpoint / name, "rb") as file:
        if not broken_pieces(file.fileno(), 0, 64 << 10):
            print(name)
"""


def model(prefix: str, shards: int = 2) -> dict[str, bytes]:
    """The objects of a small sharded model: two tensors of 1 MiB in each shard."""
    files, weight_map = {}, {}
    for shard in range(1, shards + 1):
        name = f"model-{shard:05d}-of-{shards:05d}.safetensors"
        tensors = {
            f"{shard}.{part}": np.full(1 << 18, shard + part, "float32") for part in range(2)
        }
        weight_map |= dict.fromkeys(tensors, name)
        files[f"{prefix}{name}"] = save(tensors)
    index = json.dumps({"weight_map": weight_map}).encode()
    return {**files, f"{prefix}model.safetensors.index.json": index, f"{prefix}config.json": b"{}"}


def settle(s3: S3) -> set[str]:
    """The objects that were fetched, once fetching has come to rest."""
    seen = -1
    while seen != len(requests := s3.data_requests()):
        seen = len(requests)
        time.sleep(0.7)
    return {path.split("/", 2)[2] for path, _ in requests}


def test_all_files_that_a_loader_reads_are_fetched_of_one_model(
    mount: Callable[..., Mounted], s3: S3
) -> None:
    extra = ["consolidated.safetensors", "pytorch_model.bin", "original/weights.pth", "odd.gguf"]
    s3.put("one", model("") | dict.fromkeys(extra, bytes(1 << 20)))
    s3.forget()
    mounted = mount("s3://one", "--block-size=256KiB")
    assert settle(s3) == set(model(""))
    assert python(LOAD, mounted.path / "model-00002-of-00002.safetensors") == (
        "{'2.0': 524288.0, '2.1': 786432.0}\n"
    )
    assert shell("cat pytorch_model.bin | wc -c", mounted.path).stdout.strip() == str(1 << 20)


def test_of_several_models_the_opened_one_is_fetched(mount: Callable[..., Mounted], s3: S3) -> None:
    s3.put("several", model("a/") | model("b/") | {"README.md": b"readme"})
    s3.forget()
    mounted = mount("s3://several", "--block-size=256KiB")
    assert settle(s3) == set()
    shell("ls -lR; cat README.md", mounted.path)
    assert settle(s3) == {"README.md"}
    shell("cat b/config.json", mounted.path)
    assert settle(s3) == {"README.md", *model("b/")}


def test_the_only_model_among_the_first_objects_may_not_be_the_only_one(
    mount: Callable[..., Mounted], s3: S3
) -> None:
    s3.put_many("first", (f"b/{number:04}" for number in range(1100)))
    s3.put("first", model("a/"))
    s3.forget()
    mounted = mount("s3://first", "--block-size=256KiB")
    shell("ls . a", mounted.path)
    assert settle(s3) == set()
    shell("cat a/config.json", mounted.path)
    assert settle(s3) == set(model("a/"))


def test_a_wrong_index_costs_only_the_order(mount: Callable[..., Mounted], s3: S3) -> None:
    files = model("")
    lie = {"weight_map": {"a": "missing.safetensors", "b": "../../etc/passwd"}}
    files["model.safetensors.index.json"] = json.dumps(lie).encode()
    s3.put("lying", files)
    mounted = mount("s3://lying")
    assert python(LOAD, mounted.path / "model-00001-of-00002.safetensors").startswith("{'1.0'")
    mounted.wait_for_log("missing.safetensors")


@pytest.mark.parametrize("options", [[], ["--tensors=a"]], ids=repr)
@pytest.mark.parametrize("body", [b"", b"short", b"\xff" * 100, bytes(100)], ids=repr)
def test_a_wrong_header_costs_only_the_prefetch(
    mount: Callable[..., Mounted], s3: S3, body: bytes, options: list[str]
) -> None:
    bucket = f"wrong{len(body)}{len(set(body))}{len(options)}"
    s3.put(bucket, {"model.safetensors": body})
    mounted = mount(f"s3://{bucket}", *options)
    code = "import sys; sys.stdout.write(open(sys.argv[1], 'rb').read().hex())"
    for _ in range(2):
        assert python(code, mounted.path / "model.safetensors") == body.hex()
    mounted.wait_for_log("its header is not valid")


def test_opening_a_shard_and_reading_its_header_needs_no_request(
    mount: Callable[..., Mounted], s3: S3
) -> None:
    """Also of the last of many shards, before their blocks are here."""
    shard = save({"w": np.zeros(1 << 20, "float32")})
    names = [f"model-{n:05}-of-00020.safetensors" for n in range(1, 21)]
    # The kernel may drop pages at any time, for another test too: that is no fault of ours, and
    # does not happen each time.
    for turn in range(4):
        s3.put(f"headers{turn}", dict.fromkeys(names, shard))
        s3.forget()
        mounted = mount(f"s3://headers{turn}", "--block-size=1MiB", "--prefetch=headers")
        deadline = time.monotonic() + TIMEOUT_S
        while not mounted.status()["ready"]["headers"]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        pushed: set[str] = set()
        looked_until = time.monotonic() + 3
        while pushed != set(names) and time.monotonic() < looked_until:
            pushed.update(python(WITH_HEADERS, mounted.path, *names).split())
        if pushed == set(names):
            break
    assert pushed == set(names), "in the page cache"
    settle(s3)
    assert {span for _, span in s3.data_requests()} == {"bytes=0-65535"}, "the headers alone"
    s3.forget()
    code = f"""{WITH_HEADERS}
from safetensors import safe_open
for name in names:
    with safe_open(mountpoint / name, framework="np") as opened:
        assert list(opened.keys()) == ["w"]
"""
    kept = python(code, mounted.path, *names).split()
    assert {path.rpartition("/")[2] for path, _ in s3.data_requests()}.isdisjoint(kept)


def test_a_gguf_that_an_upload_cut_off_is_told_before_it_is_loaded(s3: S3, tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "whole.gguf", "llama")
    writer.add_token_list([f"word {at}" for at in range(9000)])
    writer.add_tensor("weights", np.ones((256, 1024), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = (tmp_path / "whole.gguf").read_bytes()
    s3.put("many", {"one/q4.gguf": whole, "cut/q4.gguf": whole[:-1], "folder/q2.gguf": whole,
                    "folder/q4.gguf": whole, "folder/q8.gguf": whole[:100_000]})  # fmt: skip
    options = [f"--endpoint-url={s3.url}", f"--cache-dir={tmp_path / 'cache'}"]
    for prefix, name in (("one", None), ("cut", "q4.gguf"), ("folder", "q8.gguf")):
        for command in ("doctor", "inspect", "warm"):
            answer = lazyfs(command, f"s3://many/{prefix}", *options)
            said = answer.stdout + answer.stderr
            assert answer.returncode == (name is not None), said
            assert name is None or (name in said and "cut off" in said), said
    (tmp_path / "mnt").mkdir()
    waiting = lazyfs("mount", "s3://many/cut", tmp_path / "mnt", "--wait", "model", *options)
    try:
        assert waiting.returncode == 1 and "q4.gguf: the tensors end at byte" in waiting.stderr
    finally:
        lazyfs("umount", tmp_path / "mnt")
