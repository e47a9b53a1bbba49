"""`lazyfs status`: show what the mounts of this machine are doing."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
from rich.table import Table

from lazyfs.cli.messages import tell
from lazyfs.cli.mounts import Status, record_at, status_of
from lazyfs.cli.tables import console, print_rows
from lazyfs.errors import MountError
from lazyfs.options.option_types import format_duration, format_size
from lazyfs.process.mount_records import records


@click.command()
@click.argument("mountpoint", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def status(mountpoint: Path | None, as_json: bool) -> None:
    """Show what MOUNTPOINT is doing, or a table of all mounts of this user.

    \b
    Examples:
      lazyfs status
      lazyfs status /mnt/llama
      lazyfs status --json | jq '.[] | select(.trouble)'

    Exit code 1: nothing is mounted at MOUNTPOINT, or its daemon does not answer.
    """
    if mountpoint is None:
        found = [status_of(record) for record in records()]
        if as_json:
            tell(json.dumps(found, indent=1))
        elif found:
            console().print(mounts_table(found))
        else:
            tell("nothing is mounted by this user", err=True)
        return
    described = status_of(record_at(mountpoint))
    if as_json:
        tell(json.dumps(described, indent=1))
    else:
        print_rows(rows(described))
    if "error" in described:
        raise MountError(f"{described['mountpoint']}: {described['error']}")


def rows(status: Status) -> list[tuple[str, str]]:
    """The status of one mount as rows of a name and a text."""
    head = [
        ("mountpoint", status["mountpoint"]),
        ("source", status["source"]),
    ]
    if "error" in status:
        return [*head, ("state", state(status))]
    prefetch = status["prefetch"]
    near = prefetch["near_bytes"]
    return [
        *head,
        ("state", state(status)),
        ("version", f"{status['version']}, worker {status['pid']}"),
        ("mounted", f"{format_duration(status['mounted_for_s'])} ago{_restarts(status)}"),
        *_changed(status),
        *_compared(status),
        ("files", f"{status['files']}, {format_size(status['size_bytes'])}"),
        ("model", share(prefetch["there_bytes"], prefetch["wanted_bytes"]) + " on this machine"),
        ("loaded", share(near, prefetch["wanted_bytes"]) + " in the page cache or read"),
        *_passed_over(prefetch["passed_over_bytes"]),
        (
            "rate",
            f"{format_size(status['rate_bytes_per_s'])}/s, {status['requests_in_flight']} of "
            f"{status['requests_limit']} requests in flight",
        ),
        (
            "fetched",
            f"{format_size(status['fetched_bytes'])} from S3 in {status['fetched_blocks']} blocks, "
            f"{format_size(status['from_disk_bytes'])} from disk",
        ),
        *_fleet(status),
        (
            "cached",
            f"{format_size(status['to_disk_bytes'])} written to disk, "
            f"{format_size(status['pushed_bytes'])} put into the page cache"
            + (f", {status['shed_blocks']} blocks not written" if status["shed_blocks"] else "")
            + _hangs(status),
        ),
        ("reads", _reads(status)),
        (
            "memory",
            f"{format_size(status['memory_bytes'])} of "
            f"{format_size(status['memory_limit_bytes'])} in blocks, "
            f"{format_size(status['resident_bytes'])} resident",
        ),
        ("waited", _waited(status)),
        ("retries", _retries(status)),
        ("last error", status["last_error"] or "none"),
        *_waiting(status),
    ]


def _hangs(status: Status) -> str:
    # Of a worker of an older version this is not known.
    hanging = " and ".join(status.get("hanging_disks", []))
    return f"; the disk of {hanging} does not answer, S3 does instead" if hanging else ""


def _fleet(status: Status) -> list[tuple[str, str]]:
    fleet = status.get("fleet")  # of a worker of an older version there is none
    if fleet is None:
        return []
    failed = {name: count for name, count in fleet["requests"].items() if name != "served"}
    text = (
        f"{format_size(status['from_fleet_bytes'])} from {fleet['url']} in "
        f"{status['from_fleet_blocks']} blocks"
    )
    if fleet["trouble"]:
        text += f"; resting: {fleet['trouble']}"
    if failed:
        counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in failed.items())
        text += f" (requests that S3 answered in its place: {counts})"
    return [("fleet", text)]


def _passed_over(size_bytes: int) -> list[tuple[str, str]]:
    if not size_bytes:
        return []
    note = "fetched but skipped by the reader, as far as requests show (try --prefetch tensor)"
    return [("unread", f"{format_size(size_bytes)} {note}")]


def state(status: Status) -> str:
    """The state of a mount, in a few words."""
    if "error" in status:
        return "worker does not answer"
    if status["trouble"]:
        return f"trouble: {status['trouble']}"
    if status["ready"]["model"] and status["prefetch"]["wanted_bytes"]:
        return "complete"
    words = {
        "fetching": "prefetching",
        "demand": "fetching for readers",
        "no_room": "waiting for readers to free memory",
        "paused": "paused",
        "off": "serving, no prefetch",
    }
    return words.get(status["prefetch"]["activity"], "serving")


def share(part: int, whole: int) -> str:
    """`3GiB of 15GiB (20%)`."""
    text = f"{format_size(part)} of {format_size(whole)}"
    return f"{text} ({part / whole:.0%})" if whole else text


def _restarts(status: Status) -> str:
    many = status["restarts"]
    return f", {many} restart{'s' if many > 1 else ''} of its worker" if many else ""


def _changed(status: Status) -> list[tuple[str, str]]:
    """Options that were changed since the mount began, if any."""
    texts = [f"{name}={text}" for name, text in status.get("changed", {}).items()]
    return [("changed", ", ".join(texts))] if texts else []


def _compared(status: Status) -> list[tuple[str, str]]:
    """What S3 lists now, if it was asked for a new pod."""
    snapshot = status.get("snapshot", {})
    if not snapshot.get("at_s"):
        return []
    listed = "the same" if snapshot["same"] else "other objects: mount again to see them"
    ago = format_duration(max(0.0, time.time() - snapshot["at_s"]))
    return [("S3 lists", f"{listed} ({ago} ago)")]


def _reads(status: Status) -> str:
    hits = status["hits"]
    total = sum(hits.values())
    if not total:
        return f"{status['reads']} requests"
    shares = ", ".join(f"{count / total:.0%} from {tier}" for tier, count in hits.items())
    return f"{status['reads']} requests: {shares}"


def _waited(status: Status) -> str:
    stalled = {cause: seconds for cause, seconds in status["stalled_s"].items() if seconds >= 0.01}
    if not stalled:
        return "not noticeably"
    return ", ".join(
        f"{format_duration(seconds)} ({cause.replace('_', ' ')})"
        for cause, seconds in sorted(stalled.items(), key=lambda item: -item[1])
    )


def _retries(status: Status) -> str:
    causes = [f"{count} ({cause})" for cause, count in status["retries"].items()]
    if status["second_requests"]:
        causes.append(f"{status['second_requests']} hedges of slow requests")
    return ", ".join(causes) or "none"


def _waiting(status: Status) -> list[tuple[str, str]]:
    """A row for each reader that is waiting."""
    lines = []
    for wait in status["waiting"]:
        openers = ", ".join(f"{one['command']} ({one['pid']})" for one in wait["opened_by"])
        lines.append(
            (
                "waiting now",
                f"{format_duration(wait['for_s'])} for {wait['file']} at "
                f"{format_size(wait['offset'])}" + (f", opened by {openers}" if openers else ""),
            )
        )
    return lines


def mounts_table(found: list[Status]) -> Table:
    """A table with a row for each mount."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("MOUNTPOINT", "SOURCE", "STATE"):
        table.add_column(name, overflow="fold")
    for name in ("PRESENT", "RATE", "GETS", "WAITING", "UP"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in found:
        table.add_row(*_cells(each))
    return table


def _cells(status: Status) -> list[str]:
    cells = [status["mountpoint"], status["source"], state(status)]
    if "error" in status:
        return [*cells, "-", "-", "-", "-", "-"]
    prefetch = status["prefetch"]
    wanted = prefetch["wanted_bytes"]
    return [
        *cells,
        f"{prefetch['there_bytes'] / wanted:.0%}" if wanted else "-",
        f"{format_size(status['rate_bytes_per_s'])}/s",
        str(status["requests_in_flight"]),
        str(status["readers_waiting"]),
        format_duration(status["mounted_for_s"]),
    ]
