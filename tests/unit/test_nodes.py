"""Loads on nodes that are larger than those that tests run on, in modelled time."""

from __future__ import annotations

import pytest
from simulated.nodes import NODES


@pytest.mark.parametrize("name", NODES)
def test_a_load_fills_the_link(name: str) -> None:
    assert NODES[name].run() >= NODES[name].share
