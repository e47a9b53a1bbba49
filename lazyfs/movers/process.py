"""A mover: runs functions on the memory that it shares with its worker. See `call.py`.

It is started with the numbers of its descriptors, and ends when its worker closes the control
socket or ends. (PR_SET_PDEATHSIG would look at the thread that started it.)
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import mmap
import os
import signal
import socket
import sys
import threading
import traceback
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

from lazyfs.movers import context
from lazyfs.movers.call import MOST_BYTES, told_of

# As for threads of a worker that move bytes: threads that decide go first (`fetch/threads.py`).
NICER = 5
# linux/prctl.h
_PR_SET_DUMPABLE = 4


class _Memory:
    """The worker's arena, mapped up to its present size: one mapping for each time that it grew.

    One larger mapping in the place of a former one would cost a fault for each page once more.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._views: list[memoryview] = []
        # Where each mapping ends in the file. Slots do not cross these places.
        self._ends: list[int] = []

    def part(self, offset: int, length: int) -> memoryview:
        with self._lock:
            at = bisect_right(self._ends, offset)
            start = self._ends[at - 1] if at else 0
            if at == len(self._ends):
                size = os.fstat(self._descriptor).st_size
                mapped = mmap.mmap(self._descriptor, size - start, mmap.MAP_SHARED, offset=start)
                self._views.append(memoryview(mapped))
                self._ends.append(size)
            return self._views[at][offset - start : offset - start + length]


def main() -> None:
    """Serve lines until the worker closes the control socket."""
    # Requests contain signatures and tokens. As with workers, no other process may read its memory.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt from the terminal is for the worker
    lent = context.descriptors
    lent.update(json.loads(sys.argv[1]))
    for descriptor in lent.values():
        os.set_inheritable(descriptor, False)
    os.nice(NICER)
    control = socket.socket(fileno=lent["control"])
    memory = _Memory(lent["arena"])
    with contextlib.suppress(OSError):  # the worker has ended already
        control.send(b"ready")
    while True:
        try:
            message, descriptors, _, _ = socket.recv_fds(control, 16, 1)
        except OSError:  # the worker was killed
            message = b""
        if not message:
            os._exit(0)  # threads may be waiting in the kernel
        line = socket.socket(fileno=descriptors[0])
        threading.Thread(target=_serve, args=[line, memory], daemon=True).start()


def _serve(line: socket.socket, memory: _Memory) -> None:
    context.serve(line)
    with line, contextlib.suppress(OSError):  # the worker was killed
        while message := line.recv(MOST_BYTES):
            if not message.startswith(b"["):
                continue  # a word to the call before (`Nudge`)
            name, arguments, places = json.loads(message)
            answer = _answer(name, arguments, memory, places)
            try:
                line.send(json.dumps(answer).encode())
            except OSError:
                return  # the worker has ended


def _answer(
    name: str, arguments: list[Any], memory: _Memory, places: list[tuple[int, int]]
) -> dict[str, Any]:
    try:
        parts = [memory.part(offset, length) for offset, length in places]
        return {"value": _function(name)(*arguments, *parts)}
    except OSError as error:
        return told_of(error)
    except Exception:
        return {"fault": traceback.format_exc(limit=-5)[-4000:]}


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


if __name__ == "__main__":
    main()
