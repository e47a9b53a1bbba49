"""Formats results as tables, JSON and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from bars import Bar, Medians
from measure import Run
from scenarios import LIMIT, Line

# Positions of the bars of a contender, by their number.
_OFFSETS: dict[int, tuple[float, ...]] = {0: (), 1: (0.0,), 2: (0.2, -0.2)}


def median(runs: Sequence[Run]) -> Run:
    """The median of each figure over several runs."""
    values = {
        field.name: statistics.median(getattr(run, field.name) for run in runs)
        for field in fields(Run)
        if getattr(runs[0], field.name) is not None
    }
    return Run(**values)


def loads_table(medians: Medians, runs: Mapping[Line, Sequence[Run]]) -> str:
    """The lines of one origin as Markdown, with the number of runs of each."""
    lines = [
        "| | workload | state | runs | mount s | seconds | GB/s | of the limit | client CPU s/GB "
        "| of it start | after | reader CPU s/GB | peak MiB | FUSE requests (reads) | GETs "
        "| fetched/needed |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    limit = medians.get(LIMIT)
    for line, run in medians.items():
        gigabytes = run.bytes / 1e9
        cells = [
            line.contender, line.workload, line.state, str(len(runs[line])),
            _shown(run.mount_s, 2),
            f"{run.seconds:.2f}", f"{run.rate:.2f}",
            f"{run.rate / limit.rate:.2f}" if limit and line.state in ("", "cold") else "",
            _shown(run.client_cpu_s, 2, gigabytes), _shown(run.start_cpu_s, 2, gigabytes),
            _shown(run.after_cpu_s, 2, gigabytes),
            "" if line == LIMIT else f"{run.reader_cpu_s / gigabytes:.2f}",
            _shown(run.peak_mib, 0),
            "" if run.fuse_reads is None else f"{run.fuse_requests:.0f} ({run.fuse_reads:.0f})",
            _shown(run.gets, 0), _shown(run.fetched_over_needed, 3),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(value: float | None, digits: int, divisor: float = 1) -> str:
    return "" if value is None else f"{value / divisor:.{digits}f}"


def small_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """Mount times and latencies of small files as Markdown, in milliseconds."""
    lines = [
        "| ms | objects | mount | mount and walk | cold p50 / p99 | warm p50 / p99 "
        "| hot p50 / p99 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, figures in results.items():
        states = [
            f"{figures[f'{state}_p50_ms']:.2f} / {figures[f'{state}_p99_ms']:.2f}"
            if f"{state}_p50_ms" in figures
            else ""
            for state in ("cold", "warm", "hot")
        ]
        cells = [name, f"{figures['files']:.0f}", f"{figures['mount_ms']:.0f}",
                 f"{figures['mount_and_walk_ms']:.0f}", *states]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def metadata_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """Latencies of metadata calls during a load, by origin, as Markdown, in milliseconds."""
    lines = ["| ms | call | calls | p50 | p99 | longest |", "|---|---|---|---|---|---|"]
    for profile, figures in results.items():
        for call in ("stat", "listdir", "statvfs"):
            cells = [profile, call, f"{figures[f'{call}_calls']:.0f}"]
            cells += [f"{figures[f'{call}_{name}_ms']:.2f}" for name in ("p50", "p99", "max")]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def bars_table(bars: Sequence[Bar]) -> str:
    """The bars as Markdown."""
    lines = ["| bar | measured | wanted | | |", "|---|---|---|---|---|"]
    for bar in bars:
        verdict = "met" if bar.met else "**missed**"
        lines.append(f"| {bar.what} | {bar.measured:.3g} | {bar.bar} | {verdict} | {bar.note} |")
    return "\n".join(lines)


def plot(everything: Mapping[str, Medians], about: str, path: Path) -> None:
    """Plot cold and warm mapped loads of all contenders, with a panel for each origin."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(
        line.contender for medians in everything.values() for line in medians
        if line.workload == "vllm" and line.state == "cold" and line.contender != "local file"
    ))[::-1]  # fmt: skip
    if not names:
        return
    figure, axes = pyplot.subplots(
        1, len(everything), figsize=(5.2 * len(everything) + 1.2, 1.6 + 0.62 * len(names)),
        sharey=True, squeeze=False,
    )  # fmt: skip
    for axis, (profile, medians) in zip(axes[0], everything.items(), strict=True):
        for at, name in enumerate(names):
            lines = {state: Line(name, "vllm", state) for state in ("cold", "warm")}
            shown = {state: medians[line] for state, line in lines.items() if line in medians}
            for (state, run), offset in zip(shown.items(), _OFFSETS[len(shown)], strict=True):
                colour = {"cold": "#1f5fa8", "warm": "#8fb8e6"}[state]
                if not name.startswith("lazyfs"):
                    colour = {"cold": "#777777", "warm": "#c4c4c4"}[state]
                bar = axis.barh(at + offset, run.rate, height=0.38, color=colour)
                axis.bar_label(bar, [f"{run.rate:.2f} {state} ({run.seconds:.1f} s)"],
                               padding=3, fontsize=8, zorder=3,
                               bbox={"color": "white", "pad": 0.5})  # fmt: skip
        if LIMIT in medians:
            limit = medians[LIMIT].rate
            axis.axvline(limit, color="#b03030", linewidth=1, linestyle="--")
            axis.text(limit, len(names) - 0.42, f" the origin's limit: {limit:.2f}", fontsize=8,
                      color="#b03030", va="bottom")  # fmt: skip
        axis.set_ylim(-0.6, len(names) - 0.1)
        axis.set_yticks(range(len(names)), names)
        axis.set_title(f"origin: {profile}", fontsize=10)
        axis.set_xlabel("GB/s from mount (or download) to the last tensor; more is better",
                        fontsize=8)  # fmt: skip
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(0, axis.get_xlim()[1] * 1.45)
    figure.suptitle(about, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
