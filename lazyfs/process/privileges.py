"""Giving up what a daemon of root does not need once it has mounted."""

from __future__ import annotations

import ctypes
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

# linux/prctl.h, linux/capability.h
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 24, 38
_CAPABILITY_VERSION_3 = 0x20080522
_CAP_DAC_READ_SEARCH = 2
# Preferred by the kernel when memory is short are processes with higher values (proc(5)): a load
# can wait for a daemon, but not go on without it.
OOM_SCORE_ADJUSTMENT = -500

_libc = ctypes.CDLL(None, use_errno=True)


def protect_from_oom() -> None:
    """Ask the kernel to end others first when memory is short; needs root.

    Whoever started this process may have asked for more: kubelet does, for critical pods (-997).
    """
    path = Path("/proc/self/oom_score_adj")
    try:
        if int(path.read_text()) > OOM_SCORE_ADJUSTMENT:
            path.write_text(str(OOM_SCORE_ADJUSTMENT))
    except OSError as error:
        log.debug("the OOM score stays as it is: %s", error.strerror)


def drop() -> None:
    """Give up all capabilities but one, and the way to get any back.

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


def _held_capabilities() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapPrm:"):
            return int(line.split()[1], 16)
    return 0


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
