"""Plugins of the driver for tests, as the processes that a cluster starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import grpc
from mounting import environment, wait_for_log

from csi import csi_pb2
from csi.csi_pb2_grpc import ControllerStub, IdentityStub, NodeStub
from lazyfs.handover.keeper import KeeperClient, KeeperError

READY_TIMEOUT_S = 30


class Plugin:
    """One `lazyfs-csi` process and clients of it.

    Args:
        kind: `node` or `controller`.
        directory: for its socket and log; must be short.
        arguments: after `--endpoint`.
    """

    def __init__(self, kind: str, directory: Path, *arguments: str, **env: str) -> None:
        self.socket = directory / f"{kind}.sock"
        self.endpoint = f"unix://{self.socket}"
        self._log_file = directory / f"{kind}.log"
        with open(self._log_file, "ab") as log:
            self.process = _start(kind, log, f"--endpoint={self.endpoint}", *arguments, **env)
        self.channel = grpc.insecure_channel(f"unix:{self.socket}")
        self.identity = IdentityStub(self.channel)
        self.controller = ControllerStub(self.channel)
        self.node = NodeStub(self.channel)
        self._wait()

    def log(self) -> str:
        """What it and those before it at the same place logged."""
        return self._log_file.read_text()

    def wait_for_log(self, text: str) -> None:
        """Wait until the log contains a text."""
        wait_for_log(self.log, text)

    def kill(self) -> None:
        """End it by SIGKILL."""
        self.process.kill()
        self.process.wait(10)
        self.channel.close()

    def end(self) -> None:
        """End it as a cluster does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                assert self.process.wait(30) == 0, self.log()
            except subprocess.TimeoutExpired:
                raise AssertionError(f"it does not end:\n{self.log()}") from None
        self.channel.close()

    def _wait(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            try:
                self.identity.GetPluginInfo(csi_pb2.GetPluginInfoRequest(), timeout=1)
                return
            except grpc.RpcError:
                assert self.process.poll() is None, self.log()
                assert time.monotonic() < deadline, self.log()
                time.sleep(0.05)


class KeeperProcess:
    """A `lazyfs-csi keeper`."""

    def __init__(self, directory: Path) -> None:
        self.socket = directory / "keeper.sock"
        with open(directory / "keeper.log", "ab") as log:
            self.process = _start("keeper", log, f"--socket={self.socket}")
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self._answers():
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            KeeperClient.connect(self.socket).close()
        except KeeperError:
            return False
        return True

    def end(self) -> None:
        """End it; it has nothing to tidy up."""
        self.process.kill()
        self.process.wait(10)


def _start(kind: str, log: IO[bytes], *arguments: str, **env: str) -> subprocess.Popen[bytes]:
    command = [Path(sys.executable).with_name("lazyfs-csi"), kind, *arguments]
    kept = environment(**env)
    if "AWS_ACCESS_KEY_ID" not in env:
        # No credentials but those that a volume is given.
        kept = {k: v for k, v in kept.items() if not k.startswith(("AWS_ACCESS", "AWS_SECRET"))}
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=kept, cwd=os.sep
    )
