"""Claims: one process fetches a block, and a dead one holds nothing."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lazyfs.cache import claims
from lazyfs.cache.claims import LOOK_S, Claims

CLAIM = """
import sys, time
from pathlib import Path
from lazyfs.cache.claims import Claims
claims = Claims(Path(sys.argv[1]))
assert claims.claim("a")
claims.set_waiting("b", True)
print("claimed", flush=True)
time.sleep(60)
"""


def test_a_claim_is_seen_by_others_and_ends_with_its_process(tmp_path: Path) -> None:
    ours = Claims(tmp_path)
    other = subprocess.Popen([sys.executable, "-c", CLAIM, tmp_path], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"claimed\n"
        assert ours.is_taken("a")
        assert not ours.claim("a")
        assert not ours.is_taken("b")
        assert others_wait(ours)
        other.send_signal(signal.SIGKILL)
        other.wait(timeout=10)
        assert not ours.is_taken("a")
        assert not others_wait(ours)
        assert ours.claim("a")
    finally:
        other.kill()
        other.wait(timeout=10)


def test_released_blocks_can_be_claimed_by_others(tmp_path: Path) -> None:
    ours, theirs = Claims(tmp_path), Claims(tmp_path)
    assert ours.claim("a")
    assert ours.claim("a")  # again, by the same process
    assert not theirs.claim("a")
    theirs.release("a")  # not theirs to give
    assert not theirs.claim("a")
    ours.release("a")
    assert theirs.claim("a")
    assert not others_wait(ours)
    ours.set_waiting("b", True)
    ours.set_waiting("c", True)
    assert others_wait(theirs)
    assert not others_wait(ours)
    ours.set_waiting("b", False)
    assert others_wait(theirs)
    ours.set_waiting("c", False)
    assert not others_wait(theirs)


def others_wait(claims: Claims) -> bool:
    """As it is known after a moment."""
    time.sleep(LOOK_S)
    return claims.others_wait()


def test_whether_others_wait_is_looked_at_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked for each block, and several times."""
    ours, theirs = Claims(tmp_path), Claims(tmp_path)
    now_s = 100.0
    monkeypatch.setattr(claims.time, "monotonic", lambda: now_s)
    assert not ours.others_wait()
    theirs.set_waiting("b", True)
    now_s += 0.9 * LOOK_S
    assert not ours.others_wait()
    now_s += 0.2 * LOOK_S
    assert ours.others_wait()
    theirs.set_waiting("b", False)
    assert ours.others_wait()
    now_s += 1.1 * LOOK_S
    assert not ours.others_wait()


def test_who_loads_a_content_is_seen_by_others(tmp_path: Path) -> None:
    ours, theirs = Claims(tmp_path), Claims(tmp_path)
    assert not ours.others_load("c")
    ours.set_loading("c")
    assert not ours.others_load("c")
    assert theirs.others_load("c")
    assert not theirs.others_load("d")


def test_who_may_store_blocks_of_a_content_is_seen_by_others(tmp_path: Path) -> None:
    ours, theirs = Claims(tmp_path), Claims(tmp_path)
    ours.bring("c")
    assert ours.is_alone("c")
    assert not theirs.is_alone("c")
    assert theirs.is_alone("d")
    assert not theirs.others_load("c"), "it need not load them"


def test_what_a_process_has_brought_does_not_slow_down_its_claims(tmp_path: Path) -> None:
    """With ten thousand locks that stay in a file, each further one takes a millisecond."""
    ours, theirs = Claims(tmp_path), Claims(tmp_path)
    assert ours.claim("c:1")
    assert theirs._is_locked(theirs._claims, 0, 0)
    ours.bring("c")
    ours.release("c:1")
    assert not theirs._is_locked(theirs._claims, 0, 0)


def test_on_a_filesystem_without_locks_each_process_fetches_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Claims(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(claims.fcntl, "fcntl", refuse)
    assert ours.claim("a")
    assert not ours.is_taken("a")
    assert not ours.others_wait()
    assert not ours.others_load("c")


def test_processes_of_earlier_versions_see_the_same_claims(tmp_path: Path) -> None:
    """Mounts go on while lazyfs is upgraded."""
    ours, theirs = Claims(tmp_path), Claims(tmp_path)
    ours.claim("c:1")
    ours.bring("c")
    ours.set_loading("c")
    ours.set_waiting("c:1", True)
    for file, place in (
        (theirs._claims, 2404234094649250543),
        (theirs._waiting, 2404234094649250543),
        (theirs._loading, 2474228946859560938),
        (theirs._loading, 489487129183309773),
    ):
        assert theirs._is_locked(file, place, 1)
        assert not theirs._is_locked(file, place - 1, 1)
        assert not theirs._is_locked(file, place + 1, 1)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["claims", "loading", "waiting"]


def test_without_locks_nobody_is_told_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Claims(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, "no such locks")

    monkeypatch.setattr(claims.fcntl, "fcntl", refuse)
    ours.bring("c")
    ours.set_waiting("b", True)
    ours.set_loading("c")
    ours.release("a")
    assert ours.is_alone("c")
    monkeypatch.undo()
    assert Claims(tmp_path).is_alone("c")
