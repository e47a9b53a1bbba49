"""Fleets in modelled time: what `docs/SCALE.md` promises of many nodes."""

from __future__ import annotations

import pytest
from simulated.fleet import Plan, load

# A tenth of the model, so that the whole takes a second or two; `bench/fleet_plan.py` has it all.
MODEL = 14e9


def alone(**more: float) -> float:
    return load(Plan(1, fleet=False, **{"model": MODEL, **more})).slowest_s  # type: ignore[arg-type]


@pytest.mark.parametrize("nodes", [8, 100])
def test_many_nodes_take_little_longer_than_one(nodes: int) -> None:
    found = load(Plan(nodes, model=MODEL, objects=3))
    assert found.copies <= 1.2
    assert found.slowest_s <= 1.3 * alone()


def test_without_a_fleet_each_takes_a_copy_and_s3_s_limit_is_the_time() -> None:
    found = load(Plan(100, fleet=False, model=MODEL))
    assert found.copies == 100
    assert found.slowest_s > 5 * alone()


def test_a_scarce_link_is_used_once() -> None:
    """As the bench has it: four nodes, one link."""
    few = {"model": 0.4e9, "origin": 25e6, "window": 16, "spread_s": 0.2}
    four = load(Plan(4, objects=6, **few))  # type: ignore[arg-type]
    assert four.copies == 1
    assert four.slowest_s <= 1.1 * alone(**few)


def test_shelves_that_are_gone_cost_their_share() -> None:
    found = load(Plan(20, model=MODEL, objects=3, dead=2))
    assert found.copies == 1
    assert found.slowest_s <= 1.5 * alone()
