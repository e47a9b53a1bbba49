"""What a daemon asks of the kernel, and gives up."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROTECT = """
import sys
from pathlib import Path
from lazyfs.process.privileges import protect_from_oom
score = Path("/proc/self/oom_score_adj")
try:
    score.write_text(sys.argv[1])
except PermissionError:
    sys.exit(77)
protect_from_oom()
print(score.read_text())
"""


@pytest.mark.parametrize(("before", "after"), [(-100, -500), (-997, -997)])
def test_protection_from_oom_is_never_given_back(before: int, after: int) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", PROTECT, str(before)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if answer.returncode == 77:
        pytest.skip("needs CAP_SYS_RESOURCE")
    assert answer.returncode == 0, answer.stderr
    assert int(answer.stdout) == after
