"""Denies system calls that a worker never needs, by a kernel filter (seccomp(2)).

A worker parses foreign data: listings, headers, answers of servers. An attacker who controls it can
reach the kernel only through system calls. The filter denies those that a file server does not need
and that many exploits used: other processes, mounts, namespaces, modules, BPF, io_uring and so on.
A denied call fails with EPERM.

Uses only the standard library. The filter stays for all threads and processes that start later.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Sequence

# linux/prctl.h, linux/seccomp.h
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
# linux/bpf_common.h: load a word, jump if equal, if greater or equal, if any bit is set; return.
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
# Offsets in struct seccomp_data; the low half of the first argument on little-endian machines.
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET (linux/sched.h)
_NEW_NAMESPACES = 0x7E020000
# The x32 system calls of x86-64 are the same calls under other numbers.
_X32 = 0x40000000
_INSTRUCTION = struct.Struct("=HBBI")

# Name: number on x86-64 (asm/unistd_64.h), on arm64 (asm-generic/unistd.h); -1: there is none.
_DENIED = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "personality": (135, 92), "acct": (163, 89), "quotactl": (179, 60), "swapon": (167, 224),
    "swapoff": (168, 225), "syslog": (103, 116), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "sethostname": (170, 161), "setdomainname": (171, 162), "vhangup": (153, 58),
    "fanotify_init": (300, 262), "iopl": (172, -1), "ioperm": (173, -1), "modify_ldt": (154, -1),
}  # fmt: skip
_SETGROUPS, _SETRESUID, _SETRESGID = (116, 159), (117, 147), (119, 149)
_SOCKET, _CLONE, _CLONE3 = (41, 198), (56, 220), (435, 435)
# AF_UNIX, AF_INET, AF_INET6, and AF_NETLINK, with which libc looks for addresses.
_FAMILIES = (1, 2, 10, 16)
# linux/audit.h
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_libc = ctypes.CDLL(None, use_errno=True)


def become(uid: int, gid: int, groups: Sequence[int]) -> None:
    """Change the user of this thread alone; libc would change that of the whole process.

    Raises:
        OSError: it is not permitted.
    """
    column, _ = _MACHINES[os.uname().machine]
    ids = (ctypes.c_uint32 * len(groups))(*groups)
    _call(_SETGROUPS[column], len(groups), ids)
    _call(_SETRESGID[column], gid, gid, gid)
    _call(_SETRESUID[column], uid, uid, uid)


def is_known_machine() -> bool:
    """Whether the numbers of this machine's system calls are known."""
    return os.uname().machine in _MACHINES


def deny_unneeded() -> bool:
    """Install the filter for this thread and all that it starts; needs `no_new_privs`.

    Returns:
        False on a machine without a list, or a kernel without filters.
    """
    if not is_known_machine():
        return False
    return _install(_steps(*_MACHINES[os.uname().machine]))


def _install(steps: Sequence[tuple[int, int, int, int]]) -> bool:
    program = b"".join(_INSTRUCTION.pack(*step) for step in steps)
    count = len(program) // _INSTRUCTION.size
    instructions = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: a number, padding, and a pointer (linux/filter.h).
    head = ctypes.create_string_buffer(
        struct.pack("@HxxxxxxP", count, ctypes.addressof(instructions))
    )
    if _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, head, 0, 0) == 0:
        return True
    number = ctypes.get_errno()
    if number == errno.EINVAL:
        return False
    raise OSError(number, os.strerror(number))


def _call(number: int, *arguments: object) -> None:
    if _libc.syscall(ctypes.c_long(number), *arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def _steps(column: int, architecture: int) -> list[tuple[int, int, int, int]]:
    """The filter: each test jumps over the one instruction that answers."""
    denied = sorted({numbers[column] for numbers in _DENIED.values()} - {-1})
    steps = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        # 32-bit programs have other numbers.
        (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        # Its flags are in memory. Without it libc uses clone.
        (_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
    ]  # fmt: skip
    for number in denied:
        steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    steps += [
        (_EQUAL, 0, 3, _CLONE[column]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_ANY_BIT, 0, 1, _NEW_NAMESPACES), (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        # What follows would compare the flags with the number of socket; so load it again.
        (_LOAD, 0, 0, _NUMBER),
        (_EQUAL, 1, 0, _SOCKET[column]), (_RETURN, 0, 0, _ALLOW),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
    ]  # fmt: skip
    for family in _FAMILIES:
        steps += [(_EQUAL, 0, 1, family), (_RETURN, 0, 0, _ALLOW)]
    return [*steps, (_RETURN, 0, 0, _ERRNO | errno.EAFNOSUPPORT)]
