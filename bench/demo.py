"""`make demo`: shows lazyfs in half a minute, on this machine alone.

It starts an S3 server (moto), puts a small sharded safetensors model into it, and mounts it.
Another process maps the files, loads all tensors, and compares them with what was written. Then it
mounts the model again, to show what the cache is for.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

# The S3 server and environment of the tests; `make demo` puts tests/ on the path.
from mounting import environment
from s3 import S3
from safetensors.numpy import save_file

SHARDS = 4
TENSORS = 3
SHAPE = (1024, 4096)
MIB = 1 << 20

LOAD = """
import glob, json, sys, time
from safetensors import safe_open
began = time.perf_counter()
sums, size = {}, 0
for shard in sorted(glob.glob(sys.argv[1] + "/*.safetensors")):
    with safe_open(shard, framework="np") as opened:
        for name in opened.keys():
            tensor = opened.get_tensor(name)
            sums[name] = float(tensor.sum(dtype="float64"))
            size += tensor.nbytes
print(json.dumps({"seconds": time.perf_counter() - began, "bytes": size, "sums": sums}))
"""


def main() -> None:
    """Run the demo. On a failure it prints one line and exits with 1."""
    with tempfile.TemporaryDirectory(prefix="lazyfs-demo-") as directory:
        print("1. An S3 on this machine (moto), and a model in it")
        s3 = S3()
        try:
            Demo(Path(directory), s3).run()
        finally:
            s3.stop()


class Demo:
    """One run, in a directory of its own."""

    def __init__(self, base: Path, s3: S3) -> None:
        self.base = base
        self.s3 = s3
        self.mountpoint = base / "model"
        self.mountpoint.mkdir()

    def run(self) -> None:
        """All steps."""
        sums, size = self.write_model()
        print(f"   s3://models/demo: {SHARDS} shards, {size / MIB:.0f} MiB\n")
        print("2. Mount it")
        self.mount("3. Load every tensor through the mapped files, in another process", sums, size)
        print("\n4. Mount it again, with what the first time left on disk")
        self.mount("5. Load it again", sums, size)
        print("\nAll tensors were right both times. Nothing is mounted any more.")

    def write_model(self) -> tuple[dict[str, float], int]:
        """Put a model into S3. Returns the sum of each tensor, and the total size in bytes."""
        generator = np.random.default_rng(1)
        sums, weight_map, files = {}, {}, {}
        for shard in range(1, SHARDS + 1):
            name = f"model-{shard:05d}-of-{SHARDS:05d}.safetensors"
            tensors = {
                f"model.layers.{shard}.{part}.weight": generator.random(SHAPE, dtype=np.float32)
                for part in range(TENSORS)
            }
            sums |= {key: float(value.sum(dtype="float64")) for key, value in tensors.items()}
            weight_map |= dict.fromkeys(tensors, name)
            save_file(tensors, self.base / name)
            files[name] = (self.base / name).read_bytes()
            (self.base / name).unlink()
        files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
        files["config.json"] = json.dumps({"model_type": "llama", "dtype": "float32"}).encode()
        files["tokenizer.json"] = json.dumps({"vocabulary": list(range(20000))}).encode()
        self.s3.put("models", {f"demo/{name}": body for name, body in files.items()})
        return sums, sum(map(len, files.values()))

    def mount(self, title: str, sums: dict[str, float], size: int) -> None:
        """Mount, load, compare, unmount."""
        self.s3.forget()
        options = [f"--endpoint-url={self.s3.url}", f"--cache-dir={self.base / 'cache'}"]
        options.append(f"--log-file={self.base / 'log'}")
        command = ["lazyfs", "mount", "s3://models/demo", str(self.mountpoint)]
        print(f"   $ {' '.join(command)}")
        began = time.perf_counter()
        self.call([sys.executable, "-m", *command, *options])
        print(f"   ready after {time.perf_counter() - began:.1f} s")
        try:
            print(title)
            loaded = json.loads(self.call([sys.executable, "-c", LOAD, str(self.mountpoint)]))
            if loaded["sums"] != sums:
                sys.exit("demo: a tensor is not what was written")
        finally:
            self.call([sys.executable, "-m", "lazyfs", "umount", str(self.mountpoint)])
        gets = self.s3.data_requests()
        fetched = sum(length(span or "", size) for _, span in gets)
        rate = loaded["bytes"] / loaded["seconds"] / MIB
        print(
            f"   {loaded['bytes'] / MIB:.0f} MiB of tensors in {loaded['seconds']:.2f} s: ", end=""
        )
        print(f"{rate:.0f} MiB/s")
        print(f"   fetched from S3: {fetched / MIB:.0f} MiB in {len(gets)} requests")

    def call(self, command: list[str]) -> str:
        """Run a command and return its output."""
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env=environment(), check=False
        )
        if answer.returncode != 0:
            sys.exit(f"demo: {' '.join(command[1:4])}: {answer.stderr.strip()}")
        return answer.stdout


def length(span: str, default: int) -> int:
    """The number of bytes that a Range header asks for."""
    if not span:
        return default
    first, last = span.removeprefix("bytes=").split("-")
    return int(last) - int(first) + 1


if __name__ == "__main__":
    main()
