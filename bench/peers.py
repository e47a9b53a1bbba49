"""Other programs that mount buckets, each with the settings that loaded a model fastest here.

The programs are searched in `.venv/peers/bin`, where `bench/install` puts them, then on PATH.
Missing ones are left out. docs/BENCHMARKS.md says which settings were tried, and why these were
chosen.

JuiceFS cannot read a bucket that it has not written. It gets a copy of the model in its own format,
in the same bucket, made before the measurements.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crc32c
import origin as origins
from accounting import device_of, group, is_mounted
from mounts import Mounted, Place

PROGRAMS = Path(__file__).parent.parent / ".venv" / "peers" / "bin"
READY_TIMEOUT_S = 60
JUICEFS = "juicefs"  # its volume, and the folder of the bucket that it is in
GIB = 1 << 30

Command = list[Any]


@dataclass(frozen=True, slots=True)
class Peer:
    """A program that stays in the foreground while it serves a mount.

    Attributes:
        program: name of the executable.
        command: returns its arguments for a place.
        keeps: whether it has a disk cache that a new mount uses. Mountpoint empties its cache at
            mount and at unmount.
        whole: it mounts more than the prefix, which is then a folder in the mount.
        folder: folder of the bucket with its own copy.
        version_words: its arguments to print its version.
    """

    name: str
    program: str
    command: Callable[[Place], Command]
    keeps: bool = True
    whole: bool = False
    folder: str = ""
    version_words: tuple[str, ...] = ("--version",)

    @property
    def path(self) -> str | None:
        """Path of the executable; None if it is missing."""
        return _program(self.program)

    def version(self) -> str:
        """The version in the first line of its output."""
        answer = subprocess.run(
            [str(self.path), *self.version_words], capture_output=True, text=True, timeout=30
        )
        found = re.search(r"[vV]?(\d+\.\d[\w.+-]*)", answer.stdout + answer.stderr)
        return f"{self.name} {found[1] if found else '(no version)'}"

    @contextlib.contextmanager
    def mount(self, place: Place) -> Iterator[Mounted]:
        """Mount for the duration of the `with` block."""
        log = place.state.parent / f"{self.name}.log"
        words = [str(self.path), *map(str, self.command(place))]
        with group(place.mountpoint.name) as counted, contextlib.ExitStack() as stack:
            output = stack.enter_context(open(log, "wb"))
            began = time.monotonic()
            process = subprocess.Popen(
                words, env=_environment(place.origin), stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, cwd=place.state.parent, preexec_fn=counted.enter,
            )  # fmt: skip
            stack.callback(origins.stop, process)
            stack.callback(_unmount, place.mountpoint)
            while not is_mounted(place.mountpoint):
                if process.poll() is not None or time.monotonic() - began > READY_TIMEOUT_S:
                    raise SystemExit(f"bench: {self.name} did not mount: {log.read_text()[-800:]}")
                time.sleep(0.005)
            _set_read_ahead(place.mountpoint)
            directory = place.mountpoint / (place.prefix if self.whole else "")
            yield Mounted(began, time.monotonic(), counted.cpu_seconds(), counted, directory)


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{PROGRAMS}:{os.environ.get('PATH', '')}")


def _set_read_ahead(mountpoint: Path) -> None:
    """Set read-ahead to 1 MiB, like lazyfs, instead of 128 KiB. Each peer gains by it."""
    device = device_of(mountpoint)
    name = f"{os.major(device)}:{os.minor(device)}"
    Path(f"/sys/class/bdi/{name}/read_ahead_kb").write_text("1024")


def _unmount(mountpoint: Path) -> None:
    subprocess.run(["umount", mountpoint], check=False, capture_output=True, timeout=60)
    if is_mounted(mountpoint):
        subprocess.run(["umount", "-l", mountpoint], check=True, timeout=60)


def _environment(origin: origins.Origin | None = None) -> dict[str, str]:
    certificate = origin.certificate if origin else None
    return {
        **origins.environment(certificate),
        # For programs in Go.
        **({"SSL_CERT_FILE": str(certificate)} if certificate else {}),
        "AWSACCESSKEYID": "bench",
        "AWSSECRETACCESSKEY": "bench",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _rclone(place: Place) -> Command:
    """rclone records what its cache holds when it closes a file: here sooner than after 5 s."""
    return [
        "mount", f":s3:{origins.BUCKET}/{place.prefix}", place.mountpoint, "--read-only",
        "--s3-provider=Other", f"--s3-endpoint={place.origin.url}", "--s3-env-auth",
        f"--cache-dir={place.state}", "--config=/dev/null", "--use-server-modtime",
        "--vfs-cache-mode=full", "--vfs-read-ahead=512M", "--buffer-size=0",
        "--vfs-read-chunk-size=8M", "--vfs-read-chunk-streams=16", "--vfs-handle-caching=1s",
    ]  # fmt: skip


def _s3fs(place: Place) -> Command:
    return [
        f"{origins.BUCKET}:/{place.prefix}", place.mountpoint, "-f",
        "-o", f"url={place.origin.url},use_path_request_style,ro,no_check_certificate",
        "-o", f"use_cache={place.state},kernel_cache,parallel_count=64,multipart_size=8",
    ]  # fmt: skip


def _mountpoint(place: Place) -> Command:
    """The settings go into a file, because the library's own program takes no arguments."""
    manifest, config = place.state.parent / "manifest.csv", place.state.parent / "mountpoint.json"
    rows, whole = [], 0
    directory = place.origin.directory / place.prefix
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        key = path.relative_to(directory).as_posix()
        etag, size = f'"{origins.etag(path)}"', path.stat().st_size
        fields = key.encode() + etag.encode() + size.to_bytes(8)
        whole = crc32c.crc32c(fields, whole)
        rows.append([key, etag, size, _base64(crc32c.crc32c(fields))])
    with open(manifest, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    settings = {
        "config_version": "0.0.1",
        "mountpoint": str(place.mountpoint),
        "region": "us-east-1",
        "endpoint_url": place.origin.url,
        "throughput_config": {"type": "Explicit", "throughput": 100.0},
        "memory_limit_bytes": 2 * GIB,
        "metadata_store_dir": str(place.state.parent),
        "event_log_dir": str(place.state.parent),
        "loglevel": "warn",
        "disk_cache": {"path": str(place.state)},
        "channels": [
            {
                "directory_name": place.prefix,
                "bucket_name": origins.BUCKET,
                "prefix": f"{place.prefix}/",
                "manifest_path": str(manifest),
                "manifest_checksum": _base64(whole),
            }
        ],
    }
    config.write_text(json.dumps(settings))
    return ["--config", config]


def _mount_s3(place: Place) -> Command:
    return [
        origins.BUCKET, place.mountpoint, "--foreground", "--read-only", "--force-path-style",
        f"--endpoint-url={place.origin.url}", f"--prefix={place.prefix}/",
        "--maximum-throughput-gbps=100",
    ]  # fmt: skip


def _geesefs(place: Place) -> Command:
    return [
        "-f", "-o", "ro", "--endpoint", place.origin.url, "--memory-limit=2000",
        "--read-ahead-large=262144",
        f"{origins.BUCKET}:{place.prefix}", place.mountpoint,
    ]  # fmt: skip


def _goofys(place: Place) -> Command:
    return ["-f", "-o", "ro", "--endpoint", place.origin.url, f"{origins.BUCKET}:{place.prefix}",
            place.mountpoint]  # fmt: skip


def _base64(checksum: int) -> str:
    return base64.b64encode(checksum.to_bytes(4)).decode()


def _juicefs(place: Place) -> Command:
    return [
        "mount", _juicefs_metadata(place.origin.directory), place.mountpoint, "--read-only",
        f"--cache-dir={place.state}", "--no-usage-report", "--no-bgjob", "--buffer-size=1024",
        "--max-fuse-io=1M", "--max-readahead=256", "--prefetch=3", "--verify-cache-checksum=none",
    ]  # fmt: skip


def _juicefs_metadata(served: Path) -> str:
    return f"sqlite3://{served.parent / 'juicefs.db'}"


PEERS = (
    Peer("rclone", "rclone", _rclone, version_words=("version",)),
    Peer("s3fs", "s3fs", _s3fs),
    Peer("mountpoint", "mount_from_config", _mountpoint, keeps=False, whole=True),
    Peer("juicefs", "juicefs", _juicefs, whole=True, folder=JUICEFS, version_words=("version",)),
    Peer("mount-s3", "mount-s3", _mount_s3, keeps=False),
    Peer("geesefs", "geesefs", _geesefs, keeps=False),
    Peer("goofys", "goofys", _goofys, keeps=False),
)


def prepare_juicefs(served: Path, prefix: str) -> None:
    """Copy a model of the bucket into a JuiceFS volume in the same bucket.

    The volume is written directly into the directory of the bucket.
    """
    metadata, path = _juicefs_metadata(served), str(_program("juicefs"))
    for words in (
        ["format", "--storage=file", f"--bucket={served}/", "--trash-days=0", metadata, JUICEFS],
        ["sync", f"{served / prefix}/", f"jfs://META/{prefix}/"],
    ):
        subprocess.run(
            [path, *words, "--no-agent"], env={**_environment(), "META": metadata}, check=True,
            capture_output=True, timeout=600,
        )  # fmt: skip


def point_juicefs_at(origin: origins.Origin) -> None:
    """Make the volume read from an origin."""
    subprocess.run(
        [str(_program("juicefs")), "config", _juicefs_metadata(origin.directory), "--storage=s3",
         f"--bucket={origin.url}/{origins.BUCKET}", "--access-key=bench", "--secret-key=bench",
         "--force", "--yes"],
        env=_environment(origin), check=True, capture_output=True, timeout=60,
    )  # fmt: skip
