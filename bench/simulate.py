"""Simulates the prefetcher with different loaders, in modelled time.

    python bench/simulate.py [WORD...]    only the loads whose names contain all the words
    python bench/simulate.py nodes        large nodes, an hour: the share of the link of each load

Prints a row for each load: seconds and the lowest possible value, the excess over that, bytes that
were never read, blocks that were fetched twice, and blocks that were requested much later than
their turn.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from simulated.cases import CASES
from simulated.nodes import LARGE, NODES


def nodes() -> None:
    """Run the loads of large nodes, without and with the time that the worker itself needs."""
    for name, node in {**NODES, **LARGE}.items():
        print(f"{name}: {node.run():.3f} of the link if the worker took no time", flush=True)
        for mib in (8, 16, 32):
            share = replace(node, has_worker=True, block_size=mib << 20).run()
            print(f"    {share:.3f} with blocks of {mib} MiB (bar: {node.share})", flush=True)


def main(words: list[str]) -> None:
    """Run the loads and print a row for each."""
    table = Table(
        "load", "seconds", "ideal", "stall", "waste", "twice", "inversions", "reads", box=None
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, case in CASES.items():
        if all(word in name for word in words):
            report = case.run()
            bad = report.stall > case.most_stall or report.waste > case.most_waste
            if case.most_inversions is not None:
                bad |= report.inversions > case.most_inversions
            table.add_row(
                name,
                f"{report.seconds:.2f}",
                f"{report.ideal_s:.2f}",
                f"{report.stall:.1%}",
                f"{report.waste:.1%}",
                str(report.twice),
                str(report.inversions),
                str(report.requests),
                style="red" if bad or report.twice else None,
            )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    if sys.argv[1:] == ["nodes"]:
        nodes()
    else:
        main(sys.argv[1:])
