"""`lazyfs-csi` refuses invalid options with one line, before it does anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mounting import environment

CONTROLLER = ("controller", "--endpoint={directory}/csi.sock", "--state-dir={directory}/state")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["controller"], "Missing option '--endpoint'"),
        (["controller", "--endpoint={directory}/csi.sock"], "--state-dir is needed outside a"),
        ([*CONTROLLER, "--endpoint=tcp://0.0.0.0:9"], "--endpoint: 'tcp://0.0.0.0:9' is not allow"),
        ([*CONTROLLER, "--driver-name=my driver"], "--driver-name: 'my driver' is not allowed"),
        ([*CONTROLLER, "--http-address=9808"], "--http-address: '9808' is not allowed"),
        ([*CONTROLLER, "--allow-attributes=blockSze"], "--allow-attributes: attribute 'blockSze'"),
        ([*CONTROLLER, "--max-memory-limit=1"], "--max-memory-limit: '1' is not allowed: a size"),
        ([*CONTROLLER, "--block-size=1"], "--block-size: '1' is not allowed: a size"),
        ([*CONTROLLER, "--metrics-address=:9"], "--metrics-address is only for mounts outside"),
        (
            [*CONTROLLER, "--log-file=/x"],
            "--log-file is only for mounts outside Kubernetes; a plugin",
        ),
        (["keeper", "--socket=/tmp/keeper.sock"], "/tmp: is not a directory that only this user"),
    ],
)
def test_options_that_cannot_work(tmp_path: Path, arguments: list[str], said: str) -> None:
    answer = subprocess.run(
        [
            Path(sys.executable).with_name("lazyfs-csi"),
            *(each.format(directory=tmp_path) for each in arguments),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
        check=False,
    )
    assert answer.returncode in (1, 2)
    lines = [line for line in answer.stderr.splitlines() if " INFO " not in line]
    assert len(lines) == 1, answer.stderr
    assert lines[0].startswith("lazyfs-csi: ") and said in lines[0]
