"""When the processors count as busy."""

from __future__ import annotations

import pytest

from lazyfs.cache.processors import SAMPLE_S, Processors, idle_core_seconds


class Machine:
    """Cores whose idle time is set by hand."""

    now_s = 100.0
    idle_s = 50.0

    def __init__(self) -> None:
        self.processors = Processors(lambda: self.idle_s, lambda: self.now_s)

    def passes(self, seconds: float, *, idle_cores: float) -> bool:
        self.now_s += seconds
        self.idle_s += seconds * idle_cores
        return self.processors.busy


@pytest.mark.parametrize(
    ("idle_cores", "busy"), [(0.0, True), (0.4, True), (0.6, False), (30.0, False)]
)
def test_busy_means_less_than_half_a_core_idle(idle_cores: float, busy: bool) -> None:
    assert Machine().passes(1.0, idle_cores=idle_cores) is busy


def test_an_answer_is_kept_until_there_is_enough_time_to_measure() -> None:
    machine = Machine()
    assert machine.passes(2 * SAMPLE_S, idle_cores=0)
    assert machine.passes(SAMPLE_S / 4, idle_cores=2)
    assert not machine.passes(2 * SAMPLE_S, idle_cores=2)


def test_the_machine_tells_its_idle_time() -> None:
    assert idle_core_seconds() > 0
