"""The image that `make image` built, run without a daemon by buildah."""

from __future__ import annotations

import json
import shutil
import subprocess

from manifests import ROOT
from programs import account_of

STORAGE = ROOT / "build" / "image"
TIMEOUT_S = 90
# What a runtime does for a container of the node plugin: devices, and the directory of the node
# ($2) with propagation Bidirectional. Only mounts below that are seen outside.
START = """
mount --make-private "$1"
for each in dev proc sys; do mount --rbind /$each "$1/$each"; done
mkdir -p "$1$2" "$1$3"
mount --rbind "$2" "$1$2"
[ ! -d "$4" ] || mount --bind "$4" "$1$3"
root=$1; shift 4
exec chroot "$root" /usr/bin/tini -s -- "$@"
"""
SERVICE_ACCOUNT = "/run/secrets/kubernetes.io/serviceaccount"


class Container:
    """A container of the image; each `run` is a process in its root directory, with the network of
    this machine."""

    def __init__(self, image: str) -> None:
        self._image = image
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

    def start(self, arguments: list[str], env: dict[str, str]) -> list[str]:
        """The command that starts a program of the driver (`rehearsal.Launcher`)."""
        config = json.loads(inspect(self._image))["OCIv1"]["config"]
        variables = dict(each.split("=", 1) for each in config["Env"])
        env.update(variables)
        account = account_of(env)
        directory = str(account.parent)
        root = _buildah("mount", self.name).strip()
        unshare = ["unshare", "--mount", "--propagation=unchanged", "bash", "-ec", START, "start"]
        given = account if "KUBERNETES_SERVICE_HOST" in env else "-"
        return [*unshare, root, directory, SERVICE_ACCOUNT, str(given), *arguments]

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
