"""The performance targets of lazyfs, as ratios within one run, and whether it meets them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from measure import Run
from scenarios import DOWNLOAD, DOWNLOADED, LIMIT, RUNAI, Line

# Medians of one origin, and medians by the name of the origin.
Medians = Mapping[Line, Run]
Everything = Mapping[str, Medians]

COLD, HOT, WARM = (Line("lazyfs", "vllm", state) for state in ("cold", "hot", "warm"))
SEQUENTIAL = Line("lazyfs", "sequential", "cold")
PEAK_MIB = 600


@dataclass(frozen=True, slots=True)
class Bar:
    """One target.

    Attributes:
        what: a description.
        measured: the figure, or the worst of several.
        bar: the target, with "at least" or "at most" in front.
        met: whether the figure meets it.
        note: where the figure comes from.
    """

    what: str
    measured: float
    bar: str
    met: bool
    note: str


def _at_least(what: str, measured: float, bar: float, note: str) -> Bar:
    return Bar(what, measured, f"at least {bar:g}", measured >= bar, note)


def _at_most(what: str, measured: float, bar: float, note: str) -> Bar:
    return Bar(what, measured, f"at most {bar:g}", measured <= bar, note)


def judge(everything: Everything) -> list[Bar]:
    """All targets for which there are figures."""
    bars: list[Bar] = []
    if (medians := everything.get("throttled")) and COLD in medians and LIMIT in medians:
        ratio = medians[COLD].rate / medians[LIMIT].rate
        bars.append(_at_least("throttled, cold: rate / what the link delivers", ratio, 0.9,
                              _rates(medians, COLD, LIMIT)))  # fmt: skip
    for profile, over_peer, over_download in (
        ("s3like", 5.0, 2.0), ("unlimited", 2.0, 1.0), ("tls", 2.0, 1.0),
    ):  # fmt: skip
        medians = everything.get(profile, {})
        if COLD not in medians:
            continue
        if peers := [line for line in medians if _is_peer(line) and line.state == "cold"]:
            best = max(peers, key=lambda line: medians[line].rate)
            bars.append(_at_least(
                f"{profile}, cold: times as fast as the fastest peer",
                medians[COLD].rate / medians[best].rate, over_peer, _rates(medians, COLD, best),
            ))  # fmt: skip
        if RUNAI in medians:
            ours, theirs = (medians[line].bytes / medians[line].load_s for line in (COLD, RUNAI))
            bars.append(_at_least(
                f"{profile}, cold, the load alone: times as fast as Run:ai straight from S3",
                ours / theirs, 1.5, f"lazyfs {ours / 1e9:.2f} GB/s, Run:ai {theirs / 1e9:.2f} GB/s",
            ))  # fmt: skip
        if DOWNLOAD in medians:
            bars.append(_at_least(
                f"{profile}, cold: times as fast as download, then load",
                medians[COLD].rate / medians[DOWNLOAD].rate, over_download,
                _rates(medians, COLD, DOWNLOAD),
            ))  # fmt: skip
    mapped = {
        profile: medians[COLD].rate / medians[SEQUENTIAL].rate
        for profile, medians in everything.items()
        if COLD in medians and SEQUENTIAL in medians
    }
    if mapped:
        bars.append(_at_least("cold: mapped / plain sequential, rates", min(mapped.values()), 0.9,
                              _each(mapped)))  # fmt: skip
    bars += _caches(everything)
    bars += _costs(everything)
    return bars


def _caches(everything: Everything) -> Iterable[Bar]:
    hot_reads = {
        profile: float(reads)
        for profile, medians in everything.items()
        if HOT in medians and (reads := medians[HOT].fuse_reads) is not None
    }
    if hot_reads:
        worst = max(hot_reads.values())
        yield _at_most("hot: FUSE read requests", worst, 0, _each(hot_reads))
    for state, what, bar, value in (
        ("hot", "hot: rate / local file in the page cache, the faster", 0.9, HOT),
        ("cold", "warm: rate / local file not in the page cache", 0.7, WARM),
    ):
        local = [Line(name, "vllm", state) for name in ("local file", DOWNLOADED)]
        ratios = {
            profile: medians[value].rate / max(medians[line].rate for line in there)
            for profile, medians in everything.items()
            if value in medians and (there := [line for line in local if line in medians])
        }
        if ratios:
            yield _at_least(what, min(ratios.values()), bar, _each(ratios))


def _costs(everything: Everything) -> Iterable[Bar]:
    both = {
        profile: (medians[COLD], medians[LIMIT])
        for profile, medians in everything.items()
        if COLD in medians and LIMIT in medians
    }
    if both:
        cpu = {name: _client_cpu(ours) / _client_cpu(raw) for name, (ours, raw) in both.items()}
        loading = {name: _loading(ours) / _loading(raw) for name, (ours, raw) in both.items()}
        yield _at_most("cold: client CPU / that of the raw client", max(cpu.values()), 1.5,
                       f"{_each(cpu)}; both without their start: {_each(loading)}")  # fmt: skip
    fetched = {
        profile: medians[COLD].fetched_over_needed or 0.0
        for profile, medians in everything.items()
        if COLD in medians
    }
    if fetched:
        yield _at_most("cold: bytes fetched / needed", max(fetched.values()), 1.01, _each(fetched))
    peaks = {
        f"{profile}, {line}": run.peak_mib or 0.0
        for profile, medians in everything.items()
        for line, run in medians.items()
        if line.contender == "lazyfs"
    }
    if peaks:
        worst = max(peaks, key=lambda name: peaks[name])
        yield _at_most("peak memory of a daemon, MiB", peaks[worst], PEAK_MIB, worst)


def _is_peer(line: Line) -> bool:
    ours = line.contender.startswith("lazyfs") or line in (LIMIT, DOWNLOAD)
    return line.workload == "vllm" and not ours and line.contender != "local file"


def _client_cpu(run: Run) -> float:
    return (run.client_cpu_s or 0.0) / run.bytes * 1e9


def _loading(run: Run) -> float:
    return _client_cpu(run) - (run.start_cpu_s or 0.0) / run.bytes * 1e9


def _rates(medians: Medians, *lines: Line) -> str:
    return ", ".join(f"{line.contender} {medians[line].rate:.2f} GB/s" for line in lines)


def _each(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())
