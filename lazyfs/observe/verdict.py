"""What limited a load, and which option would change that. Pure.

The rule takes the reader's point of view: the limit is what readers waited for longest. If readers
hardly waited, the reader was the limit, because its bytes were there before it asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lazyfs.observe.events import Activity, Cause, Purpose
from lazyfs.observe.load import Load
from lazyfs.observe.recorder import Tier
from lazyfs.options.option_types import format_duration, format_size

# If readers waited for less than this share of the load, the reader was the limit.
READER_LIMIT_SHARE = 0.1
# If the worker uses this share of all processors, its reader needs the others. Without movers it
# uses hardly more than one, of however many.
BUSY_SHARE, ONE_BUSY, LEAST_FOR_MOVERS = 0.5, 0.9, 4
# A best rate above this share of --bandwidth-limit counts as having reached it.
BANDWIDTH_LIMIT_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Verdict:
    """What limited a load.

    Attributes:
        limit: in one word: `reader`, `bandwidth-limit`, `direct`, `processor`, `nothing`, or the
            label of a cause.
        headline: the limit in one sentence.
        advice: what would change it.
        facts: other findings, one sentence each.
    """

    limit: str
    headline: str
    advice: str
    facts: tuple[str, ...] = ()


def judge(load: Load) -> Verdict:
    """Find out what limited a load."""
    if load.start_s is None:
        here = sum(life.size for life in load.lives)
        return Verdict(
            "nothing",
            f"Nothing has been read yet; {format_size(here)} were prefetched.",
            "Run the report again after a load.",
        )
    stalled_s = sum(load.stalled_s.values())
    if not load.stalled_s or stalled_s < READER_LIMIT_SHARE * load.duration_s:
        return Verdict(
            "reader",
            f"The reader was the limit: it waited {format_duration(stalled_s)} of "
            f"{format_duration(load.duration_s)}. Otherwise its bytes were there before it asked.",
            "No option of lazyfs makes this load faster. More threads in the loader might.",
            _facts(load),
        )
    cause = max(load.stalled_s, key=lambda cause: load.stalled_s[cause])
    waited = (
        f"Readers waited {format_duration(stalled_s)} of {format_duration(load.duration_s)}, "
        f"{load.stalled_s[cause] / stalled_s:.0%} of that because "
    )
    limit, why, advice = _EXPLAINED[cause](load)
    return Verdict(limit, waited + why, advice, _facts(load))


Explained = tuple[str, str, str]


def _network(load: Load) -> Explained:
    options = load.recording.about["options"]
    limit, best = options["bandwidth_limit"], load.best_rate()
    worker, movers, processors = _busy_processors(load)
    if isinstance(limit, int) and best >= BANDWIDTH_LIMIT_SHARE * limit:
        return (
            "bandwidth-limit",
            f"--bandwidth-limit allows {format_size(limit)}/s, and the load reached that.",
            "Raise --bandwidth-limit, or remove it.",
        )
    why = f"blocks were in flight from S3; the best rate over a second was {format_size(best)}/s."
    is_full = worker + movers >= BUSY_SHARE * processors
    if is_full or (worker >= ONE_BUSY and not options.get("movers")):
        return (
            "processor",
            f"{why} {_used(worker, movers, processors)} for them.",
            "Give the mount more processors"
            + (", and --movers." if processors >= LEAST_FOR_MOVERS else "."),
        )
    if options["requests_limit"] >= options["max_concurrency"]:
        return (
            "network",
            f"{why} All {options['max_concurrency']} requests that --max-concurrency allows were "
            "in use.",
            "Raise --max-concurrency if the link can carry more than that rate.",
        )
    return (
        "network",
        why,
        "If the link can carry more, the endpoint is the limit. Mount earlier, so that more is "
        "prefetched before reading begins, or fill the cache with `lazyfs warm`, so that the next "
        "load reads from disk.",
    )


def _busy_processors(load: Load) -> tuple[float, float, int]:
    """How many processors worker and movers used while files were open, and of how many."""
    about = load.recording.about
    if load.duration_s <= 0:
        return 0.0, 0.0, about.get("processors", 1)
    # Workers of former versions do not tell all of it.
    worker_s, movers_s = about.get("processor_s", 0.0), about.get("movers_s", 0.0)
    return worker_s / load.duration_s, movers_s / load.duration_s, about.get("processors", 1)


def _used(worker: float, movers: float, processors: int) -> str:
    if movers:
        return (
            f"The worker used {worker:.1f} and its movers {movers:.1f} of {processors} processors"
        )
    return f"The worker used {worker:.1f} of {processors} processors"


def _throttled(load: Load) -> Explained:
    return (
        "throttled",
        f"S3 asked for fewer requests ({load.retries[Cause.THROTTLED]} times).",
        "Run fewer mounts at once, or ask the provider for a higher request rate. A lower "
        "--max-concurrency avoids the refusals, but not the limit.",
    )


def _errors(load: Load) -> Explained:
    return (
        "errors",
        f"S3 gave no usable answer ({load.retries[Cause.ERRORS]} times) and requests were retried.",
        "The log and `lazyfs status` show the error; `lazyfs doctor SOURCE` tests the endpoint.",
    )


def _credentials(load: Load) -> Explained:
    return (
        "credentials",
        "the credentials had expired and new ones were not there yet.",
        "Check how they are renewed; `lazyfs doctor SOURCE` tests them.",
    )


# What became of reads with O_DIRECT, by whether the kernel continues them in the page cache.
_DIRECT = {
    True: "Files were opened with O_DIRECT; their bytes came out of the page cache all the same.",
    False: "Files were opened with O_DIRECT, and their reads bypassed the page cache.",
    None: "Files were opened with O_DIRECT.",
}


def _disk(load: Load) -> Explained:
    about = load.recording.about
    if load.has_direct and about.get("direct_reads_use_page_cache") is False:
        page_cache = about["options"]["page_cache"]
        return (
            "direct",
            "they read with O_DIRECT, past the page cache, so that blocks were read from the cache "
            "directory again.",
            "Mount without --page-cache=off." if page_cache == "off"
            else "Have the loader read without O_DIRECT; docs/LOADERS.md names its options.",
        )  # fmt: skip
    return (
        "disk",
        f"blocks were read from the cache directory; the best rate was "
        f"{format_size(load.best_rate())}/s.",
        "Put --cache-dir on a faster disk, or on several disks (joined by colons).",
    )


def _memory(load: Load) -> Explained:
    no_disk = load.recording.about["options"]["cache_dir"] == "none"
    return (
        "memory",
        f"--memory-limit ({format_size(load.recording.about['options']['memory_limit'])}) had no "
        "room for more blocks at once, or blocks were evicted before they were read.",
        "Raise --memory-limit"
        + (", or give the mount a --cache-dir for its blocks." if no_disk else "."),
    )


def _order(load: Load) -> Explained:
    return (
        "order",
        "they read blocks that prefetching had not reached: they read in another order than "
        "the model's index says, or several files at once.",
        f"Raise --memory-limit ({format_size(load.recording.about['options']['memory_limit'])}): "
        "prefetching had no room to go further ahead."
        if load.activity_s.get(Activity.NO_ROOM, 0.0) > load.duration_s / 2
        else "Try --prefetch sequential, or load the shards in the order of the index.",
    )


def _no_prefetch(load: Load) -> Explained:
    policy = load.recording.about["options"]["prefetch"]
    if policy in ("model", "tensor"):
        return (
            "no_prefetch",
            "they read what is not prefetched: files that are not part of the model, or, for the "
            "second time, data that the page cache had dropped.",
            "Give the mount a --cache-dir that holds the model, or more memory for the page cache.",
        )
    return (
        "no_prefetch",
        f"nothing was prefetched for them (--prefetch {policy}).",
        "Use --prefetch model.",
    )


_EXPLAINED: dict[Cause, Callable[[Load], Explained]] = {
    Cause.NETWORK: _network,
    Cause.THROTTLED: _throttled,
    Cause.ERRORS: _errors,
    Cause.CREDENTIALS: _credentials,
    Cause.DISK: _disk,
    Cause.MEMORY: _memory,
    Cause.ORDER: _order,
    Cause.NO_PREFETCH: _no_prefetch,
}


def _facts(load: Load) -> tuple[str, ...]:
    """Other findings."""
    assert load.start_s is not None
    firsts = load.firsts
    before = sum(life.size for life in firsts if life.landed_s <= load.start_s)
    total = sum(life.size for life in firsts)
    shared = load.bytes_from(Tier.FLEET)
    facts = [
        f"{format_size(load.bytes_from(Tier.S3))} came from S3"
        + (f", {format_size(shared)} from the fleet's cache" if shared else "")
        + f" and {format_size(load.bytes_from(Tier.DISK))} from disk."
    ]
    if before:
        facts.append(
            f"{format_size(before)} ({before / total:.0%} of what came) were here before the first "
            f"file was opened, {format_duration(load.start_s)} after the mount."
        )
    demanded = sum(life.size for life in firsts if life.purpose is Purpose.DEMAND)
    if total and demanded / total > 0.05:
        facts.append(f"{demanded / total:.0%} came only when a reader waited for them.")
    if load.has_direct:
        facts.append(_DIRECT[load.recording.about.get("direct_reads_use_page_cache")])
    worker, movers, processors = _busy_processors(load)
    if worker:
        facts.append(f"{_used(worker, movers, processors)} while files were open.")
    no_room_s = load.activity_s.get(Activity.NO_ROOM, 0.0)
    if no_room_s > READER_LIMIT_SHARE * load.duration_s:
        facts.append(
            f"Prefetching waited {format_duration(no_room_s)} for room in memory. That is normal "
            "if the reader is slower than the network."
        )
    if load.refetched_bytes:
        facts.append(f"{format_size(load.refetched_bytes)} were fetched more than once.")
    if load.reloaded_bytes:
        facts.append(f"{format_size(load.reloaded_bytes)} were read from disk more than once.")
    facts += [
        f"Requests to S3 were retried {count} times ({cause.label})."
        for cause, count in load.retries.items()
    ]
    if load.recording.lost:
        facts.append(
            f"The {load.recording.lost} oldest events are missing; the recording was full."
        )
    if not load.is_over:
        facts.append("Files are still open: the load is not over.")
    return tuple(facts)
