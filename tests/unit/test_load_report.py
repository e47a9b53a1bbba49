"""The arithmetic of the report of a load: what counts once, and how long reading took."""

from __future__ import annotations

from typing import Any

import pytest

from lazyfs.observe.events import Activity, Cause, Event, EventKind, Purpose
from lazyfs.observe.html_report import figures
from lazyfs.observe.load import Load, Recording
from lazyfs.observe.verdict import Verdict, judge

OPENED, CLOSED, READ = EventKind.OPENED, EventKind.CLOSED, EventKind.READ
FETCHED, LOADED, PUSHED = EventKind.FETCHED, EventKind.LOADED, EventKind.PUSHED
MIB = 1 << 20


def event(
    at_s: float, kind: EventKind, block: int = 0, *, detail: int = 0, size: int = 0,
    seconds: float = 0.0,
) -> Event:  # fmt: skip
    return Event(at_s, kind, detail, 0, block, size, seconds)


def block(at_s: float, kind: EventKind, number: int, *, demand: bool = False) -> Event:
    purpose = Purpose.DEMAND if demand else Purpose.AHEAD
    return event(at_s, kind, number, detail=purpose, size=MIB, seconds=0.1)


def load(*events: Event, now_s: float = 100.0, **about: Any) -> Load:
    options = {
        "prefetch": "model", "page_cache": "auto", "cache_dir": "/c", "bandwidth_limit": "none",
        "memory_limit": 256 * MIB, "max_concurrency": 64, "requests_limit": 8,
    } | about.pop("options", {})  # fmt: skip
    described = {"source": "s3://b/m", "mountpoint": "/mnt", "version": "0", **about}
    return Load.of(Recording(described | {"options": options}, (("f", 8 * MIB),), events, now_s, 0))


def figure(of: Load, name: str) -> str:
    return dict(figures(of))[name]


def facts(of: Load) -> str:
    return " ".join(judge(of).facts)


def test_a_block_that_came_or_was_pushed_twice_is_one_block() -> None:
    told = load(
        block(1, FETCHED, 0), event(1.1, PUSHED, 0), block(2, FETCHED, 1), event(3, OPENED),
        block(4, LOADED, 0, demand=True), event(4.1, PUSHED, 0), event(4.2, READ, 0),
        block(5, LOADED, 0), event(5.1, READ, 0), event(6, CLOSED),
    )  # fmt: skip
    assert figure(told, "blocks") == "2"
    assert figure(told, "blocks put into the page cache") == "1"
    assert figure(told, "blocks read through the daemon") == "1"
    assert "1MiB were read from disk more than once" in facts(told)
    assert "fetched more than once" not in facts(told)


def test_what_was_here_before_the_first_open_is_a_share_of_what_came_not_of_how_often() -> None:
    told = load(
        block(1, FETCHED, 0), block(2, FETCHED, 1), event(3, OPENED),
        *(block(4 + turn, LOADED, number) for turn in range(5) for number in (0, 1)),
        event(20, CLOSED),
    )  # fmt: skip
    assert "2MiB (100% of what came) were here before the first file was opened" in facts(told)
    again = load(
        block(1, FETCHED, 0), block(2, LOADED, 0), event(3, OPENED), block(4, FETCHED, 1),
        event(5, CLOSED),
    )  # fmt: skip
    assert "1MiB (50% of what came) were here before the first file was opened" in facts(again)


def test_reading_takes_as_long_as_files_are_open() -> None:
    told = load(
        event(10, OPENED), event(10.5, OPENED), event(11, CLOSED), event(12, CLOSED),
        event(50, OPENED), event(51, CLOSED),
    )  # fmt: skip
    assert told.duration_s == pytest.approx(3)
    assert (told.start_s, told.end_s, told.is_over) == (10, 51, True)


def test_what_comes_after_the_last_close_does_not_prolong_a_load() -> None:
    told = load(event(1, OPENED), event(2.2, CLOSED), block(3.9, FETCHED, 0), event(4, PUSHED))
    assert told.duration_s == pytest.approx(1.2)
    assert figure(told, "reading took") == "1.2s"


def test_a_load_that_goes_on_lasts_until_now() -> None:
    told = load(event(1, OPENED), event(2, OPENED), event(3, CLOSED), now_s=9)
    assert told.duration_s == pytest.approx(8) and not told.is_over


def test_reads_of_files_that_a_former_worker_opened_count_as_long_as_they_waited() -> None:
    waited = event(5, EventKind.WAITED, detail=Cause.NETWORK, seconds=2)
    told = load(waited, event(7, CLOSED))
    assert told.duration_s == pytest.approx(2)
    assert judge(told).limit == "network"


