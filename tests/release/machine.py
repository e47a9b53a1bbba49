"""A machine with a fresh Debian: a tree of debootstrap, with systemd as its first process.

It is in namespaces of its own, but for the network, so that it reaches an S3 server of the tests.
What it writes lies above the tree (overlayfs) and is gone with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

CACHE = Path(os.environ.get("LAZYFS_RELEASE_CACHE", "~/.cache/lazyfs-release")).expanduser()
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
# Beyond debootstrap's minimum: what every installed machine has, and the package's dependency,
# which apt would bring.
PACKAGES = "systemd,systemd-sysv,dbus,procps,fuse3"
BOOT_S = 60
COMMAND_S = 120


class NoTreeError(Exception):
    """No tree of that release can be made here; the reason in words."""


def tree(suite: str) -> Path:
    """The tree of a release of Debian, made once and kept in `CACHE`. Raises NoTreeError."""
    place = CACHE / suite
    if place.exists():
        return place
    mirror = os.environ.get("MIRROR") or _mirror_of_apt()
    if shutil.which("debootstrap") is None or not Path(KEYRING).exists() or not mirror:
        raise NoTreeError("debootstrap, debian-archive-keyring or an archive is missing")
    CACHE.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=CACHE))
    try:
        answer = subprocess.run(
            ["debootstrap", "--variant=minbase", "--force-check-gpg", f"--keyring={KEYRING}",
             f"--include={PACKAGES}", suite, new, mirror],
            capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        if answer.returncode != 0:
            raise NoTreeError(f"debootstrap {suite}: {answer.stdout.splitlines()[-1]}")
        for archive in (new / "var/cache/apt/archives").glob("*.deb"):
            archive.unlink()
        new.chmod(0o755)
        new.rename(place)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return place


def _mirror_of_apt() -> str:
    """The archive where apt finds this machine's own release."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Identifier: Packages"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return next(iter(answer.stdout.split()), "")


class Machine:
    """A booted machine.

    Args:
        suite: a release of Debian.
        directory: an empty one, for what the machine writes.
    """

    def __init__(self, suite: str, directory: Path) -> None:
        self.root = directory / "root"
        for name in ("upper", "work", "root"):
            (directory / name).mkdir()
        layers = f"lowerdir={tree(suite)},upperdir={directory}/upper,workdir={directory}/work"
        subprocess.run(["mount", "-t", "overlay", "-o", layers, "overlay", self.root], check=True)
        self._cgroup = _cgroups() / f"lazyfs-release-{os.getpid()}-{suite}"
        self._cgroup.mkdir()
        enter = f"echo $$ > {self._cgroup}/cgroup.procs"
        unshare = "unshare --mount --pid --cgroup --uts --ipc --fork --kill-child=KILL"
        self._console = directory / "console"
        self._process = subprocess.Popen(
            ["sh", "-c", f'{enter}; exec {unshare} "$0" "$1"',
             Path(__file__).with_name("boot.sh"), self.root],
            stdout=self._console.open("wb"), stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            self.wait("systemctl is-system-running | grep -Eq 'running|degraded'", BOOT_S)
        except BaseException:
            self.stop()
            raise

    def run(
        self, command: str, *, user: str = "root", check: bool = True, timeout_s: float = COMMAND_S
    ) -> subprocess.CompletedProcess[str]:
        """A shell command on it.

        Args:
            user: who runs it, with a session's environment.
            check: raise AssertionError if it fails.
        """
        if user != "root":
            command = f"exec setpriv --reuid {user} --regid {user} --init-groups sh -c '{command}'"
        environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        home = "/root" if user == "root" else f"/home/{user}"
        answer = subprocess.run(
            [*self.enter(), "sh", "-c", command],
            env={**environment, "HOME": home, "DEBIAN_FRONTEND": "noninteractive"},
            capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        said = f"{command}: {answer.returncode}\n{answer.stdout}{answer.stderr}"
        assert not check or answer.returncode == 0, said
        return answer

    def enter(self) -> list[str]:
        """What runs a command on it."""
        first = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        (pid,) = first.split()
        return ["nsenter", f"--target={pid}", "--mount", "--pid", "--cgroup", "--uts", "--ipc",
                "--root", "env", "--chdir=/"]  # fmt: skip

    def wait(self, condition: str, timeout_s: float = COMMAND_S) -> None:
        """Until a shell command succeeds."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if self.run(condition, check=False).returncode == 0:
                    return
            except ValueError:
                pass  # it has no first process yet
            said = self._console.read_text(errors="replace")[-2000:]
            assert self._process.poll() is None, said
            assert time.monotonic() < deadline, f"{condition}\n{said}"
            time.sleep(0.2)

    def copy(self, file: Path, target: str) -> None:
        """Put a file there."""
        with open(file, "rb") as content:
            subprocess.run(
                [*self.enter(), "sh", "-c", f"cat > '{target}'"],
                stdin=content, check=True, timeout=COMMAND_S,
            )  # fmt: skip

    def files(self) -> set[str]:
        """All paths, but those of the kernel and what every machine writes as it runs."""
        places = "/etc /opt /usr /var /root /home /srv /run/lazyfs"
        found = self.run(f"find {places} -xdev 2>/dev/null; true").stdout.splitlines()
        passing = ("/var/lib/dpkg", "/var/log", "/var/cache/ldconfig", "/var/cache/man")
        return {path for path in found if not path.startswith(passing)}

    def stop(self) -> None:
        """Kill everything on it."""
        try:
            (self._cgroup / "cgroup.kill").write_text("1")
            self._process.wait(30)
        finally:
            subprocess.run(["umount", "--lazy", self.root], check=True)
            _remove(self._cgroup)


def _cgroups() -> Path:
    """Where the unified hierarchy of cgroups is. Raises NoTreeError: nowhere."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2" and os.access(place, os.W_OK):
            return Path(place)
    raise NoTreeError("there is no cgroup2 hierarchy to write to")


def _remove(cgroup: Path) -> None:
    deadline = time.monotonic() + BOOT_S
    for directory, _, _ in os.walk(cgroup, topdown=False):
        while True:
            try:
                Path(directory).rmdir()
                break
            except OSError:  # its last process is just ending
                assert time.monotonic() < deadline, directory
                time.sleep(0.1)
