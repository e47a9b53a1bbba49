"""Loads a model with Run:ai's streamer, straight from S3. Runs as a process of its own.

    PYTHON bench/runai.py PREFIX

PYTHON is that of the clients of `make loaders`. PREFIX is a model of the bucket of the origin that
the environment names (AWS_ENDPOINT_URL). Prints a line of JSON as load.py does. Each tensor is
copied once, into memory that is reused, as there.
"""

from __future__ import annotations

import time

BEGAN = time.monotonic()

import json  # noqa: E402 - the clock starts before anything is imported
import resource  # noqa: E402
import sys  # noqa: E402

import torch  # noqa: E402
from runai_model_streamer import SafetensorsStreamer, list_safetensors  # noqa: E402


def load(prefix: str) -> int:
    """Load all shards below a prefix; returns the bytes of their tensors."""
    size = 0
    memory = torch.empty(0, dtype=torch.uint8)
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(sorted(list_safetensors(prefix)))
        for _, tensor in streamer.get_tensors():
            data = tensor.reshape(-1).view(torch.uint8)
            if len(data) > len(memory):
                memory = torch.empty(len(data), dtype=torch.uint8)
            memory[: len(data)].copy_(data)
            size += len(data)
    return size


def main() -> None:
    """Load once and print one line of JSON."""
    before, opened = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    size = load(sys.argv[1])
    ended, after = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    start_s = before.ru_utime + before.ru_stime
    answer = {"began": BEGAN, "opened": opened, "ended": ended, "bytes": size, "cpu_s": cpu_s,
              "start_cpu_s": start_s, "peak_mib": after.ru_maxrss / 1024}  # fmt: skip
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
