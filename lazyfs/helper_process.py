"""Helper processes that use the mount of their worker, which the worker itself must not do."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import trio


async def ask_helper(module: str, wanted: Any) -> Any:
    """Run a module of lazyfs as a process. Its input and its answer are JSON.

    Args:
        module: name of the module; it reads JSON from standard input and prints JSON.
        wanted: the input.

    Raises:
        OSError, subprocess.CalledProcessError: as `run_helper`.
    """
    command = [sys.executable, "-P", "-m", module]
    return json.loads(await run_helper(command, json.dumps(wanted).encode()))


async def run_helper(command: Sequence[str], stdin: bytes = b"") -> bytes:
    """Run a process and return what it prints.

    The process may wait for a FUSE answer that only the next worker can give, and cannot be killed
    until then. So on cancellation it is sent SIGKILL but not awaited, unlike in `trio.run_process`.

    Args:
        command: the program and its arguments.
        stdin: the bytes it reads from its standard input.

    Raises:
        OSError: it could not be started.
        subprocess.CalledProcessError: its exit code is not 0.
    """
    process = await trio.lowlevel.open_process(
        command, cwd="/",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with process.stdin, process.stdout:
            with contextlib.suppress(trio.BrokenResourceError):  # it ended; see its exit code
                await process.stdin.send_all(stdin)
            await process.stdin.aclose()
            printed = b"".join([part async for part in process.stdout])
        code = await process.wait()
    finally:
        process.kill()  # no effect if it has ended
    if code != 0:
        raise subprocess.CalledProcessError(code, list(command))
    return printed
