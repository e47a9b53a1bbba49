"""`lazyfs report`: what limited a load, as text and as a chart."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from lazyfs.cli.messages import tell
from lazyfs.cli.mounts import record_at
from lazyfs.control.client import ControlClient
from lazyfs.errors import LazyfsError, OptionError
from lazyfs.observe.chart import Chart
from lazyfs.observe.events import Activity, Cause, Event, EventKind, Purpose
from lazyfs.observe.html_report import figures, html_report
from lazyfs.observe.load import Load, Recording
from lazyfs.observe.verdict import Verdict, judge
from lazyfs.process.mount_records import control_socket

_DETAILS: dict[int, type[Cause] | type[Activity] | type[Purpose]] = {
    EventKind.FETCHED: Purpose,
    EventKind.LOADED: Purpose,
    EventKind.SHARED: Purpose,
    EventKind.FAILED: Cause,
    EventKind.WAITED: Cause,
    EventKind.RETRIED: Cause,
    EventKind.PREFETCH: Activity,
}


@click.command()
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the report to FILE: .html (self-contained), .svg, .png or .json.",
)
def report(mountpoint: Path, output: Path | None) -> None:
    """Explain why a load of MOUNTPOINT took as long as it did, and which option would change that.

    Every mount records its events since its worker started: when each block arrived, from where,
    who waited for it and why. There is nothing to switch on.

    \b
    Examples:
      lazyfs report /mnt/llama
      lazyfs report /mnt/llama -o report.html
      lazyfs report /mnt/llama -o report.json && jq .verdict report.json

    Exit code 1: nothing is mounted there; 2: FILE cannot be written, or has another suffix.
    """
    write = _writer(output) if output else None
    record = record_at(mountpoint)
    answer = ControlClient(control_socket(Path(record.mountpoint))).get("/report")
    load = Load.of(Recording.parse(answer))
    verdict = judge(load)
    if write is None or output is None:
        tell(as_text(load, verdict))
        return
    content = write(load, verdict)
    try:
        output.write_bytes(content)
    except OSError as error:
        raise OptionError(f"--output: {output}: {error.strerror}") from error
    tell(verdict.headline, err=True)


def as_text(load: Load, verdict: Verdict) -> str:
    """The report as text for a terminal."""
    about = load.recording.about
    lines = [f"{about['source']} at {about['mountpoint']}", "", verdict.headline, verdict.advice]
    lines += ["", *(f"- {fact}" for fact in verdict.facts), ""]
    width = max(len(name) for name, _ in figures(load))
    lines += [f"{name:<{width}}  {value}" for name, value in figures(load)]
    return "\n".join(lines)


def _writer(output: Path) -> Callable[[Load, Verdict], bytes]:
    writers: dict[str, Callable[[Load, Verdict], bytes]] = {
        ".html": lambda load, verdict: html_report(load, verdict).encode(),
        ".svg": lambda load, verdict: Chart(load, verdict).svg(alone=True).encode(),
        ".png": _png,
        ".json": lambda load, verdict: json.dumps(as_json(load, verdict), indent=1).encode(),
    }
    writer = writers.get(output.suffix.lower())
    if writer is None:
        raise OptionError(f"--output: {output}: the name must end in {', '.join(writers)}")
    if not os.access(output.parent, os.W_OK):
        raise OptionError(f"--output: {output}: {output.parent} is not a writable directory")
    return writer


def _png(load: Load, verdict: Verdict) -> bytes:
    try:
        import cairosvg
    except (ImportError, OSError) as error:  # OSError: the cairo library itself is missing
        raise LazyfsError(
            ".png needs cairosvg (pip install 'lazyfs[png]') and the cairo library; "
            ".html and .svg need nothing"
        ) from error
    drawn: bytes = cairosvg.svg2png(Chart(load, verdict).svg(alone=True).encode(), scale=2)
    return drawn


def as_json(load: Load, verdict: Verdict) -> dict[str, Any]:
    """The report with all events, as JSON."""
    return {
        "about": load.recording.about,
        "verdict": {
            "limit": verdict.limit,
            "headline": verdict.headline,
            "advice": verdict.advice,
            "facts": verdict.facts,
        },
        "load": {
            "start_s": load.start_s,
            "end_s": load.end_s,
            "is_over": load.is_over,
            "duration_s": load.duration_s,
            "stalled_s": {cause.label: seconds for cause, seconds in load.stalled_s.items()},
            "best_rate_bytes_per_s": load.best_rate(),
        },
        "events": [_event(load, event) for event in load.recording.events],
    }


def _event(load: Load, event: Event) -> dict[str, Any]:
    kind = EventKind(event.kind)
    fields: dict[str, Any] = {"at_s": round(event.at_s, 6), "what": kind.name.lower()}
    if kind in _DETAILS:
        fields["detail"] = _DETAILS[kind](event.detail).name.lower()
    if path := load.path(event.file):
        fields |= {"file": path, "block": event.block}
    if event.size:
        fields["bytes"] = event.size
    if event.seconds:
        fields["seconds"] = round(event.seconds, 6)
    return fields
