"""Waiting for SIGTERM and SIGINT."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

# The signal goes to a thread that is not the main one, which waits.
TO_ANOTHER_THREAD = """
import signal, sys, threading, time
from lazyfs.end_signals import end_signals

def send():
    time.sleep(0.2)
    signal.pthread_kill(threading.get_ident(), signal.{name})
    time.sleep(60)

with end_signals() as signals:
    if {early}:
        signal.raise_signal(signal.{name})
    else:
        threading.Thread(target=send, daemon=True).start()
    print(signals.wait().name, flush=True)
    threading.Thread(target=signals.wake, daemon=True).start()
    print(signals.wait(), flush=True)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("early", [False, True])
def test_a_signal_ends_the_wait_whichever_thread_gets_it(name: str, early: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TO_ANOTHER_THREAD.format(name=name, early=early)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [name, "None"]


def test_former_handlers_are_restored() -> None:
    from lazyfs.end_signals import end_signals

    before = signal.getsignal(signal.SIGTERM)
    with end_signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
