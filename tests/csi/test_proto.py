"""Our `proto/csi.proto` is, on the wire, the specification's."""

from __future__ import annotations

import importlib.resources
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc

MODULE = "github.com/container-storage-interface/spec@v1.12.0"
ROOT = Path(__file__).parents[2]


def go() -> str | None:
    """The Go command, if there is one."""
    return shutil.which("go", path=os.pathsep.join([os.environ["PATH"], "/usr/local/go/bin"]))


def described(directory: Path, tmp_path: Path) -> FileDescriptorProto:
    """What `csi.proto` of a directory says, without its comments."""
    output = tmp_path / "descriptors"
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    arguments = [f"-I{directory}", f"-I{well_known}", f"--descriptor_set_out={output}", "csi.proto"]
    assert protoc.main(["protoc", *arguments]) == 0
    (file,) = FileDescriptorSet.FromString(output.read_bytes()).file
    for service in file.service:
        for method in service.method:
            # `rpc F(A) returns (B) {}` has options, none; `rpc F(A) returns (B);` has none.
            if not method.options.ByteSize():
                method.ClearField("options")
    return file


@pytest.mark.skipif(go() is None, reason="needs Go, to fetch the specification's module")
def test_is_the_specification(tmp_path: Path) -> None:
    answer = subprocess.run(
        [str(go()), "mod", "download", "-json", MODULE],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
        env={**os.environ, "GOFLAGS": "-mod=mod"},
    )
    theirs = described(Path(json.loads(answer.stdout)["Dir"]), tmp_path)
    ours = described(ROOT / "proto", tmp_path)
    assert len(theirs.message_type) > 70
    assert ours == theirs
