#!/usr/bin/env python3
"""Stands for vLLM in pods: maps a model's files, compares their bytes, answers /health.

    vllm serve MODEL ...   load, then serve
    vllm load MODEL        load, print what was read, end
    vllm watch MODEL       load again and again from the same mappings, whose pages are let go of
                           each time; one line a pass
    vllm hold MODEL        map the first byte of each file, and do nothing more until `SIGUSR1`

What the bytes must be is in MODEL/sha256.json. Any difference or error ends it with a sentence.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import mmap
import os
import signal
import sys
import time
from pathlib import Path

PIECE = 1 << 20


class Model:
    """The files of a directory, mapped.

    Args:
        directory: with a `sha256.json`.
    """

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)
        self.digests = json.loads((self.directory / "sha256.json").read_text())
        self.maps: dict[str, tuple[int, mmap.mmap]] = {}
        for name in self.digests:
            descriptor = os.open(self.directory / name, os.O_RDONLY)
            mapped = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
            self.maps[name] = (descriptor, mapped)

    def check(self) -> tuple[int, float]:
        """Read all through the maps; the bytes, and the longest wait for a piece in seconds."""
        total, longest = 0, 0.0
        for name, (_, mapped) in self.maps.items():
            digest = hashlib.sha256()
            for start in range(0, len(mapped), PIECE):
                began = time.monotonic()
                digest.update(mapped[start : start + PIECE])
                longest = max(longest, time.monotonic() - began)
            total += len(mapped)
            if digest.hexdigest() != self.digests[name]:
                sys.exit(f"ERROR {name} has other bytes")
        return total, longest

    def drop(self) -> None:
        """Have the kernel let go of the pages."""
        for descriptor, mapped in self.maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


class LLM:
    """As vLLM's class in programs that use it offline."""

    def __init__(self, model: str) -> None:
        self.model = Model(model)
        print("loaded", self.model.check()[0], "bytes", flush=True)

    def generate(self, prompt: str) -> list[object]:
        text = type("Completion", (), {"text": f"{prompt} ..."})
        return [type("RequestOutput", (), {"outputs": [text]})]


def serve(model: str) -> None:
    LLM(model)

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    http.server.ThreadingHTTPServer(("", 8000), Answers).serve_forever()


def watch(path: str) -> None:
    model = Model(path)
    number = 0
    while True:
        number += 1
        began = time.monotonic()
        total, longest = model.check()
        names = sorted(each.name for each in Path(path).iterdir())
        if not set(model.digests) <= set(names):
            sys.exit(f"ERROR the directory has {names}")
        with (model.directory / "config.json").open() as anew:
            json.load(anew)
        took = time.monotonic() - began
        print(f"pass {number}: {total} bytes in {took:.1f} s, waited {longest:.1f} s", flush=True)
        model.drop()
        time.sleep(0.5)


def hold(path: str) -> None:
    signal.signal(signal.SIGUSR1, lambda *_: None)
    model = Model(path)
    print("mapped", flush=True)
    signal.pause()
    model.drop()
    model.check()
    print("read", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # the first process has no default
    command, path = sys.argv[1:3]
    if command == "load":
        LLM(path)
    else:
        {"serve": serve, "watch": watch, "hold": hold}[command](path)
