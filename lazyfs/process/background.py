"""Leaves the supervisor of a mount in the background, in a process that the command forks.

A fork takes no time, and the supervisor has most of its modules already.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
from typing import Any, NoReturn

from lazyfs.process import standalone
from lazyfs.process.mount_spec import MountSpec
from lazyfs.process.worker_process import read_report

_REPORT = 3


class BackgroundSupervisor:
    """Start the process, in a session of its own. No other thread may run at that time.

    Args:
        spec: what it mounts.
        log: the descriptor of its log.
    """

    def __init__(self, spec: MountSpec, log: int) -> None:
        self._reports, theirs = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            _supervise(spec, log, theirs)
        os.close(theirs)

    def wait_until_ready(self, timeout_s: float) -> dict[str, Any]:
        """Its report: `ready`, or `error` and `exit_code`. Empty if it ended, or none came."""
        return read_report(self._reports, timeout_s) or {}

    def stop(self) -> None:
        """Tell it to unmount and to end."""
        os.kill(self._pid, signal.SIGTERM)

    def wait(self) -> None:
        """Wait for its end."""
        os.waitpid(self._pid, 0)


def _supervise(spec: MountSpec, log: int, report: int) -> NoReturn:
    code = 1
    try:
        os.setsid()
        # Nothing else of the command stays open. If its own input and outputs are
        # closed, the descriptors may have their numbers.
        log, report = (fcntl.fcntl(each, fcntl.F_DUPFD, _REPORT + 1) for each in (log, report))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for output in (1, 2):
            os.dup2(log, output)
        os.dup2(report, _REPORT, inheritable=False)
        os.closerange(_REPORT + 1, os.sysconf("SC_OPEN_MAX"))
        code = standalone.main(spec, _REPORT)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        logging.shutdown()
        os._exit(code)
