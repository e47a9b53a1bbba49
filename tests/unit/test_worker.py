"""What is loaded before a mount is served, and what does not end a worker."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from lazyfs.objects import File
from lazyfs.pagecache.walker import Walker
from lazyfs.process.worker import _report

# In a process of its own: botocore looks for awscrt once.
IMPORT = """
import sys
import lazyfs.store.boto
from botocore.compat import EC
print(EC is not None, "_awscrt" in sys.modules)
from awscrt import checksums  # what verifies whole objects can have it
"""


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("[default]\nregion = eu-west-1\n", "False False"),
        ("[profile me]\nlogin_session = arn:aws:sts::1:assumed-role/me\n", "True True"),
        (None, "False False"),
    ],
)
def test_loads_awscrt_only_for_profiles_of_aws_login(tmp_path, config, expected):
    path = tmp_path / "config"
    if config is not None:
        path.write_text(config)
    said = subprocess.run(
        [sys.executable, "-c", IMPORT], env={"AWS_CONFIG_FILE": str(path)},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert said.stdout.strip() == expected


def test_serves_on_where_no_process_can_be_started(monkeypatch, caplog):
    """As in a container whose number of processes is limited."""
    monkeypatch.setattr(sys, "executable", "/nonexistent")

    async def look_up():
        async with trio.open_nursery() as nursery:
            walker = Walker(Path("/mnt"), lambda file: file.name, nursery)
            walker.look_up([File(2, 1, "f", "f", 1, "e", 0)])

    trio.run(look_up)
    assert "/nonexistent" in caplog.text


def test_serves_on_when_nobody_hears_that_it_is_ready():
    """Its supervisor was killed while it began."""
    hearing, telling = os.pipe()
    os.close(hearing)
    _report(telling, {"ready": True})
