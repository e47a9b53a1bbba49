"""What limited a load, in words, and which option would change it. Pure.

The rule is the reader's: what he waited for longest was the limit. If he hardly waited, he was the
limit himself, because his bytes were there before he asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lazyfs.observe.events import Activity, Cause, Purpose
from lazyfs.observe.load import Load
from lazyfs.observe.recorder import Tier
from lazyfs.options.option_types import format_duration, format_size

# A reader who waits for less of the time than this is the limit himself.
HARDLY = 0.1
# As good as a limit on the rate.
NEARLY = 0.8


@dataclass(frozen=True, slots=True)
class Verdict:
    """What limited a load.

    Attributes:
        limit: in a word: `reader`, `bandwidth-limit`, the label of a cause, or `nothing`.
        headline: the limit in a sentence.
        advice: what would change it.
        facts: what else is worth knowing, a sentence each.
    """

    limit: str
    headline: str
    advice: str
    facts: tuple[str, ...] = ()


def judge(load: Load) -> Verdict:
    """The verdict on a load."""
    if load.start_s is None:
        here = sum(life.size for life in load.lives)
        return Verdict(
            "nothing",
            f"Nothing was read yet; {format_size(here)} came ahead of readers.",
            "Ask again when something has been loaded.",
        )
    stalled_s = sum(load.stalled_s.values())
    if not load.stalled_s or stalled_s < HARDLY * load.duration_s:
        return Verdict(
            "reader",
            f"The reader was the limit: it waited {format_duration(stalled_s)} of "
            f"{format_duration(load.duration_s)}; otherwise its bytes were there before it asked.",
            "No option of lazyfs makes this load faster; more threads in the loader might.",
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
    if isinstance(limit, int) and best >= NEARLY * limit:
        return (
            "bandwidth-limit",
            f"--bandwidth-limit allows {format_size(limit)}/s, and that was reached.",
            "Raise --bandwidth-limit, or take it away.",
        )
    why = f"bytes were on their way from S3; the best rate over a second was {format_size(best)}/s."
    if options["requests_limit"] >= options["max_concurrency"]:
        return (
            "network",
            f"{why} All {options['max_concurrency']} requests that --max-concurrency allows were "
            "in use.",
            "Raise --max-concurrency if the link carries more than that rate.",
        )
    return (
        "network",
        why,
        "If the link carries more, the endpoint is the limit. Mount earlier, so that more is here "
        "when reading begins, or fill the cache beforehand; then the next load takes it from disk.",
    )


def _throttled(load: Load) -> Explained:
    return (
        "throttled",
        f"S3 asked for fewer requests ({load.retries[Cause.THROTTLED]} times).",
        "Spread the load: fewer mounts at once, or a higher request rate agreed with the provider. "
        "A lower --max-concurrency avoids the refusals, not the limit.",
    )


def _errors(load: Load) -> Explained:
    return (
        "errors",
        f"S3 gave no usable answer ({load.retries[Cause.ERRORS]} times) and was asked again.",
        "The log and `lazyfs status` name the error; `lazyfs doctor SOURCE` tries the endpoint.",
    )


def _credentials(load: Load) -> Explained:
    return (
        "credentials",
        "the credentials had run out and fresh ones were awaited.",
        "See how they are renewed; `lazyfs doctor SOURCE` tries them.",
    )


def _disk(load: Load) -> Explained:
    return (
        "disk",
        f"blocks were read from the cache directory; the best rate was "
        f"{format_size(load.best_rate())}/s.",
        "Put --cache-dir on a faster disk, or on several (joined by colons).",
    )


def _memory(load: Load) -> Explained:
    no_disk = load.recording.about["options"]["cache_dir"] == "none"
    return (
        "memory",
        f"--memory-limit ({format_size(load.recording.about['options']['memory_limit'])}) had no "
        "room for more blocks at once, or let blocks go before they were read.",
        "Raise --memory-limit"
        + (", or give the mount a --cache-dir to put blocks on." if no_disk else "."),
    )


def _order(load: Load) -> Explained:
    return (
        "order",
        "they read blocks that fetching ahead had not come to: they read in another order than "
        "the model's index says.",
        "Try --prefetch sequential, or load the shards in the order of the index.",
    )


def _no_prefetch(load: Load) -> Explained:
    policy = load.recording.about["options"]["prefetch"]
    if policy in ("model", "tensor"):
        return (
            "no_prefetch",
            "they read what is not fetched ahead: files that are no part of the model, or a second "
            "time what had left the page cache.",
            "Give the mount a --cache-dir that holds the model, or memory for the page cache.",
        )
    return (
        "no_prefetch",
        f"nothing was fetched ahead of them (--prefetch {policy}).",
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
    """What else is worth knowing."""
    assert load.start_s is not None
    before = sum(life.size for life in load.lives if life.landed_s <= load.start_s)
    total = sum(life.size for life in load.lives)
    facts = [
        f"{format_size(load.bytes_from(Tier.S3))} came from S3 and "
        f"{format_size(load.bytes_from(Tier.DISK))} from disk."
    ]
    if before:
        facts.append(
            f"{format_size(before)} ({before / total:.0%}) were here before the first file was "
            f"opened, {format_duration(load.start_s)} after the mount."
        )
    demanded = sum(life.size for life in load.lives if life.purpose is Purpose.DEMAND)
    if total and demanded / total > 0.05:
        facts.append(f"{demanded / total:.0%} came only when a reader waited for it.")
    no_room_s = load.blocked_s.get(Activity.NO_ROOM, 0.0)
    if no_room_s > HARDLY * load.duration_s:
        facts.append(
            f"Fetching ahead waited {format_duration(no_room_s)} for room in memory, which is as "
            "it should be if the reader is slower than the network."
        )
    if load.again_bytes:
        facts.append(f"{format_size(load.again_bytes)} were fetched more than once.")
    facts += [
        f"S3 was asked again {count} times ({cause.label})."
        for cause, count in load.retries.items()
    ]
    if load.recording.lost:
        facts.append(f"The {load.recording.lost} oldest events are no longer kept.")
    if not load.is_over:
        facts.append("Files are still open: this load goes on.")
    return tuple(facts)