def test_waits_within_an_open_file_count_once() -> None:
    waits = (event(at, EventKind.WAITED, detail=Cause.DISK, seconds=2) for at in (3, 4))
    told = load(event(1, OPENED), *waits, event(5, CLOSED))
    assert told.duration_s == pytest.approx(4)
    assert told.stalled_s == {Cause.DISK: 3}


def judged(continued: bool | None, page_cache: str = "auto") -> Verdict:
    return judge(load(
        event(1, OPENED, detail=1), event(3, EventKind.WAITED, detail=Cause.DISK, seconds=2),
        event(4, CLOSED), direct_reads_use_page_cache=continued,
        options={"page_cache": page_cache},
    ))  # fmt: skip


def test_direct_reads_that_bypass_the_page_cache_are_the_cause_and_not_the_disk() -> None:
    verdict = judged(False)
    assert verdict.limit == "direct" and "O_DIRECT" in verdict.headline
    assert "LOADERS.md" in verdict.advice
    assert judged(False, "off").advice == "Mount without --page-cache=off."


@pytest.mark.parametrize("continued", [True, None])
def test_direct_reads_that_use_the_page_cache_are_no_cause(continued: bool | None) -> None:
    verdict = judged(continued)
    assert verdict.limit == "disk"
    assert any("opened with O_DIRECT" in fact for fact in verdict.facts)


def test_what_came_on_demand_is_judged_by_its_first_arrival() -> None:
    told = load(
        event(1, OPENED), block(2, FETCHED, 0, demand=True), block(3, FETCHED, 1),
        block(4, LOADED, 1, demand=True), event(5, CLOSED),
    )  # fmt: skip
    assert "50% came only when a reader waited for them" in facts(told)


def waited_for_s3(**about: Any) -> Verdict:
    return judge(load(
        event(1, OPENED), event(4, EventKind.WAITED, detail=Cause.NETWORK, seconds=3),
        event(5, CLOSED), **about,
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("processors", "processor_s", "movers", "limit"),
    [(2, 3.9, 0, "processor"), (2, 2.0, 0, "network"), (16, 4.0, 0, "processor"),
     (16, 4.0, 8, "network"), (4, 8.0, 2, "processor")],
)  # fmt: skip
def test_a_worker_that_uses_all_processors_that_it_can_is_the_limit(
    processors: int, processor_s: float, movers: int, limit: str
) -> None:
    verdict = waited_for_s3(
        processors=processors, processor_s=processor_s, options={"movers": movers}
    )
    assert verdict.limit == limit
    used = f"The worker used {processor_s / 4:.1f} of {processors} processors while files were open"
    assert any(used in fact for fact in verdict.facts)
    if limit == "processor":
        assert ("--movers" in verdict.advice) == (processors >= 4)


def test_movers_count_as_processors_that_a_load_used() -> None:
    verdict = waited_for_s3(processors=16, processor_s=2.0, movers_s=30.8, options={"movers": 8})
    assert verdict.limit == "processor"
    used = "The worker used 0.5 and its movers 7.7 of 16 processors while files were open."
    assert used in verdict.facts
    verdict = waited_for_s3(processors=16, processor_s=2.0, movers_s=20.0, options={"movers": 8})
    assert verdict.limit == "network"


def test_a_worker_of_a_version_that_did_not_tell_its_processor_time() -> None:
    assert waited_for_s3().limit == "network"


def test_reads_beyond_the_prefetcher_while_memory_is_full_ask_for_memory() -> None:
    ordered = event(4, EventKind.WAITED, detail=Cause.ORDER, seconds=3)
    full = event(0.5, EventKind.PREFETCH, detail=Activity.NO_ROOM)
    assert (
        "--memory-limit (256MiB)"
        in judge(load(full, event(1, OPENED), ordered, event(5, CLOSED))).advice
    )
    assert "--prefetch" in judge(load(event(1, OPENED), ordered, event(5, CLOSED))).advice


def test_the_average_rate_leaves_pauses_out() -> None:
    told = load(event(1, OPENED), block(1.1, FETCHED, 0), block(50.1, FETCHED, 1))
    assert figure(told, "average rate") == "10MiB/s over 200ms"


def test_the_best_rate_of_a_short_load_is_its_average_whenever_it_is_read() -> None:
    told = load(block(0.2, FETCHED, 0), block(0.3, FETCHED, 1), event(9, OPENED), event(10, CLOSED))
    assert told.best_rate() == pytest.approx(2 * MIB / 0.2)


def test_the_best_rate_is_not_below_the_average() -> None:
    told = load(*(block(1 + 0.1 * number, FETCHED, number) for number in range(40)))
    assert told.best_rate() == pytest.approx(10 * MIB, rel=0.02)
