"""Clients that others wrote, on real mounts: the quick ones of `make loaders`.

They are too large for the environment of the tests. Where `make loaders` has not installed them
(`tests/loaders/install`), they are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from mounting import Mounted
from s3 import S3

LOADERS = Path(__file__).parents[1] / "loaders"
PLACE = Path(os.environ.get("LAZYFS_LOADERS", Path.home() / ".cache" / "lazyfs-loaders"))
PYTHON = PLACE / "venv" / "bin" / "python"
LOAD_S = 300

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.timeout(2 * LOAD_S),
    pytest.mark.skipif(
        not (PLACE / "installed").exists(), reason="make loaders has not installed the clients"
    ),
]


@pytest.fixture(scope="module")
def model(server: S3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in shards, in a directory and in S3."""
    root = tmp_path_factory.mktemp("loaders")
    subprocess.run(
        [PYTHON, LOADERS / "models.py", root, "--only", "llm"], check=True, timeout=LOAD_S
    )
    files = {f"llm/{path.name}": path.read_bytes() for path in (root / "llm").iterdir()}
    server.put("loaders", files)
    return root / "llm"


def load(client: str, *directories: Path) -> list[str]:
    """The digests of what a client has loaded from each."""
    done = subprocess.run(
        [PYTHON, LOADERS / "clients.py", client],
        input="".join(f"{client} {directory}\n" for directory in directories),
        capture_output=True, text=True, timeout=LOAD_S, check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line)["digest"] for line in done.stdout.splitlines() if line]


@pytest.mark.parametrize("client", ["transformers", "safetensors", "runai"])
def test_loads_the_same_as_from_a_directory(
    client: str, model: Path, mount: Callable[..., Mounted]
) -> None:
    local, mounted = load(client, model, mount("s3://loaders/llm").path)
    assert local == mounted
