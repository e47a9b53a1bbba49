"""A chart of a load, as SVG: the rate, the waits, and the progress of each block. Pure.

Three panels share one time axis. In the lowest, the vertical axis is the position in the model:
files in the order of their names, and each block at its offset. A healthy load looks like a
staircase: blocks are fetched (bars), then pushed into the page cache, then read (marks).
"""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from html import escape

from lazyfs.observe.events import Cause
from lazyfs.observe.load import BlockLife, Load
from lazyfs.observe.recorder import Tier
from lazyfs.observe.verdict import Verdict
from lazyfs.options.option_types import format_duration, format_size

WIDTH, LEFT, RIGHT = 1000, 150, 24
RATE_TOP, RATE_HEIGHT = 92, 150
WAIT_TOP, WAIT_HEIGHT = 276, 30
MODEL_TOP, MODEL_HEIGHT = 340, 400
AXIS_TOP = MODEL_TOP + MODEL_HEIGHT
HEIGHT = AXIS_TOP + 84
# Height of a row of the model panel. Bars of a row that touch are drawn as one.
ROW = 2.0
BINS = 200
FILES_NAMED = 16
NAME_LONGEST = 20

TIER_COLOUR = {Tier.S3: "#4a86c5", Tier.FLEET: "#3f9b94", Tier.DISK: "#8a6bb0"}
TIER_NAME = {Tier.S3: "from S3", Tier.FLEET: "from the fleet", Tier.DISK: "from disk"}
PUSHED, READ, INK, FAINT = "#e39a2d", "#14693c", "#222", "#d9d9d9"
CAUSE_COLOUR = {
    Cause.NETWORK: "#4a86c5",
    Cause.THROTTLED: "#c0392b",
    Cause.ERRORS: "#7b241c",
    Cause.CREDENTIALS: "#b03a8c",
    Cause.DISK: "#8a6bb0",
    Cause.MEMORY: "#c98a00",
    Cause.ORDER: "#2a9d8f",
    Cause.NO_PREFETCH: "#6d6d6d",
}


