"""The bench: lazyfs beside what people use today, in one run, on one machine.

    make bench    or    python bench/run.py [--size 2GiB] [--repeat 3] [--profiles ...]

For each origin (see `origin.py`) a model is loaded by each contender, in turns, several times;
what is shown is the median. Prints a table and writes `bench/results/results.json` and
`results.svg`. Needs root, Debian's nginx with Lua, and for the peers rclone and s3fs.

Contenders:

    limit       parallel ranged GETs, thrown away; the best of 16 and 32 in flight
    download    parallel ranged GETs into files, then a load from there (the time of both)
    lazyfs      cold: nothing cached; warm: a new mount, the cache on disk; hot: the same mount,
                once more
    rclone, s3fs, and mount-s3, geesefs, goofys where they are on PATH
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import origin as origins
from model import write_model

from lazyfs.kinds import parse_size

HERE = Path(__file__).parent
Result = dict[str, Any]
TIMEOUT_S = 900


class Bench:
    """One run against one origin."""

    def __init__(self, origin: origins.Origin, source: Path, base: Path) -> None:
        self.origin = origin
        self.source = source
        self.base = base
        self.env = origins.environment()
        self.mountpoint = base / "mnt"
        self.mountpoint.mkdir(exist_ok=True)

    def load(self, directory: Path, mode: str = "vllm") -> Result:
        """Load a model directory in a process of its own."""
        result = self.python("load.py", mode, directory)
        return {**result, "seconds": result["ended"] - result["opened"]}

    def python(self, script: str, *arguments: object) -> Result:
        """Run one of the bench's programs; its line of JSON."""
        answer = subprocess.run(
            [sys.executable, HERE / script, *map(str, arguments)],
            capture_output=True, text=True, timeout=TIMEOUT_S, env=self.env, check=False,
        )  # fmt: skip
        if answer.returncode != 0:
            raise SystemExit(f"bench: {script}: exit {answer.returncode}: {answer.stderr.strip()}")
        result: Result = json.loads(answer.stdout)
        return result

    def limit(self) -> Iterator[tuple[str, Result]]:
        runs = [
            self.python("fetch.py", "raw", self.origin.url, self.source, count)
            for count in (16, 32)
        ]
        yield "limit", min(runs, key=lambda run: float(run["seconds"]))

    def download(self) -> Iterator[tuple[str, Result]]:
        target = self.base / "downloaded"
        shutil.rmtree(target, ignore_errors=True)
        fetched = self.python("fetch.py", "download", self.origin.url, self.source, 32, target)
        loaded = self.load(target)
        yield (
            "download, then load",
            {**loaded, "seconds": fetched["seconds"] + loaded["seconds"],
             "daemon_cpu_s": fetched["cpu_s"], "peak_mib": fetched["peak_mib"]},
        )  # fmt: skip
        yield "local file, hot", self.load(target)
        drop_page_cache(target)
        yield "local file, cold", self.load(target)
        shutil.rmtree(target)

    def lazyfs(self) -> Iterator[tuple[str, Result]]:
        cache = self.base / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        with self.lazyfs_mount(cache) as measure:
            yield "lazyfs, cold", measure("vllm")
            time.sleep(3)  # the last blocks are on their way to the disk
            yield "lazyfs, hot", measure("vllm")
        drop_page_cache(cache)
        with self.lazyfs_mount(cache) as measure:
            yield "lazyfs, warm", measure("vllm")
        for mode in ("sequential", "direct", "threads"):
            shutil.rmtree(cache, ignore_errors=True)
            with self.lazyfs_mount(cache) as measure:
                yield f"lazyfs, cold, {mode}", measure(mode)
        with self.lazyfs_mount(None) as measure:
            yield "lazyfs, cold, no disk", measure("vllm")

    @contextlib.contextmanager
    def lazyfs_mount(self, cache: Path | None) -> Iterator[Callable[[str], Result]]:
        """Mount; gives a function that loads and measures."""
        command = [sys.executable, "-m", "lazyfs"]
        began = time.perf_counter()
        subprocess.run(
            [*command, "mount", f"s3://{origins.BUCKET}/{self.source.name}", self.mountpoint,
             f"--endpoint-url={self.origin.url}", f"--cache-dir={cache or 'none'}",
             f"--log-file={self.base / 'lazyfs.log'}"],
            check=True, timeout=60, env=self.env,
        )  # fmt: skip
        mounted_s = time.perf_counter() - began
        pid = daemon_of(self.mountpoint)

        def measure(mode: str) -> Result:
            self.origin.mark()
            cpu = cpu_seconds(pid)
            result = self.load(self.mountpoint, mode)
            requests = self.origin.requests()
            return {
                **result,
                "mount_s": mounted_s,
                "daemon_cpu_s": cpu_seconds(pid) - cpu,
                "peak_mib": peak_mib(pid),
                "gets": requests.gets,
                "fetched_over_needed": requests.bytes / result["bytes"],
            }

        try:
            yield measure
        finally:
            subprocess.run(
                [*command, "umount", self.mountpoint], check=True, timeout=60, env=self.env
            )

    def peers(self) -> Iterator[tuple[str, Result]]:
        remote = f"{origins.BUCKET}/{self.source.name}"
        rclone = [
            "rclone", "mount", f":s3:{remote}", self.mountpoint, "--read-only",
            "--s3-provider=Other", f"--s3-endpoint={self.origin.url}", "--s3-env-auth",
            f"--cache-dir={self.base / 'rclone'}",
        ]  # fmt: skip
        tuned = ["--vfs-cache-mode=full", "--vfs-read-ahead=512M", "--buffer-size=64M"]
        s3fs = [
            "s3fs", f"{origins.BUCKET}:/{self.source.name}", self.mountpoint, "-f",
            "-o", f"url={self.origin.url}", "-o", "use_path_request_style,ro,no_check_certificate",
            "-o", "parallel_count=32,multipart_size=8",
        ]  # fmt: skip
        aws = f"--endpoint-url={self.origin.url}"
        contenders: dict[str, list[Any]] = {
            "rclone, full cache": [*rclone, *tuned],
            "s3fs, 32 parallel": s3fs,
            "mount-s3": ["mount-s3", "-f", "--read-only", "--force-path-style", aws,
                         f"--prefix={self.source.name}/", origins.BUCKET, self.mountpoint],
            "geesefs": ["geesefs", "-f", "--endpoint", self.origin.url, remote.replace("/", ":"),
                        self.mountpoint],
            "goofys": ["goofys", "-f", "--endpoint", self.origin.url, remote.replace("/", ":"),
                       self.mountpoint],
        }  # fmt: skip
        for name, command in contenders.items():
            if shutil.which(command[0]):
                with self.foreground_mount(command) as process:
                    result = self.load(self.mountpoint)
                    yield name, {**result, "peak_mib": peak_mib(process.pid),
                                 "daemon_cpu_s": cpu_seconds(process.pid)}  # fmt: skip
                shutil.rmtree(self.base / "rclone", ignore_errors=True)

    @contextlib.contextmanager
    def foreground_mount(self, command: list[Any]) -> Iterator[subprocess.Popen[bytes]]:
        """Run a peer's mount in the foreground until the end of the block."""
        env = {**self.env, "AWSACCESSKEYID": "bench", "AWSSECRETACCESSKEY": "bench"}
        with open(self.base / "peer.log", "wb") as log:
            process = subprocess.Popen(list(map(str, command)), env=env, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 30
            while not is_mounted(self.mountpoint):
                if process.poll() is not None or time.monotonic() > deadline:
                    text = (self.base / "peer.log").read_text()[-300:]
                    raise SystemExit(f"bench: {command[0]} did not mount: {text}")
                time.sleep(0.05)
            yield process
        finally:
            subprocess.run(["umount", "-l", self.mountpoint], check=False, capture_output=True)
            origins.stop(process)


def drop_page_cache(directory: Path) -> None:
    """Let the kernel forget all files below a directory."""
    os.sync()
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def touch_all_memory() -> None:
    """Use all free memory once: a virtual machine gets it from its host only then, slowly."""
    size = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 9 // 10
    code = "import mmap; m = mmap.mmap(-1, {0})\nfor at in range(0, {0}, 4096): m[at] = 1"
    subprocess.run([sys.executable, "-c", code.format(size)], check=True, timeout=TIMEOUT_S)


def is_mounted(path: Path) -> bool:
    return any(line.split()[4] == str(path) for line in open("/proc/self/mountinfo"))


def daemon_of(mountpoint: Path) -> int:
    """The worker that serves a mountpoint."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes().split(b"\0")
                if b"lazyfs.mount.worker" in words and str(mountpoint).encode() in words:
                    return int(process.name)
    raise SystemExit("bench: lazyfs does not run")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return 0.0


def medians(runs: list[Result]) -> Result:
    """The median of every number of several runs."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def table(profile: str, results: dict[str, Result]) -> str:
    """Results of one origin as a Markdown table."""
    limit = results["limit"]["seconds"]
    lines = [
        f"\n### {profile}\n",
        "| | seconds | GB/s | of the limit | client CPU s/GB | peak MiB | GETs | fetched/needed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, run in results.items():
        size = run["bytes"] / 1e9
        cpu = run.get("daemon_cpu_s", run["cpu_s"]) / size
        cells = [
            f"{run['seconds']:.2f}", f"{size / run['seconds']:.2f}",
            f"{limit / run['seconds']:.2f}", f"{cpu:.2f}",
            f"{run['peak_mib']:.0f}" if "peak_mib" in run else "",
            f"{run['gets']:.0f}" if "gets" in run else "",
            f"{run['fetched_over_needed']:.3f}" if "gets" in run else "",
        ]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(everything: dict[str, dict[str, Result]], path: Path) -> None:
    """Bars of GB/s for each origin, if matplotlib is there."""
    try:
        import matplotlib

        matplotlib.use("svg")
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    figure, axes = pyplot.subplots(1, len(everything), figsize=(6 * len(everything), 6))
    for axis, (profile, results) in zip([axes] if len(everything) == 1 else axes,
                                        everything.items(), strict=True):  # fmt: skip
        names = list(results)[::-1]
        rates = [results[name]["bytes"] / results[name]["seconds"] / 1e9 for name in names]
        colours = ["tab:blue" if name.startswith("lazyfs") else "lightgrey" for name in names]
        bars = axis.barh(names, rates, color=colours)
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.set_title(profile)
        axis.set_xlabel("GB/s, mapped load (more is better)")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description="lazyfs beside what people use today")
    parser.add_argument("--size", default="2GiB", type=parse_size)
    parser.add_argument("--shards", default=8, type=int)
    parser.add_argument("--repeat", default=3, type=int)
    parser.add_argument("--profiles", nargs="+", default=list(origins.PROFILES))
    parser.add_argument("--only", nargs="+", default=["limit", "download", "lazyfs", "peers"])
    parser.add_argument("--results", default=HERE / "results", type=Path)
    arguments = parser.parse_args()
    arguments.results.mkdir(exist_ok=True, parents=True)
    everything: dict[str, dict[str, Result]] = {}
    with tempfile.TemporaryDirectory(prefix="lazyfs-bench-", dir="/var/tmp") as temporary:
        base = Path(temporary)
        served, source = base / "served", base / "served" / "model"
        write_model(source, arguments.size, arguments.shards)
        touch_all_memory()
        for profile in arguments.profiles:
            runs: defaultdict[str, list[Result]] = defaultdict(list)
            with origins.serve(served, profile) as origin:
                bench = Bench(origin, source, base)
                for repeat in range(arguments.repeat):
                    for part in arguments.only:
                        for name, result in getattr(bench, part)():
                            runs[name].append(result)
                            said = f"{profile}, {repeat + 1}: {name}: {result['seconds']:.2f} s"
                            print(said, file=sys.stderr, flush=True)
            everything[profile] = {name: medians(many) for name, many in runs.items()}
            print(table(profile, everything[profile]), flush=True)
    (arguments.results / "results.json").write_text(json.dumps(everything, indent=1))
    plot(everything, arguments.results / "results.svg")


if __name__ == "__main__":
    main()
