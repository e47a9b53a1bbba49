"""Processes of a worker that use its own mount, as the worker itself must not."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import trio


async def ask_aside(module: str, wanted: Any) -> Any:
    """What a module of ours answers, run as a process; both sides are JSON.

    Raises:
        OSError, subprocess.CalledProcessError: as `run_aside`.
    """
    command = [sys.executable, "-P", "-m", module]
    return json.loads(await run_aside(command, json.dumps(wanted).encode()))


async def run_aside(command: Sequence[str], told: bytes = b"") -> bytes:
    """Run a process, and what it printed.

    It may wait for an answer that only the next worker gives, and does not even die before that.
    So a worker that ends kills it but does not wait for it, as `trio.run_process` would.

    Args:
        command: the program and its arguments.
        told: what it reads from its standard input.

    Raises:
        OSError: it could not be started.
        subprocess.CalledProcessError: it ended with another code than 0.
    """
    process = await trio.lowlevel.open_process(
        command, cwd="/",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with process.stdin, process.stdout:
            with contextlib.suppress(trio.BrokenResourceError):  # it has ended; its code says why
                await process.stdin.send_all(told)
            await process.stdin.aclose()
            printed = b"".join([part async for part in process.stdout])
        code = await process.wait()
    finally:
        process.kill()  # unless it has ended
    if code != 0:
        raise subprocess.CalledProcessError(code, list(command))
    return printed
