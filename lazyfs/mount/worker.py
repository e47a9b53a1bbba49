"""The process that serves one mount: `python -m lazyfs.mount.worker`.

It is started by whoever supervises it (`start_worker`), who passes descriptors: of a connection to
the keeper, which has the mount's spec, if not yet then soon, of a pipe for its report, and of a
leash, a pipe that ends with the supervisor.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazyfs import __version__, log
from lazyfs.errors import CannotResumeError, LazyfsError
from lazyfs.mount import privileges, syscalls
from lazyfs.mount.handover import LOG, SPEC, Handover
from lazyfs.mount.keeper import KeeperClient, KeeperError
from lazyfs.mount.processes import EXIT_CANNOT_RESUME
from lazyfs.mount.spec import Credentials, MountSpec
from lazyfs.options import MountOptions

if TYPE_CHECKING:
    from lazyfs.source import Source, SourceUrl

# For the end of a worker whose supervisor is gone, before its process just ends.
LAST_STEPS_S = 5.0


def main(name: str, keeper_fd: int, report_fd: int, leash_fd: int | None) -> int:
    """Serve the mount that is kept under `name`; the exit code."""
    # What a start makes stays: looking through it again and again takes a quarter of the time.
    gc.disable()
    os.chdir("/")  # a daemon must not keep a filesystem busy
    # First, because a worker is started before it is known what it is to mount.
    with _without_awscrt():
        from lazyfs.source import SourceUrl

    keeper = KeeperClient(socket.socket(fileno=keeper_fd))
    kept = keeper.fetch(name)
    if LOG in kept:
        for output in (1, 2):
            os.dup2(kept[LOG], output)
    spec = MountSpec.from_descriptor(kept[SPEC])
    privileges.protect_from_oom()
    try:
        options = MountOptions.parse(("--{name}", spec.options))
        log.configure(
            options.log_level, options.log_format, mountpoint=spec.mountpoint, volume=spec.volume
        )
        if leash_fd is not None:
            threading.Thread(target=_end_with, args=[leash_fd], daemon=True).start()
        url, mountpoint = SourceUrl.parse(spec.source), Path(spec.mountpoint)
        former = Handover.fetch(keeper, name)
        if former is None:
            syscalls.check_mountpoint(mountpoint)
        aside = ThreadPoolExecutor(1)
        opening = aside.submit(_open, url, options, spec.credentials, former)
        aside.shutdown(wait=False)
        from lazyfs import daemon  # loaded while S3 is asked

        mount = daemon.Mount(url, mountpoint, options, spec.credentials, spec.options)
        daemon.run(mount, keeper, former, opening, lambda: _ready(report_fd))
    except CannotResumeError as error:
        _report(report_fd, _described(error))
        return EXIT_CANNOT_RESUME
    except (LazyfsError, KeeperError) as error:
        _report(report_fd, _described(error))
        return 1
    return 0


def _open(
    url: SourceUrl,
    options: MountOptions,
    credentials: Credentials | None,
    former: Handover | None,
) -> Source:
    from lazyfs.source import Source

    source = Source(url, options, credentials, former.beginning.region if former else None)
    if former is None:
        source.look_ahead()
    return source


@contextmanager
def _without_awscrt() -> Iterator[None]:
    """Let botocore not load a library of twelve megabytes that a mount has no use for.

    botocore does that wherever it is installed (botocore/compat.py), and needs it for credentials
    of `aws login` only, which a profile of the configuration file names (`login_session`).
    """
    if _may_use_aws_login() or "awscrt" in sys.modules:
        yield
        return
    sys.modules["awscrt"] = None  # type: ignore[assignment]  # it is as if it were not installed
    try:
        yield
    finally:
        del sys.modules["awscrt"]


def _may_use_aws_login() -> bool:
    path = Path(os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config")
    try:
        return b"login_session" in path.expanduser().read_bytes()
    except (OSError, RuntimeError):  # there is none, or no home
        return False


def _ready(report_fd: int) -> None:
    _report(report_fd, {"ready": True, "version": __version__})
    gc.freeze()
    gc.enable()


def _described(error: LazyfsError | KeeperError) -> dict[str, Any]:
    code = error.exit_code if isinstance(error, LazyfsError) else 1
    return {"error": str(error), "exit_code": code, "kind": type(error).__name__}


def _report(descriptor: int, message: dict[str, Any]) -> None:
    with open(descriptor, "w") as pipe:
        json.dump(message, pipe)


def _end_with(leash: int) -> None:
    """End soon when the supervisor is gone: its successor has a daemon go on with the mount."""
    os.read(leash, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LAST_STEPS_S)
    os._exit(1)


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[2:]]
    sys.exit(main(sys.argv[1], numbers[0], numbers[1], numbers[2] if len(numbers) > 2 else None))
