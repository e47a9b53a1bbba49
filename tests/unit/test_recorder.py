"""What a recorder makes of what it is told; the clock is the test's."""

from __future__ import annotations

import pytest

from lazyfs.blocks import BlockId, Span
from lazyfs.errors import ThrottledError, UnavailableError
from lazyfs.listed_object import File
from lazyfs.observe import recorder as recorder_module
from lazyfs.observe.events import Activity, Cause, EventKind, EventRing, Purpose, unpack
from lazyfs.observe.histogram import Histogram
from lazyfs.observe.recorder import Recorder, Tier
from lazyfs.options.mount_options import PLANNED, POLICIES

FILE = File(5, 1, "f", "m/f", 100, "e", 0)
SPAN = Span(3, 0, 10)


class Clock:
    """Stands still until it is told otherwise."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_ring_keeps_the_latest() -> None:
    ring = EventRing(capacity=4)
    for number in range(7):
        ring.add(number / 2, EventKind.READ, 1, file=2, block=number, size=1 << 40, seconds=0.5)
    kept = unpack(ring.dump())
    assert [event.block for event in kept] == [3, 4, 5, 6]
    assert list(ring.newest_first()) == kept[::-1]
    assert kept[0] == (1.5, EventKind.READ, 1, 2, 3, 1 << 40, 0.5)


def test_a_ring_that_is_not_full() -> None:
    ring = EventRing(capacity=4)
    assert unpack(ring.dump()) == list(ring.newest_first()) == []
    ring.add(1.0, EventKind.PLANNED)
    assert len(unpack(ring.dump())) == 1


def test_a_histogram_counts_what_is_at_most_a_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for seconds in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(seconds)
    assert histogram.cumulative() == [2, 3, 4]
    assert (histogram.count, histogram.sum_s) == (4, 12.0)


def test_seconds_of_waits_at_the_same_time_count_once(clock: Clock) -> None:
    recorder = Recorder(now_s=clock)
    first = recorder.begin_wait(FILE, SPAN, coming=True)
    clock.now_s += 2
    second = recorder.begin_wait(FILE, SPAN, coming=True)
    clock.now_s += 1
    recorder.end_wait(first, Tier.S3)
    clock.now_s += 4
    recorder.end_wait(second, Tier.S3)
    assert recorder.stalled_s == {Cause.NETWORK: 7.0}
    assert not recorder.waits


@pytest.mark.parametrize(
    ("activity", "coming", "tier", "cause"),
    [
        (Activity.FETCHING, True, Tier.S3, Cause.NETWORK),
        (Activity.NO_ROOM, True, Tier.S3, Cause.MEMORY),
        (Activity.FETCHING, True, Tier.DISK, Cause.DISK),
        (Activity.FETCHING, False, Tier.S3, Cause.ORDER),
        (Activity.NO_ROOM, False, Tier.S3, Cause.ORDER),
        (Activity.DONE, False, Tier.S3, Cause.NO_PREFETCH),
    ],
)
def test_causes_of_waits(
    clock: Clock, activity: Activity, coming: bool, tier: Tier, cause: Cause
) -> None:
    recorder = Recorder(now_s=clock)
    recorder.planned(100)
    recorder.prefetch_is(activity)
    wait = recorder.begin_wait(FILE, SPAN, coming=coming)
    clock.now_s += 1
    recorder.end_wait(wait, tier)
    assert recorder.stalled_s == {cause: 1.0}
    (event,) = [e for e in recorder.events.newest_first() if e.kind == EventKind.WAITED]
    assert (event.detail, event.block, event.seconds) == (cause, 3, 1.0)


def test_trouble_of_a_block_and_throttling_of_all(clock: Clock) -> None:
    recorder = Recorder(now_s=clock)
    troubled, other = (recorder.begin_wait(FILE, Span(n, 0, 1), coming=True) for n in (3, 4))
    recorder.block_retried(FILE, 3, UnavailableError("500"))
    recorder.block_retried(FILE, 9, ThrottledError("503"))
    clock.now_s += 1
    recorder.end_wait(troubled, Tier.S3)
    clock.now_s += 1
    recorder.end_wait(other, Tier.S3)
    assert recorder.stalled_s == {Cause.ERRORS: 1.0, Cause.THROTTLED: 1.0}
    assert recorder.last_error == "503"


@pytest.mark.parametrize("policy", sorted({*POLICIES} - PLANNED))
def test_without_prefetch_that_is_the_cause(clock: Clock, policy: str) -> None:
    recorder = Recorder(policy, now_s=clock)
    recorder.prefetch_is(Activity.DONE)
    wait = recorder.begin_wait(FILE, SPAN, coming=False)
    clock.now_s += 1
    recorder.end_wait(wait, Tier.S3)
    assert recorder.stalled_s == {Cause.NO_PREFETCH: 1.0}


def test_the_rate_is_of_the_last_seconds(clock: Clock) -> None:
    recorder = Recorder(now_s=clock)
    block = BlockId(5, 0)
    clock.now_s += 100
    recorder.landed(FILE, block, 1000, Tier.S3, Purpose.AHEAD, clock.now_s - 1)
    clock.now_s += 2
    recorder.landed(FILE, block, 500, Tier.DISK, Purpose.AHEAD, clock.now_s - 1)
    assert recorder.rate() == pytest.approx(1500 / 5)
    clock.now_s += 4
    assert recorder.rate() == pytest.approx(500 / 5)
    clock.now_s += 60
    assert recorder.rate() == 0


def test_a_block_counts_as_read_once_an_open(clock: Clock) -> None:
    recorder = Recorder(now_s=clock)
    for _ in range(2):
        recorder.opened(FILE, 77)
        for _ in range(3):
            recorder.read(FILE, SPAN, Tier.MEMORY, clock.now_s)
    kinds = [event.kind for event in recorder.events.newest_first()]
    assert kinds == [EventKind.READ, EventKind.OPENED] * 2
    assert recorder.reads[Tier.MEMORY].count == 6
    assert recorder.openers(FILE) == [77]


def test_processor_time_counts_while_files_are_open(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"worker": 10.0, "movers": 5.0}
    monkeypatch.setattr(recorder_module.time, "process_time", lambda: now["worker"])
    recorder = Recorder()
    recorder.movers_s = lambda: now["movers"]
    now |= {"worker": 11.0, "movers": 6.0}
    assert recorder.processor_s == (0.0, 0.0)
    recorder.opened(FILE, 77)
    now |= {"worker": 13.0, "movers": 9.0}
    recorder.opened(FILE, 78)
    assert recorder.processor_s == (2.0, 3.0)
    recorder.closed(FILE)
    now |= {"worker": 14.0, "movers": 13.0}
    recorder.closed(FILE)
    now |= {"worker": 90.0, "movers": 90.0}
    assert recorder.processor_s == (3.0, 7.0)
    recorder.opened(FILE, 79)
    now |= {"worker": 91.0, "movers": 92.0}
    assert recorder.processor_s == (4.0, 9.0)
