"""The process that serves one mount: `python -m lazyfs.mount.worker`.

It is started by a supervisor (`lazyfs/supervisor.py`), which passes descriptors: of a connection to
the keeper, which has the mount's spec, of a pipe for its report, and of a leash, a pipe that ends
with the supervisor.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from lazyfs import __version__, daemon, log
from lazyfs.errors import LazyfsError
from lazyfs.mount import privileges
from lazyfs.mount.handover import SPEC
from lazyfs.mount.keeper import KeeperClient, KeeperError
from lazyfs.mount.spec import MountSpec
from lazyfs.mount.supervisor import EXIT_CANNOT_RESUME
from lazyfs.options import MountOptions
from lazyfs.session import CannotResumeError
from lazyfs.source import SourceUrl

# For the end of a worker whose supervisor is gone, before its process just ends.
LAST_STEPS_S = 5.0


def main(name: str, keeper_fd: int, report_fd: int, leash_fd: int | None) -> int:
    """Serve the mount that is kept under `name`; the exit code."""
    os.chdir("/")  # a daemon must not keep a filesystem busy
    keeper = KeeperClient(socket.socket(fileno=keeper_fd))
    spec = MountSpec.from_descriptor(keeper.fetch(name)[SPEC])
    privileges.protect_from_oom()
    try:
        options = MountOptions.parse(("--{name}", spec.options))
        log.configure(options.log_level, options.log_format, spec.mountpoint)
        if leash_fd is not None:
            threading.Thread(target=_end_with, args=[leash_fd], daemon=True).start()
        mount = daemon.Mount(
            SourceUrl.parse(spec.source),
            Path(spec.mountpoint),
            options,
            spec.credentials,
            spec.options,
        )
        daemon.run(
            mount, keeper, lambda: _report(report_fd, {"ready": True, "version": __version__})
        )
    except CannotResumeError as error:
        _report(report_fd, _described(error))
        return EXIT_CANNOT_RESUME
    except (LazyfsError, KeeperError) as error:
        _report(report_fd, _described(error))
        return 1
    return 0


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
