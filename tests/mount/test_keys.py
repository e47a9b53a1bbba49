"""Keys that no path can name, and keys at the limit."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from mounting import Mounted, python, shell
from s3 import S3

pytestmark = pytest.mark.fuse

SHOWN = {
    "a b",
    "ü/ñ",
    "p%41q",
    "100%",
    "a+b&c=d",
    "hash#tag",
    "what?",
    "[x]{y}",
    "back\\slash",
    'quo"te',
    "semi;colon",
    "*star*",
    "日本語.txt",
    "e\u0301",
    "\u00e9",
    "-rf",
    "x" * 255,
    "deep/" * 20 + "file",
}
HIDDEN = {"a//b", "./dot", "up/../dotdot", "..", "tab\tkey", "y" * 256, "\x7fdel"}
WALK = """
import json, os, sys
files = {}
for directory, _, names in os.walk(sys.argv[1]):
    for name in names:
        path = os.path.join(directory, name)
        files[os.path.relpath(path, sys.argv[1])] = open(path).read()
print(json.dumps(files))
"""


@pytest.mark.parametrize("many", [False, True], ids=["listed whole", "listed by directory"])
def test_awkward_keys(mount: Callable[..., Mounted], s3: S3, many: bool) -> None:
    bucket = f"awkward{many}".lower()
    s3.put(bucket, {key: key.encode() for key in SHOWN | HIDDEN})
    s3.put(bucket, {"both": b"hidden", "both/below": b"both/below", "marker/": b"", "m2/": b"x"})
    if many:
        s3.put_many(bucket, [f"many/{i}" for i in range(1000)])
    mounted = mount(f"s3://{bucket}", "--prefetch=off")

    files = json.loads(python(WALK, mounted.path, timeout_s=240))
    expected = SHOWN | {"both/below"} | ({f"many/{i}" for i in range(1000)} if many else set())
    assert set(files) == expected
    assert all(path == content for path, content in files.items())
    assert shell("ls -d marker m2 both", mounted.path).stdout.split() == ["both", "m2", "marker"]
    assert shell("ls marker", mounted.path).stdout == ""
    mounted.wait_for_log("keys that cannot be shown")


def test_missing_names(mount: Callable[..., Mounted], s3: S3) -> None:
    s3.put("names", {"dir/file": b"x"})
    mounted = mount("s3://names")
    for name in ("nothing", "dir/nothing", "dir/file/below", "n" * 300):
        assert shell(f"cat {name}", mounted.path).returncode == 1
    assert "File name too long" in shell("cat " + "n" * 300, mounted.path).stderr
    assert shell("cat dir/file", mounted.path).stdout == "x"


def test_include_and_exclude(mount: Callable[..., Mounted], s3: S3) -> None:
    keys = ["a.safetensors", "a.bin", "original/a.safetensors", "config.json"]
    s3.put("globs", dict.fromkeys(keys, b"x"))
    options = ["--include=*.safetensors", "--include=*.json", "--exclude=original/*"]
    mounted = mount("s3://globs", *options)
    assert shell("find . -type f | sort", mounted.path).stdout.split() == [
        "./a.safetensors",
        "./config.json",
    ]
