"""The image that `make image` built, run without a daemon by buildah."""

from __future__ import annotations

import shutil
import subprocess

from manifests import ROOT

STORAGE = ROOT / "build" / "image"
TIMEOUT_S = 90


class Container:
    """A container of the image; each `run` is a process in its root directory, with the network of
    this machine."""

    def __init__(self, image: str) -> None:
        self.name = _buildah("from", "--pull-never", image).strip()

    def run(self, *command: str, env: dict[str, str] | None = None, user: str = "root") -> str:
        """The output of a command that may mount."""
        environment = [f"--env={key}={value}" for key, value in (env or {}).items()]
        return _buildah(
            "run",
            "--isolation=chroot",
            "--cap-add=CAP_SYS_ADMIN",
            "--volume=/dev/fuse:/dev/fuse",
            f"--user={user}",
            *environment,
            self.name,
            "--",
            *command,
        )

    def remove(self) -> None:
        _buildah("rm", self.name)


def built() -> str | None:
    """The name of the image; None if there is none."""
    if shutil.which("buildah") is None or not (STORAGE / "storage").exists():
        return None
    known = _buildah("images", "--noheading", "--format={{.Name}} {{.ID}}").splitlines()
    ids = [line.split()[1] for line in known if line.split()[0].endswith("/lazyfs")]
    return ids[0] if ids else None


def inspect(image: str) -> str:
    """What the image says of itself, as JSON."""
    return _buildah("inspect", "--type=image", image)


def _buildah(*arguments: str) -> str:
    command = ["buildah", "--root", STORAGE / "storage", "--runroot", STORAGE / "run", *arguments]
    answer = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert answer.returncode == 0, f"{' '.join(arguments)}: {answer.stdout}{answer.stderr}"
    return answer.stdout
