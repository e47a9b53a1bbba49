"""Two minutes of the soak test; `make soak SECONDS=3600` runs an hour."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.fuse

SOAK = Path(__file__).parent.parent / "soak.py"
SECONDS = 120
READERS = 64
FAULTS = 12  # 23 on a machine that has nothing else to do
# Other tests run beside this one, and want the processors as well.
PATIENCE_S = 12


@pytest.mark.timeout(300)
def test_every_byte_is_right_and_no_reader_is_stuck_while_everything_goes_wrong() -> None:
    ended = subprocess.run(
        [sys.executable, SOAK, str(SECONDS), f"--patience={PATIENCE_S}", f"--readers={READERS}"],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert ended.stdout, ended.stderr
    told = json.loads(ended.stdout)
    assert told["problems"] == []
    assert told["reads"] > 1000 and told["faults"] >= FAULTS and told["asked"] > 20
    assert ended.returncode == 0
