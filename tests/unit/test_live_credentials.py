"""Credentials that are renewed, refused, and cannot be had for a while."""

from __future__ import annotations

import logging
import time

import pytest

from lazyfs.errors import AccessDeniedError, CredentialsExpiredError, SourceError
from lazyfs.store import live_credentials
from lazyfs.store.live_credentials import LiveCredentials
from lazyfs.store.resolved_source import TimedCredentials
from lazyfs.store.signing import SigningCredentials

A, B, C, D = (SigningCredentials(f"id-{name}", "s") for name in "abcd")


class Giver:
    """Whoever gives credentials."""

    def __init__(self, now: SigningCredentials | SourceError) -> None:
        self.now = now
        self.asked: list[bool] = []
        self.lasts_s: float | None = None

    def __call__(self, anew: bool) -> TimedCredentials:
        self.asked.append(anew)
        if isinstance(self.now, SourceError):
            raise self.now
        return TimedCredentials(self.now, self.lasts_s and time.time() + self.lasts_s)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(live_credentials.time, "monotonic", lambda: now[0])
    return now


def test_credentials_are_used_until_they_expire() -> None:
    giver = Giver(B)
    live = LiveCredentials(giver, TimedCredentials(A, None))
    assert live.current() == live.current() == A
    live = LiveCredentials(giver, TimedCredentials(A, time.time() + 100))
    assert live.current() == A
    assert not giver.asked
    live = LiveCredentials(giver, TimedCredentials(A, time.time() - 1))
    assert live.current() == live.current() == B
    assert giver.asked == [False]


def test_each_renewal_is_noticed(clock: list[float]) -> None:
    giver = Giver(A)
    live = LiveCredentials(giver, TimedCredentials(A, None))
    former = A
    for new in (B, C, D):
        giver.now = new
        live.refused(former)
        clock[0] += 3600
        assert live.current() == new
        former = new
    assert giver.asked == [True] * 3


def test_refused_credentials_are_renewed_once_at_a_time(clock: list[float]) -> None:
    giver = Giver(A)
    live = LiveCredentials(giver, TimedCredentials(A, None))
    for _ in range(50):
        live.refused(A)
        assert live.current() == A  # there are no others: S3 is asked with them again
    assert len(giver.asked) == 1
    clock[0] += live_credentials.PAUSE_S
    assert live.current() == A
    assert len(giver.asked) == 2


def test_a_failed_renewal_is_harmless_while_the_old_credentials_are_valid(
    clock: list[float],
) -> None:
    giver = Giver(AccessDeniedError("the agent is starting"))
    live = LiveCredentials(giver, TimedCredentials(A, time.time() - 1))
    for _ in range(3):
        assert live.current() == A
        clock[0] += 10
    giver.now = B
    assert live.current() == B


def test_a_failed_renewal_is_reported_when_the_old_credentials_are_refused(
    clock: list[float],
) -> None:
    giver = Giver(AccessDeniedError("the agent is starting"))
    live = LiveCredentials(giver, TimedCredentials(A, None))
    for _ in range(2):
        for _ in range(3):
            live.refused(A)
            with pytest.raises(CredentialsExpiredError, match="agent is starting"):
                live.current()
            clock[0] += 10
        giver.now = B
        assert live.current() == B
        giver.now = AccessDeniedError("the agent is starting")
        live.replace(TimedCredentials(A))


def test_before_there_were_any_an_error_is_what_it_is(clock: list[float]) -> None:
    giver = Giver(AccessDeniedError("none"))
    live = LiveCredentials(giver, None)
    with pytest.raises(AccessDeniedError):
        live.current()
    live = LiveCredentials(giver, None, had=True)
    with pytest.raises(CredentialsExpiredError):
        live.current()
    clock[0] += 10
    giver.now = A
    assert live.current() == A


def test_a_signature_is_doubted_before_it_is_believed(clock: list[float]) -> None:
    live = LiveCredentials(Giver(A), TimedCredentials(A, None))
    live.refused(A)
    assert not live.may_be_replaced(A), "it never was good"
    live.worked(A)
    clock[0] += 100
    live.refused(A)
    assert live.may_be_replaced(A)
    clock[0] += live_credentials.SIGNATURE_GRACE_S
    live.refused(A)
    assert not live.may_be_replaced(A)
    live.replace(TimedCredentials(B))
    assert live.may_be_replaced(A), "there are others by now"


def test_without_waiting_only_good_credentials_are_given() -> None:
    giver = Giver(B)
    live = LiveCredentials(giver, None)
    assert (live.present(), live.timed()) == (None, None)
    for until_s, present in ((None, A), (time.time() + 100, A), (time.time() - 1, None)):
        held = TimedCredentials(A, until_s)
        live.replace(held)
        assert (live.present(), live.timed()) == (present, held)
    live.replace(TimedCredentials(A))
    live.refused(A)
    assert live.present() is None
    live.worked(B)
    assert live.present() is None, "others worked"
    live.worked(A)
    assert live.present() == A
    assert not giver.asked


def test_others_can_be_fetched_at_once_after_a_replacement() -> None:
    giver = Giver(AccessDeniedError("none"))
    live = LiveCredentials(giver, None)
    with pytest.raises(AccessDeniedError):
        live.current()
    giver.now = B
    with pytest.raises(AccessDeniedError):
        live.current()
    live.replace(None)
    assert live.current() == B
    assert giver.asked == [False, False]


def test_the_begin_and_the_end_of_a_failure_are_logged_once(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    giver = Giver(AccessDeniedError("the agent is starting"))
    live = LiveCredentials(giver, TimedCredentials(A, time.time() - 1))
    for _ in range(3):
        live.current()
        clock[0] += 10
    giver.now, giver.lasts_s = B, -1.0
    for _ in range(3):
        live.current()
        clock[0] += 10
        assert [record.getMessage() for record in caplog.records] == [
            "credentials cannot be renewed: the agent is starting", "credentials were renewed",
        ]  # fmt: skip


def test_no_secret_is_shown() -> None:
    secret = SigningCredentials("the-id", "the-secret", "the-token")
    for each in (secret, TimedCredentials(secret), [secret]):
        assert not [word for word in secret if str(word) in f"{each!r}{each!s}"]
