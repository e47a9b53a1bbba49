"""What is loaded before a mount is served, and what does not end a worker."""

import fcntl
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from lazyfs.errors import MountError
from lazyfs.objects import File
from lazyfs.pagecache.walker import Walker
from lazyfs.process.worker_line import SupervisorLine, WorkerLine
from lazyfs.process.worker_process import was_told_to_end

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
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    SupervisorLine(ours).ready("1", 0)


def test_says_why_it_cannot_mount_when_its_supervisor_is_gone():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    with pytest.raises(MountError, match="supervisor"):
        SupervisorLine(ours).mount("s3://b", allow_other=False)


def test_a_line_beyond_the_1023rd_descriptor():
    """A node plugin has some hundred volumes, each with several descriptors."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    high = socket.socket(fileno=fcntl.fcntl(theirs.detach(), fcntl.F_DUPFD_CLOEXEC, 1500))
    line = WorkerLine(high)
    assert line.receive(time.monotonic()) is None
    SupervisorLine(ours).refuse("no " * 100_000, 2, "OptionError")
    said = line.receive(time.monotonic() + 5)
    assert said is not None and said["error"].startswith("no no") and said["exit_code"] == 2
    ours.close()
    assert line.receive(time.monotonic() + 5) == {}
    high.close()


def test_a_worker_that_was_told_to_end_did_not_die():
    ends = {"exit": 0, "kill -TERM $$": 0, "exit 1": 1, "kill -SEGV $$": 1, "kill -KILL $$": 1}
    for command, died in ends.items():
        code = subprocess.run(["bash", "-c", command], check=False).returncode
        assert was_told_to_end(code) is not bool(died), command
