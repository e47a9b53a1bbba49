"""Real clients on real mounts: `make loaders`, which docs/LOADERS.md has the table of.

For each client, in turns: a directory on the local disk whose pages the kernel has dropped, and a
new mount whose cache is empty. Both must give the same weights. In one more
round strace shows the system calls that fail on the mount: only lookups of names may.

    main.py                all clients, medians of 3
    main.py --rounds 1 -k runai
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import boto3  # noqa: E402
from mounting import Mounted  # noqa: E402
from s3 import CREDENTIALS  # noqa: E402
from servers import ACCESS, KINDS, SECRET, is_there, running  # noqa: E402

PLACE = Path(os.environ.get("LAZYFS_LOADERS", Path.home() / ".cache" / "lazyfs-loaders"))
PYTHON = PLACE / "venv" / "bin" / "python"
BUCKET, MODEL = "models", "llm"
READY_S = 900
# What a loader may ask in vain for: files that a model may have and this one has not.
LOOKUPS = {"open", "openat", "stat", "lstat", "newfstatat", "statx", "access", "faccessat2"}


@dataclass(frozen=True)
class Client:
    """A client, and what it loads.

    Attributes:
        name: of `clients.py`.
        label: in the table.
    """

    name: str
    label: str

    def is_like(self, words: list[str]) -> bool:
        """Whether its name has one of these words."""
        return any(word in self.name for word in words)


CLIENTS = (
    Client("transformers", "transformers, `from_pretrained`"),
    Client("safetensors", "safetensors, `safe_open` (mmap)"),
    Client("safetensors_read", "safetensors, whole files read"),
    Client("runai", "Run:ai streamer"),
)


@dataclass(frozen=True)
class Loaded:
    """A load: seconds, and what was loaded."""

    seconds: float
    digest: str


class Trial:
    """Everything that rounds share: the models on disk and in S3.

    Args:
        root: a directory for the run.
        endpoint: of S3.
    """

    def __init__(self, root: Path, endpoint: str) -> None:
        self.root, self.endpoint = root, endpoint
        self.models = root / "models"
        self._mounts = 0

    def make(self) -> None:
        """Make the model, and put it into S3."""
        subprocess.run([PYTHON, HERE / "models.py", self.models], check=True, env=_environment())
        s3 = boto3.client(
            "s3", endpoint_url=self.endpoint, aws_access_key_id=ACCESS,
            aws_secret_access_key=SECRET, region_name="us-east-1",
        )  # fmt: skip
        CREDENTIALS.update(AWS_ACCESS_KEY_ID=ACCESS, AWS_SECRET_ACCESS_KEY=SECRET)
        s3.create_bucket(Bucket=BUCKET)
        for path in self.models.rglob("*"):
            if path.is_file():
                s3.upload_file(str(path), BUCKET, str(path.relative_to(self.models)))

    def local(self, client: Client) -> Loaded:
        """Load from the disk, cold."""
        os.sync()
        for path in self.models.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return self._load(client, self.models / MODEL)

    def mounted(self, client: Client, *, strace: Path | None = None) -> Loaded:
        """Load from a mount that was made just now, with an empty cache."""
        with self._mount() as mount:
            return self._load(client, mount.path, strace)

    @contextlib.contextmanager
    def _mount(self) -> Iterator[Mounted]:
        self._mounts += 1
        place, cache = (self.root / f"{name}{self._mounts}" for name in ("mount", "cache"))
        mount = Mounted(f"s3://{BUCKET}/{MODEL}", place, cache, self.endpoint)
        try:
            yield mount
        finally:
            mount.end()

    def _load(self, client: Client, directory: Path, strace: Path | None = None) -> Loaded:
        traced: list[str] = []
        if strace is not None:
            traced = ["strace", "-f", "--seccomp-bpf", "-y", "-Z", "-qq", "-o", str(strace)]
        done = subprocess.run(
            [*traced, PYTHON, HERE / "clients.py", client.name, directory],
            capture_output=True, text=True, timeout=READY_S, env=_environment(), check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise SystemExit(f"{client.name} from {directory}: {done.stderr[-3000:]}")
        said = json.loads(done.stdout.splitlines()[-1])
        return Loaded(said["load_s"], said["digest"])


def _environment() -> dict[str, str]:
    """Of a client: nothing may come from the network, and nothing is sent there."""
    own = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own}


def failures(trace: Path, mountpoint: str) -> set[tuple[str, str]]:
    """System calls that failed on a mount, with their errors."""
    found = set()
    for line in trace.read_text(errors="replace").splitlines():
        failed = re.search(r"^\d+ +(?:<\.\.\. )?(\w+).* = -1 (E\w+)", line)
        if failed and mountpoint in line:
            found.add((failed[1], failed[2]))
    return found


def check(trial: Trial, client: Client, wanted: str) -> str:
    """Trace a load from a mount; which calls failed on it."""
    trace = trial.root / "trace"
    loaded = trial.mounted(client, strace=trace)
    assert loaded.digest == wanted, f"{client.name}: another digest under strace"
    failed = failures(trace, str(trial.root / f"mount{trial._mounts}"))
    strange = {(call, error) for call, error in failed
               if not (call in LOOKUPS and error == "ENOENT")}  # fmt: skip
    # A link is looked for at each file, and a terminal behind each open one, on any filesystem.
    strange -= {("readlink", "EINVAL"), ("readlink", "ENOENT"), ("ioctl", "ENOTTY")}
    return ", ".join(sorted(f"{call}: {error}" for call, error in strange)) or "lookups only"


def main() -> int:
    """Run the clients; prints the table; 0 if all of them held."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("-k", action="append", metavar="WORD", help="only clients with WORD")
    given = arguments.parse_args()
    kind = next(each for each in (KINDS["versitygw"], KINDS["moto"]) if is_there(each))
    short = 0
    with tempfile.TemporaryDirectory(prefix="lazyfs-loaders-") as name:
        root = Path(name)
        (root / "s3").mkdir()
        with running(kind, root / "s3", None) as port:
            trial = Trial(root, f"http://127.0.0.1:{port}")
            clients = [each for each in CLIENTS if not given.k or each.is_like(given.k)]
            trial.make()
            print("| loader | local | mount | failed calls |\n|---|---|---|---|", flush=True)
            for client in clients:
                rounds = [(trial.local(client), trial.mounted(client))
                          for _ in range(given.rounds)]  # fmt: skip
                digests = {loaded.digest for pair in rounds for loaded in pair}
                calls = check(trial, client, rounds[0][0].digest)
                same = len(digests) == 1
                short += not same or calls != "lookups only"
                local, mounted = (
                    statistics.median(pair[at].seconds for pair in rounds) for at in (0, 1)
                )
                print(f"| {client.label} | {local:.2f} s | {mounted:.2f} s | {calls}"
                      f"{'' if same else '; OTHER WEIGHTS'} |", flush=True)  # fmt: skip
    return int(short > 0)


if __name__ == "__main__":
    sys.exit(main())
