"""The process that serves one mount: `python -m lazyfs.process.worker`.

Its supervisor starts it (`start_worker`) and passes descriptors: a connection to the keeper, which
has the mount's spec, a connection to the supervisor (`lazyfs/process/worker_channel.py`),
and a leash, a pipe that is closed when the supervisor ends.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lazyfs import __version__, log, user
from lazyfs.errors import CannotResumeError, LazyfsError
from lazyfs.faults import report_fault, the_error
from lazyfs.handover.handover import LOG, SPEC, Handover
from lazyfs.handover.keeper import KeeperClient, KeeperError
from lazyfs.options.mount_options import MountOptions
from lazyfs.process import descriptors, privileges
from lazyfs.process.mount_spec import MountSpec
from lazyfs.process.source_probe import SourceProbe
from lazyfs.process.worker_channel import SupervisorChannel
from lazyfs.process.worker_process import EXIT_CANNOT_RESUME
from lazyfs.store.protocol import Source
from lazyfs.store.stores import source_class
from lazyfs.store.url import SourceUrl

# Time for an orderly end of a worker whose supervisor is gone, before it exits.
LAST_STEPS_S = 5.0


def main(
    name: str, owner: tuple[int, int], restarts: int,
    keeper_fd: int, line_fd: int, leash_fd: int | None = None,
) -> int:  # fmt: skip
    """Serve the mount that is kept under `name`; returns the exit code.

    Args:
        owner: user and group of the supervisor.
        restarts: how many workers died before this one.
    """
    began_s = time.monotonic()
    # Objects made at the start stay: garbage collection would take a quarter of the time.
    gc.disable()
    os.chdir("/")  # a daemon must not keep a filesystem busy
    if os.geteuid() != owner[0]:
        groups = os.getgroups()
        user.works_for(*owner, groups[0] if groups else None)
    privileges.confine()
    threading.stack_size(privileges.STACK_BYTES)
    channel = SupervisorChannel(socket.socket(fileno=line_fd))
    keeper = KeeperClient(socket.socket(fileno=keeper_fd))
    try:
        order = _ask_keeper(keeper, name)
        # Before any thread is started: it is forked.
        source = source_class(order.url)
        probe = SourceProbe(source, order.url, order.options, order.spec.credentials, order.region)
    except Exception as error:
        return _refuse(channel, error)
    if leash_fd is not None:
        threading.Thread(target=_end_with, args=[leash_fd], daemon=True).start()
    aside = ThreadPoolExecutor(1)
    opening = aside.submit(_open, source, order, probe)
    aside.shutdown(wait=False)
    try:
        with _without_ldconfig():
            from lazyfs.process.mount import Mount, run  # loaded while S3 is asked

        mount = Mount(
            order.url, Path(order.spec.mountpoint), order.options, began_s, order.spec.credentials,
            order.spec.options,
        )  # fmt: skip
        run(
            mount, keeper, channel, order.former, opening, restarts,
            lambda mounted: _ready(channel, mounted),
        )  # fmt: skip
    except Exception as error:
        return _refuse(channel, the_error(error))
    finally:
        probe.end()
    return 0


@contextmanager
def _without_ldconfig() -> Iterator[None]:
    """Let trio find libpthread without running ldconfig(8), which takes 10 ms.

    See trio/_core/_thread_cache.py. The name is that of glibc. If there is no such library, threads
    of trio have no names.
    """
    import ctypes.util  # the probe does without

    find = ctypes.util.find_library
    ctypes.util.find_library = lambda name: "libpthread.so.0" if name == "pthread" else find(name)
    try:
        yield
    finally:
        ctypes.util.find_library = find


@dataclass(frozen=True, slots=True)
class _Order:
    """The instructions of this worker."""

    spec: MountSpec
    url: SourceUrl
    options: MountOptions
    former: Handover | None

    @property
    def region(self) -> str | None:
        """The bucket's region, if it is already known."""
        return self.former.beginning.region if self.former else None


def _ask_keeper(keeper: KeeperClient, name: str) -> _Order:
    """What to mount.

    Raises:
        LazyfsError, KeeperError: it cannot be mounted.
    """
    kept = keeper.fetch(name)
    if LOG in kept and not os.path.sameopenfile(kept[LOG], 2):
        for output in (1, 2):
            os.dup2(kept[LOG], output)
    spec = MountSpec.from_descriptor(kept[SPEC])
    os.close(kept[SPEC])
    options = MountOptions.parse(("--{name}", spec.options))
    privileges.limit_memory(options.memory_limit)
    log.configure(
        options.log_level, options.log_format, mountpoint=spec.mountpoint, volume=spec.volume
    )
    options = descriptors.fit(options)
    former = Handover.fetch(keeper, name)
    return _Order(spec, SourceUrl.parse(spec.source), options, former)


def _open(source: type[Source], order: _Order, probe: SourceProbe) -> Source:
    """The source, as the probe found it; if the probe was killed, it is found here."""
    about = (order.url, order.options, order.spec.credentials)
    found = probe.wait() or source.resolve(*about, order.region)
    return source(*about, found)


def _ready(channel: SupervisorChannel, mounted_ns: int) -> None:
    channel.ready(__version__, mounted_ns)
    gc.freeze()
    gc.enable()


def _refuse(channel: SupervisorChannel, error: BaseException) -> int:
    """Report why this worker cannot start or resume; returns the exit code."""
    if isinstance(error, LazyfsError):
        text, code = str(error), error.exit_code
    elif isinstance(error, KeeperError):
        text, code = str(error), 1
    else:
        report_fault("the worker", error)
        text, code = f"{type(error).__name__}: {error}; the log has more", 1
    channel.refuse(text, code, type(error).__name__)
    return EXIT_CANNOT_RESUME if isinstance(error, CannotResumeError) else 1


def _end_with(leash: int) -> None:
    """End soon after the supervisor: the next supervisor starts a worker that resumes the mount."""
    try:
        os.read(leash, 1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LAST_STEPS_S)
    finally:
        logging.shutdown()
        os._exit(1)


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[2:]]
    code = main(sys.argv[1], (numbers[0], numbers[1]), *numbers[2:])
    logging.shutdown()
    os._exit(code)  # without closing the index of a cache, whose disk may hang
