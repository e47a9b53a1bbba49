"""The rights of the processes that serve a mount.

A worker parses foreign data, so it has only the rights that it needs. Its supervisor starts it
without capabilities, with a system call filter, and without a way to regain rights; a supervisor of
root also starts each worker as a user of its own.

Capabilities, their bounding set, `no_new_privs` and filters belong to a thread; a new thread or
process inherits those of the thread that starts it (capabilities(7)). Uses only the standard
library, and little of it, because each mount waits for this import.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import subprocess
import threading
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import IO, NamedTuple

from lazyfs import user
from lazyfs.process import system_calls

# linux/prctl.h, linux/capability.h, linux/securebits.h
_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_SECUREBITS, _PR_SET_NO_NEW_PRIVS = 4, 24, 28, 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 47, 2
_SECBIT_NO_SETUID_FIXUP = 1 << 2
_CAPABILITY_VERSION_3 = 0x20080522
_DAC_READ_SEARCH = 1 << 2
# When memory is short, the kernel prefers to kill processes with higher values (proc(5)): a load
# can wait for a daemon, but cannot continue without it.
OOM_SCORE_ADJUSTMENT = -500

# The memory of a worker: a constant, plus this multiple of the limit for blocks.
MEMORY_BYTES, MEMORY_SHARE = 1 << 30, 4
# The stack of a thread. There may be hundreds; the default of 8 MiB counts against the limit.
STACK_BYTES = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)


class Rights(Enum):
    """What a worker of root needs: no rights of root, to read files of root, or to be root.

    The values are stored with a session.
    """

    NONE = "none"
    READ_ALL_FILES = "read all files"
    USER = "user"


class WorkerUser(NamedTuple):
    """The user of a worker, and whether the worker has the only capability that it may have.

    Attributes:
        uid: user and group id; None: those of its supervisor.
        group: a second group, which owns shared caches; None: there is none.
        reads_all_files: it has CAP_DAC_READ_SEARCH, because it needs files that other users cannot
            read.
    """

    uid: int | None = None
    group: int | None = None
    reads_all_files: bool = True


def leave_no_core_dump() -> None:
    """Disable core dumps of this process, because its memory contains keys.

    Both calls are needed: the limit does not apply if `core_pattern` names a program (core(5)).
    Other processes of this user cannot read its memory either (ptrace(2)).
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def protect_from_oom(process: int | str = "self") -> None:
    """Ask the kernel to kill other processes first when memory is short; needs root.

    The value may be lower already: kubelet sets -997 for critical pods.
    """
    path = Path(f"/proc/{process}/oom_score_adj")
    with contextlib.suppress(OSError):  # without root's rights it stays as it is
        if int(path.read_text()) > OOM_SCORE_ADJUSTMENT:
            path.write_text(str(OOM_SCORE_ADJUSTMENT))


def limit_memory(memory_limit_bytes: int) -> None:
    """Limit the memory of this process, so that foreign data cannot exhaust the machine's.

    Names and parsed data have their own limits (`namespace/catalog.py`, `prefetch/planner.py`);
    this one covers everything else. Beyond it an allocation fails, and with it one request, or this
    process alone. Stacks count, so those of threads that start later are small.

    Args:
        memory_limit_bytes: the limit for blocks.
    """
    threading.stack_size(STACK_BYTES)
    most = MEMORY_BYTES + MEMORY_SHARE * memory_limit_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def worker_user(rights: Rights) -> WorkerUser:
    """A user id that only one worker has, so that no other process may send it signals.

    The thread that starts a worker has this user id for a moment, too.
    """
    ids = user.worker_ids() if system_calls.is_known_machine() else None
    if ids is None or rights is Rights.USER:
        return WorkerUser()
    first, count = ids
    chosen = int.from_bytes(os.urandom(16), "big") % (count - 1)
    return WorkerUser(first + chosen, user.cache_group(), rights is Rights.READ_ALL_FILES)


def start(
    command: Sequence[str],
    as_user: WorkerUser,
    *,
    descriptors: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
    outputs: tuple[int | IO[bytes] | None, ...] = (subprocess.DEVNULL, None, None),
) -> subprocess.Popen[bytes]:
    """Start a process as that user, with at most one capability and no way to get another one.

    Args:
        descriptors: the descriptors that the process inherits.
        outputs: like `stdin`, `stdout` and `stderr` of `subprocess.Popen`.

    Raises:
        OSError: it cannot be started.
    """
    started: list[subprocess.Popen[bytes]] = []
    failed: list[BaseException] = []

    def start_with_less() -> None:
        try:
            if os.geteuid() == 0:
                _keep(_DAC_READ_SEARCH if as_user.reads_all_files else 0)
            if as_user.uid is not None:
                groups = [] if as_user.group is None else [as_user.group]
                system_calls.become(as_user.uid, as_user.uid, groups)
            _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
            system_calls.deny_unneeded()
            stdin, stdout, stderr = outputs
            started.append(
                subprocess.Popen(
                    command, stdin=stdin, stdout=stdout, stderr=stderr, pass_fds=descriptors,
                    start_new_session=True, env=environment,
                )
            )  # fmt: skip
        except BaseException as error:
            failed.append(error)

    # Only this thread gives up rights, the others keep them. With `user` of Popen the
    # process would be forked, and gRPC, which has handlers of forks, would crash in it.
    thread = threading.Thread(target=start_with_less)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return started[0]


def confine() -> None:
    """Give up the rights that `start` cannot take away. Call this before any thread is started.

    Raises:
        OSError: the kernel refused.
    """
    leave_no_core_dump()
    # Files of a shared cache are accessible to a group of workers alone; see `cache_place.py`.
    os.umask(0o007 if os.getgroups() == [user.cache_group()] else 0o077)
    held = user.held_capabilities()
    if held & ~_DAC_READ_SEARCH:  # its supervisor could not limit what root gains by execve(2)
        kept = held & _DAC_READ_SEARCH
        _set_capabilities(kept, kept, 0)


def _keep(kept: int) -> None:
    """Keep only the capabilities that this thread needs to start the process, and `kept` for it."""
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    held = user.held_capabilities()
    for capability in range(last + 1):
        if not kept >> capability & 1:
            # EPERM: this thread lacks CAP_SETPCAP. Then only no_new_privs prevents new rights.
            _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    # An ambient capability must survive the change of user; the others end with execve(2).
    _libc.prctl(_PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP, 0, 0, 0)
    kept &= held
    both = kept | held & (user.SETUID | user.SETGID)
    _set_capabilities(both, both, kept)
    if kept:
        _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, kept.bit_length() - 1, 0, 0)


def _set_capabilities(effective: int, permitted: int, inheritable: int) -> None:
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (effective, permitted, inheritable)
    # Two records: the low words, the high words (capset(2)).
    words = [each & 0xFFFFFFFF for each in sets] + [each >> 32 for each in sets]
    _check(_libc.capset(header, (ctypes.c_uint32 * 6)(*words)))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
