"""Whole loads in modelled time: how much longer than they must, and how much for nothing."""

from __future__ import annotations

import pytest
from simulated.cases import CASES


@pytest.mark.parametrize("name", CASES)
def test_a_load_takes_hardly_longer_than_it_must(name: str) -> None:
    report = CASES[name].run()
    assert report.stall <= CASES[name].most_stall
    assert report.waste <= CASES[name].most_waste
    assert report.twice <= CASES[name].most_twice, "blocks were fetched a second time"
