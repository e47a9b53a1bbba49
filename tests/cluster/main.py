"""`make cluster` and `make cluster-down`: see docs/TESTING.md.

main.py run|down [ARGUMENTS OF PYTEST]
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from cluster import HERE, ROOT, Cluster, ClusterError

CACHE = Path(
    os.environ.get("LAZYFS_CLUSTER")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lazyfs-cluster"
)
# Programs and the packages of Debian that have them.
NEEDED = {
    "ip": "iproute2",
    "dnsmasq": "dnsmasq-base",
    "buildah": "buildah",
    "debootstrap": "debootstrap",
    "gcc": "gcc",
    "openssl": "openssl",
    "pgrep": "procps",
    "unshare": "util-linux",
}


def prepare() -> None:
    """Check what the machine must have, and install what it can have by apt-get."""
    missing = [package for program, package in NEEDED.items() if shutil.which(program) is None]
    if not Path("/usr/include/seccomp.h").exists():
        missing.append("libseccomp-dev")
    if missing:
        if shutil.which("apt-get") is None:
            raise ClusterError(f"please install {' '.join(missing)} (names as in Debian)")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends"]):
            subprocess.run(
                ["apt-get", *command, *(missing if command[0] == "install" else [])],
                check=True, env=environment, stdout=subprocess.DEVNULL, timeout=600,
            )  # fmt: skip


def build() -> None:
    for script in ("build.sh", "images.sh"):
        if subprocess.run([HERE / script, str(CACHE)], check=False).returncode != 0:
            raise ClusterError(f"tests/cluster/{script} failed; logs are in {CACHE}/logs")


def test(cluster: Cluster, arguments: list[str]) -> int:
    command = [sys.executable, "-m", "pytest", str(HERE), *arguments]
    inside = cluster.namespaces("plane").command(command, "n")
    environment = {**os.environ, "LAZYFS_CLUSTER": str(CACHE)}
    return subprocess.run(inside, check=False, cwd=ROOT, env=environment).returncode


def timed(what: str, since: float) -> float:
    now = time.monotonic()
    print(f"cluster: {what} after {now - since:.0f} s", flush=True)
    return now


def main(command: str = "", *arguments: str) -> int:
    if command not in ("run", "down"):
        raise ClusterError("main.py run|down [ARGUMENTS OF PYTEST]")
    if os.geteuid() != 0:
        raise ClusterError("a cluster needs root: sudo make cluster")
    CACHE.mkdir(parents=True, exist_ok=True)
    lock = (CACHE / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ClusterError("`make cluster` runs on this machine already") from None
    cluster = Cluster(CACHE)
    if command == "down":
        cluster.down()
        return 0
    # ^C and a service manager's SIGTERM: take everything down first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    keep = bool(os.environ.get("KEEP"))
    started = time.monotonic()
    try:
        prepare()
        build()
        built = timed("built", started)
        cluster.up()
        up = timed("up, the node is Ready", built)
        status = test(cluster, list(arguments))
        timed("tested", up)
        return status
    except BaseException:
        keep = False
        raise
    finally:
        if keep:
            print(f"cluster: kept. In its network:\n"
                  f"    nsenter -t {cluster.namespaces('plane').pid} -n env "
                  f"KUBECONFIG={cluster.kubeconfig} PATH={CACHE}/bin:$PATH bash\n"
                  f"cluster: make cluster-down ends it")  # fmt: skip
        else:
            cluster.down()


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except ClusterError as error:
        sys.exit(f"cluster: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
