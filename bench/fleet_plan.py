"""Fleets that fit no machine, in modelled time (`tests/simulated/fleet.py`).

bench/fleet_plan.py              8, 100 and 1,000 nodes, 140 GB; some minutes
bench/fleet_plan.py --nodes 20
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from simulated.fleet import Plan, load


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[8, 100, 1000])
    parser.add_argument("--model", type=float, default=140, help="GB")
    arguments = parser.parse_args()
    size = arguments.model * 1e9
    one = load(Plan(1, fleet=False, model=size)).slowest_s
    print(f"one node alone: {one:.1f} s")
    for nodes in arguments.nodes:
        plan = Plan(nodes, model=size)
        ways = {"with": plan, "a tenth dead": replace(plan, dead=nodes // 10)}
        if nodes <= 100:
            ways["without"] = replace(plan, fleet=False)
        for way, each in ways.items():
            found = load(each)
            print(
                f"{nodes:>5} nodes, {way:<13} {found.slowest_s:7.1f} s "
                f"({found.slowest_s / one:.2f} of one), {found.copies:.2f} copies, "
                f"{found.gets} GETs, {found.stored:.3f} stored",
                flush=True,
            )


if __name__ == "__main__":
    main()