class Chart:
    """Draws one load.

    Args:
        load: the load.
        verdict: what limited it.
    """

    def __init__(self, load: Load, verdict: Verdict) -> None:
        self._load = load
        self._verdict = verdict
        self._begin_s = load.begin_s
        self._span_s = max(load.last_s - load.begin_s, 1e-3)
        # Files with blocks, by name, and the offset of each in the model.
        used = sorted({life.file for life in load.lives}, key=load.path)
        self._starts: dict[int, int] = {}
        self._total = 0
        for file in used:
            self._starts[file] = self._total
            self._total += load.recording.files[file][1]
        shared = (Tier.FLEET,) if load.bytes_from(Tier.FLEET) else ()
        self._tiers = (Tier.S3, *shared, Tier.DISK)
        self._block_size = int(load.recording.about["options"]["block_size"])

    def svg(self, *, alone: bool) -> str:
        """The chart. `alone` adds a title and the verdict, for a file of its own."""
        parts = [*self._rate(), *self._waiting(), *self._model(), *self._axis()]
        if alone:
            parts += self._title()
        top = 0 if alone else RATE_TOP - 26
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {top} {WIDTH} {HEIGHT - top}" '
            f'width="{WIDTH}" height="{HEIGHT - top}" role="img" '
            f'aria-label="{escape(self._verdict.headline)}" '
            'font-family="system-ui, sans-serif" font-size="12">'
            f'<rect x="0" y="{top}" width="{WIDTH}" height="{HEIGHT - top}" fill="#fff"/>'
            f"{''.join(parts)}</svg>"
        )

    def _title(self) -> Iterator[str]:
        about = self._load.recording.about
        yield _text(16, 24, f"Load of {about['source']} at {about['mountpoint']}", size=16)
        for line, words in enumerate(textwrap.wrap(self._verdict.headline, 150)[:2]):
            yield _text(16, 44 + 16 * line, words)

    def _x(self, at_s: float) -> float:
        share = (at_s - self._begin_s) / self._span_s
        return LEFT + min(1.0, max(0.0, share)) * (WIDTH - LEFT - RIGHT)

    def _rate(self) -> Iterator[str]:
        """Bytes per second: disk below, the fleet and S3 stacked on it."""
        load, bottom = self._load, RATE_TOP + RATE_HEIGHT
        end_s = self._begin_s + self._span_s
        stacked: dict[Tier, list[float]] = {}
        total = [0.0] * BINS
        for tier in reversed(self._tiers):
            rates = load.rates(tier, self._begin_s, end_s, BINS)
            total = [sum(pair) for pair in zip(total, rates, strict=True)]
            stacked[tier] = total
        best = load.best_rate()
        top = max([*total, best, 1.0]) * 1.08

        def y(rate: float) -> float:
            return bottom - rate / top * RATE_HEIGHT

        title = ", ".join(TIER_NAME[tier] for tier in self._tiers)
        yield _text(LEFT, RATE_TOP - 8, f"rate: {title}", weight="bold")
        for step in _steps(top, unit=1 << 10 * max(0, (int(top).bit_length() - 3) // 10)):
            yield _line(LEFT, y(step), WIDTH - RIGHT, y(step), FAINT)
            yield _text(
                LEFT - 6, y(step) + 4, f"{format_size(step)}/s", anchor="end", colour="#555"
            )
        for tier, rates in reversed(stacked.items()):
            if any(rates):
                points = [f"{LEFT},{bottom}"]
                width = (WIDTH - LEFT - RIGHT) / BINS
                for number, rate in enumerate(rates):
                    left = LEFT + number * width
                    points += [f"{left:.1f},{y(rate):.1f}", f"{left + width:.1f},{y(rate):.1f}"]
                points.append(f"{WIDTH - RIGHT},{bottom}")
                yield f'<polygon points="{" ".join(points)}" fill="{TIER_COLOUR[tier]}"/>'
        if best:
            yield _line(LEFT, y(best), WIDTH - RIGHT, y(best), INK, dash="5 4")
            words = f"best over a second: {format_size(best)}/s"
            yield _text(WIDTH - RIGHT, y(best) - 5, words, anchor="end")

    def _waiting(self) -> Iterator[str]:
        """When readers waited, and why."""
        yield _text(LEFT - 6, WAIT_TOP + 19, "readers waited", anchor="end", weight="bold")
        yield _rect(LEFT, WAIT_TOP, WIDTH - LEFT - RIGHT, WAIT_HEIGHT, "#f3f3f3")
        by_cause: defaultdict[Cause, list[tuple[float, float]]] = defaultdict(list)
        for stall in self._load.stalls:
            by_cause[stall.cause].append((stall.begin_s, stall.end_s))
        for cause, times in by_cause.items():
            for begin_s, end_s in _joined(times):
                left, right = self._x(begin_s), self._x(end_s)
                tip = (
                    f"{cause.label.replace('_', ' ')}: {format_duration(end_s - begin_s)} "
                    f"from {begin_s - self._begin_s:.2f} s"
                )
                yield _rect(
                    left,
                    WAIT_TOP,
                    max(1.0, right - left),
                    WAIT_HEIGHT,
                    CAUSE_COLOUR[cause],
                    tip=tip,
                )

    def _model(self) -> Iterator[str]:
        """When each block was fetched, pushed and read."""
        yield _text(LEFT, MODEL_TOP - 8, "position in the model over time", weight="bold")
        yield _rect(LEFT, MODEL_TOP, WIDTH - LEFT - RIGHT, MODEL_HEIGHT, "#fbfbfb")
        yield from self._files()
        load = self._load
        if load.start_s is not None:
            x = self._x(load.start_s)
            yield _line(x, WAIT_TOP - 8, x, AXIS_TOP, "#888", dash="2 3")
            yield _text(x + 4, WAIT_TOP - 6, "first open", colour="#666")
        for tier in reversed(self._tiers):
            lives = [life for life in load.lives if life.tier is tier]
            yield from self._bars(lives, TIER_COLOUR[tier])
        yield from self._marks(lambda life: life.pushed_s, PUSHED)
        yield from self._marks(lambda life: life.read_s, READ)

    def _files(self) -> Iterator[str]:
        """A line for each file, and its name where there is room."""
        files = list(self._starts)
        last_y = -100.0
        for file in files:
            y = self._y(self._starts[file])
            if len(files) <= 200:
                yield _line(LEFT, y, WIDTH - RIGHT, y, FAINT)
            if y - last_y >= MODEL_HEIGHT / FILES_NAMED:
                last_y = y
                path = self._load.path(file)
                name = path.rpartition("/")[2].removesuffix(".safetensors")
                if len(name) > NAME_LONGEST:
                    name = f"…{name[-NAME_LONGEST:]}"
                yield _text(LEFT - 6, y + 11, name, anchor="end", colour="#555", tip=path)

    def _y(self, place: float) -> float:
        return MODEL_TOP + place / max(1, self._total) * MODEL_HEIGHT

    def _rows(self, life: BlockLife) -> tuple[float, float]:
        """Top and height of a block, aligned to the grid of rows."""
        begin = self._starts[life.file] + life.block * self._block_size
        top = ROW * int(self._y(begin) / ROW)
        return top, max(ROW, self._y(begin + life.size) - top)

    def _bars(self, lives: Iterable[BlockLife], colour: str) -> Iterator[str]:
        """A bar for each block in flight. Bars of a row that touch become one."""
        rows: defaultdict[tuple[float, float], list[tuple[float, float]]] = defaultdict(list)
        for life in lives:
            top, height = self._rows(life)
            rows[top, round(height, 1)].append((life.begun_s, life.landed_s))
        for (top, height), times in rows.items():
            for begin_s, end_s in _joined(times):
                left, right = self._x(begin_s), self._x(end_s)
                yield _rect(left, top, max(1.0, right - left), height, colour, opacity=0.75)

    def _marks(self, when: Callable[[BlockLife], float | None], colour: str) -> Iterator[str]:
        seen: set[tuple[int, int]] = set()
        for life in self._load.lives:
            at_s = when(life)
            if at_s is None:
                continue
            top, height = self._rows(life)
            x = self._x(at_s)
            if (round(x), round(top)) not in seen:
                seen.add((round(x), round(top)))
                yield _rect(x - 1, top, 2, height, colour)

    def _axis(self) -> Iterator[str]:
        for step in _steps(self._span_s, most=9):
            x = self._x(self._begin_s + step)
            yield _line(x, AXIS_TOP, x, AXIS_TOP + 5, INK)
            yield _text(x, AXIS_TOP + 19, f"{step:g} s", anchor="middle")
        yield _line(LEFT, AXIS_TOP, WIDTH - RIGHT, AXIS_TOP, INK)
        legend = [*((TIER_NAME[tier], TIER_COLOUR[tier]) for tier in self._tiers),
                  ("into the page cache", PUSHED), ("read through the daemon", READ)]  # fmt: skip
        yield from _legend(AXIS_TOP + 42, "blocks:", legend)
        causes = sorted({stall.cause for stall in self._load.stalls})
        waits = [(cause.label.replace("_", " "), CAUSE_COLOUR[cause]) for cause in causes]
        yield from _legend(AXIS_TOP + 64, "waiting:", waits or [("none", "#f3f3f3")])


def _joined(times: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Sorted intervals; those that overlap or touch are merged."""
    joined: list[tuple[float, float]] = []
    for begin_s, end_s in sorted(times):
        if joined and begin_s <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end_s))
        else:
            joined.append((begin_s, end_s))
    return joined


def _steps(top: float, most: int = 4, unit: float = 1.0) -> list[float]:
    """Round multiples of `unit` from 0 to `top`, about `most` of them at most."""
    step = 1e-6 * unit
    while top / step > most:
        for factor in (2, 2.5, 2):
            step *= factor
            if top / step <= most:
                break
    return [step * number for number in range(int(top / step) + 1)]


def _legend(y: float, title: str, items: list[tuple[str, str]]) -> Iterator[str]:
    yield _text(LEFT - 6, y, title, anchor="end", colour="#555")
    x = float(LEFT)
    for name, colour in items:
        yield _rect(x, y - 9, 12, 10, colour)
        yield _text(x + 17, y, name)
        x += 40 + 6.6 * len(name)


def _text(
    x: float, y: float, words: str, *, anchor: str = "start", colour: str = INK, size: int = 12,
    weight: str = "normal", tip: str = "",
) -> str:  # fmt: skip
    title = f"<title>{escape(tip)}</title>" if tip else ""
    begin = (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'font-weight="{weight}"'
    )
    # The halo is a separate text: cairosvg does not know paint-order and draws it over the letters.
    halo = 'fill="#fff" stroke="#fff" stroke-width="3" opacity="0.8" aria-hidden="true"'
    return (
        f"{begin} {halo}>{escape(words)}</text>"
        f'{begin} fill="{colour}">{title}{escape(words)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, dash: str = "") -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{dashed}/>'
    )


def _rect(
    x: float, y: float, width: float, height: float, colour: str, *, opacity: float = 1.0,
    tip: str = "",
) -> str:  # fmt: skip
    faint = f' fill-opacity="{opacity}"' if opacity < 1 else ""
    shape = (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'fill="{colour}"{faint}'
    )
    return f"{shape}><title>{escape(tip)}</title></rect>" if tip else f"{shape}/>"
