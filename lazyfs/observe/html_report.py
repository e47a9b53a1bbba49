"""The report of a load as one self-contained HTML file. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from lazyfs.observe.chart import CAUSE_COLOUR, Chart
from lazyfs.observe.load import Load, Stall
from lazyfs.observe.recorder import Tier
from lazyfs.observe.verdict import Verdict
from lazyfs.options.option_types import format_duration, format_size

LONGEST_STALLS = 10

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 1000px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.3em; margin-bottom: .2em; overflow-wrap: anywhere; }
h2 { font-size: 1.1em; margin: 1.6em 0 .4em; }
.about { color: #555; margin-top: 0; overflow-wrap: anywhere; }
.verdict { border-left: 5px solid #4a86c5; padding: .5em 1em; background: #f4f8fc; }
.verdict p { margin: .3em 0; }
svg { width: 100%; height: auto; }
table { border-collapse: collapse; }
td, th { padding: .15em 1.2em .15em 0; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.key { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
"""


def html_report(load: Load, verdict: Verdict) -> str:
    """Render the report."""
    about = load.recording.about
    facts = "".join(f"<li>{escape(fact)}</li>" for fact in verdict.facts)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Load of {escape(about["source"])}</title>
<style>{STYLE}</style></head><body>
<h1>Load of {escape(about["source"])}</h1>
<p class="about">at {escape(about["mountpoint"])}, lazyfs {escape(about["version"])}</p>
<div class="verdict"><p><strong>{escape(verdict.headline)}</strong></p>
<p>{escape(verdict.advice)}</p></div>
<ul>{facts}</ul>
{Chart(load, verdict).svg(alone=False)}
<h2>Figures</h2>
{_table(figures(load))}
{_stalls(load)}
<h2>Options</h2>
{_table((name.replace("_", "-"), str(value)) for name, value in about["options"].items())}
</body></html>
"""


def figures(load: Load) -> list[tuple[str, str]]:
    """The figures of a load, each with its name."""
    duration_s = load.duration_s
    total = sum(life.size for life in load.lives)
    span_s = max(load.arriving_s, 1e-9)
    rows = [
        ("reading took", format_duration(duration_s) + ("" if load.is_over else ", so far")),
        ("readers waited", format_duration(sum(load.stalled_s.values()))),
        ("from S3", format_size(load.bytes_from(Tier.S3))),
        ("from the fleet's cache", format_size(load.bytes_from(Tier.FLEET))),
        ("from disk", format_size(load.bytes_from(Tier.DISK))),
        ("average rate", f"{format_size(total / span_s)}/s over {format_duration(span_s)}"),
        ("best rate over a second", f"{format_size(load.best_rate())}/s"),
        ("blocks", str(load.count(lambda life: True))),
        ("blocks put into the page cache", str(load.count(lambda life: life.pushed_s is not None))),
        ("blocks read through the daemon", str(load.count(lambda life: life.read_s is not None))),
    ]
    for cause, seconds in sorted(load.stalled_s.items(), key=lambda item: -item[1]):
        rows.append((f"readers waited: {cause.label.replace('_', ' ')}", format_duration(seconds)))
    return rows


def _stalls(load: Load) -> str:
    longest = sorted(load.stalls, key=lambda stall: stall.begin_s - stall.end_s)[:LONGEST_STALLS]
    if not longest:
        return ""
    rows = "".join(_stall(load, stall) for stall in longest)
    head = "<tr><th>duration</th><th>at</th><th>block</th><th>cause</th></tr>"
    return f"<h2>Longest waits</h2><table>{head}{rows}</table>"


def _stall(load: Load, stall: Stall) -> str:
    key = f'<span class="key" style="background:{CAUSE_COLOUR[stall.cause]}"></span>'
    cells = (
        f'<td class="number">{format_duration(stall.end_s - stall.begin_s)}</td>'
        f'<td class="number">{stall.begin_s - load.begin_s:.2f} s</td>'
        f"<td>{escape(load.path(stall.file))}, block {stall.block}</td>"
        f"<td>{key}{escape(stall.cause.label.replace('_', ' '))}</td>"
    )
    return f"<tr>{cells}</tr>"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    lines = (f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{''.join(lines)}</table>"
