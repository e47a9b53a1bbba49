"""Our `proto/*.proto` match those of CSI and kubelet on the wire."""

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

CSI = "github.com/container-storage-interface/spec@v1.12.0"
KUBELET = "k8s.io/kubelet@v0.36.3"
ROOT = Path(__file__).parents[2]


def go() -> str | None:
    """The Go command, if there is one."""
    return shutil.which("go", path=os.pathsep.join([os.environ["PATH"], "/usr/local/go/bin"]))


def described(path: Path, tmp_path: Path) -> FileDescriptorProto:
    """What a file says, without its comments and its name."""
    output = tmp_path / "descriptors"
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    arguments = [f"-I{path.parent}", f"-I{well_known}", f"--descriptor_set_out={output}", path.name]
    assert protoc.main(["protoc", *arguments]) == 0
    (file,) = FileDescriptorSet.FromString(output.read_bytes()).file
    file.ClearField("name")
    # In any order.
    messages = sorted(file.message_type, key=lambda each: each.name)
    del file.message_type[:]
    file.message_type.extend(messages)
    for service in file.service:
        for method in service.method:
            # `rpc F(A) returns (B) {}` has options, none; `rpc F(A) returns (B);` has none.
            if not method.options.ByteSize():
                method.ClearField("options")
    return file


@pytest.mark.skipif(go() is None, reason="needs Go, to fetch the modules that publish them")
@pytest.mark.parametrize(
    ("module", "theirs", "ours", "messages"),
    [
        (CSI, "csi.proto", "csi.proto", 70),
        (KUBELET, "pkg/apis/pluginregistration/v1/api.proto", "pluginregistration.proto", 4),
    ],
)
def test_is_what_is_published(
    module: str, theirs: str, ours: str, messages: int, tmp_path: Path
) -> None:
    answer = subprocess.run(
        [str(go()), "mod", "download", "-json", module],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
        env={**os.environ, "GOFLAGS": "-mod=mod"},
    )
    published = described(Path(json.loads(answer.stdout)["Dir"], theirs), tmp_path)
    assert len(published.message_type) >= messages
    assert described(ROOT / "proto" / ours, tmp_path) == published
