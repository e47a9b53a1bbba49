"""Giving up what a daemon of root does not need, and what a crash would tell.

Capabilities, their bounding set and `no_new_privs` are a thread's; a new thread or process has
those of the thread that starts it (capabilities(7)).
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import threading
from pathlib import Path

log = logging.getLogger(__name__)

# linux/prctl.h, linux/capability.h
_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 4, 24, 38
_CAPABILITY_VERSION_3 = 0x20080522
_CAP_DAC_READ_SEARCH = 2
# When memory is short, the kernel prefers to kill processes with higher values (proc(5)): a load
# can wait for a daemon, but cannot continue without it.
OOM_SCORE_ADJUSTMENT = -500

# Threads that only wait for work answer by then.
THREADS_TIMEOUT_S = 5.0

_libc = ctypes.CDLL(None, use_errno=True)


def leave_no_core_dump() -> None:
    """Have a crash of this process leave no core dump: its memory holds keys.

    Both are needed: the limit is not asked where `core_pattern` names a program (core(5)). Other
    processes of this user cannot read its memory either (ptrace(2)).
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def protect_from_oom() -> None:
    """Ask the kernel to kill other processes first when memory is short; needs root.

    The value may be lower already: kubelet sets -997 for critical pods.
    """
    path = Path("/proc/self/oom_score_adj")
    try:
        if int(path.read_text()) > OOM_SCORE_ADJUSTMENT:
            path.write_text(str(OOM_SCORE_ADJUSTMENT))
    except OSError as error:
        log.debug("the OOM score stays as it is: %s", error.strerror)


def drop() -> None:
    """Give up all capabilities of this thread but one, and the way to get any back.

    CAP_DAC_READ_SEARCH stays: credential files that are read again when a token was renewed may
    belong to another user. Files of the cache and the log belong to this one.

    Raises:
        OSError: the kernel refused.
    """
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    if os.geteuid() != 0:
        return
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    kept = _held_capabilities() & (1 << _CAP_DAC_READ_SEARCH)
    for capability in range(last + 1):
        if not kept >> capability & 1:
            # EPERM: CAP_SETPCAP is not held; then no_new_privs is what stands in the way.
            _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    low, high = kept & 0xFFFFFFFF, kept >> 32
    # Two records of: effective, permitted, inheritable (capset(2)).
    sets = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    _check(_libc.capset(header, sets))


async def drop_in_all_threads() -> None:
    """`drop`, in the thread of the event loop and in those that wait for its work.

    To be called while nothing is done in threads.
    """
    import trio  # not for supervisors

    drop()
    others = [each for each in threading.enumerate() if each is not threading.current_thread()]
    if not others:
        return
    # As many jobs at once as there are threads: so each thread that waits for work gets one.
    begun = threading.Barrier(len(others))
    limiter = trio.CapacityLimiter(len(others))

    def drop_together() -> None:
        begun.wait(THREADS_TIMEOUT_S)
        drop()

    async with trio.open_nursery() as nursery:
        for _ in others:
            nursery.start_soon(lambda: trio.to_thread.run_sync(drop_together, limiter=limiter))


def _held_capabilities() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapPrm:"):
            return int(line.split()[1], 16)
    return 0


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
