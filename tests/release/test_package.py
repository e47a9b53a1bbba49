"""The Debian package on fresh machines: installed, used in all ways, upgraded, removed, purged."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from machine import Machine
from release_files import MODEL
from s3 import CREDENTIALS

from lazyfs import __version__

pytestmark = pytest.mark.timeout(900)

SIZE = len(MODEL["m/weights.bin"])
KEYS = " ".join(f"{name}={value}" for name, value in CREDENTIALS.items())
# Has a file of the model open until it is told to end.
USER = "while [ ! -e /tmp/enough ]; do sleep 0.2; done < /srv/model/weights.bin"
# Reads all of it until it is told to end, and says how often it could.
READER = """
count=0
while [ ! -e /tmp/enough ]; do
    [ "$(cat /srv/model/weights.bin | wc -c)" = SIZE ] || { echo "could not read" >&2; exit 1; }
    count=$((count + 1)); echo $count > /tmp/count
done
"""


def install(machine: Machine, package: Path) -> None:
    machine.copy(package, "/root/lazyfs.deb")
    machine.run("dpkg --install /root/lazyfs.deb")


def read(machine: Machine, path: str, user: str = "root") -> int:
    return int(machine.run(f"cat {path}/weights.bin | wc -c", user=user).stdout)


def configure(machine: Machine, endpoint: str, name: str = "model") -> None:
    lines = [
        'source = "s3://release/m"',
        'mountpoint = "/srv/model"',
        f'endpoint-url = "{endpoint}"',
        "allow-other = true",
    ]
    text = "\n".join(lines)
    machine.run(f"mkdir -p /srv/model && cat > /etc/lazyfs/{name}.toml <<END\n{text}\nEND")
    variables = "\n".join(f"{key}={value}" for key, value in CREDENTIALS.items())
    machine.run(
        f"cat > /etc/lazyfs/{name}.env <<END\n{variables}\nEND\nchmod 600 /etc/lazyfs/*.env"
    )


def test_the_package_is_installed_and_used(machine: Machine, package: Path, endpoint: str) -> None:
    """By hand, as an ordinary user, by mount(8) and by fstab."""
    install(machine, package)
    assert machine.run("lazyfs --version").stdout.split()[-1] == __version__
    assert machine.run("dpkg-query -W -f '${Version}' lazyfs").stdout == __version__
    machine.run("mkdir -p /srv/model /home/ann/model && chown ann /home/ann/model")
    options = f"--endpoint-url {endpoint}"
    machine.run(f"{KEYS} lazyfs mount s3://release/m /srv/model {options}")
    assert read(machine, "/srv/model") == SIZE
    machine.run("lazyfs umount /srv/model")

    runtime = "XDG_RUNTIME_DIR=/run/user/1000"
    mount = f"lazyfs mount s3://release/m /home/ann/model {options}"
    machine.run(f"env {KEYS} {runtime} {mount}", user="ann")
    assert read(machine, "/home/ann/model", user="ann") == SIZE
    machine.run(f"env {runtime} lazyfs umount /home/ann/model", user="ann")

    more = f"endpoint-url={endpoint},allow_other"
    machine.run(f"{KEYS} mount -t lazyfs s3://release/m /srv/model -o {more}")
    assert read(machine, "/srv/model", user="ann") == SIZE
    machine.run("umount /srv/model")
    machine.run(f"echo 's3://release/m /srv/model lazyfs {more},noauto,_netdev 0 0' >> /etc/fstab")
    machine.run(f"{KEYS} mount /srv/model")
    assert read(machine, "/srv/model") == SIZE
    machine.run("umount /srv/model")


def test_its_service(machine: Machine, package: Path, endpoint: str) -> None:
    """Ready when the mount is; others see the mount; a failure says why; stopping unmounts."""
    install(machine, package)
    configure(machine, endpoint)
    machine.run("systemctl enable --now lazyfs@model")
    assert read(machine, "/srv/model", user="ann") == SIZE
    status = machine.run("systemctl show lazyfs@model -p StatusText -p SubState").stdout
    assert "SubState=running" in status
    assert "StatusText=Serving s3://release/m at /srv/model" in status
    worker = machine.run("lazyfs status --json /srv/model").stdout
    machine.run("systemctl reload lazyfs@model")
    assert machine.run("lazyfs status --json /srv/model").stdout != worker
    assert read(machine, "/srv/model") == SIZE
    machine.run("systemctl stop lazyfs@model")
    assert machine.run("mountpoint -q /srv/model", check=False).returncode != 0

    machine.run("sed -i s,release/m,release/absent, /etc/lazyfs/model.toml")
    assert machine.run("systemctl start lazyfs@model", check=False).returncode != 0
    said = machine.run("journalctl --no-pager --unit lazyfs@model").stdout
    assert "s3://release/absent" in said
    machine.run("systemctl stop lazyfs@model")


def test_an_upgrade_goes_on_under_a_reader(
    machine: Machine, before: Path, package: Path, endpoint: str
) -> None:
    install(machine, before)
    configure(machine, endpoint)
    machine.run("systemctl start lazyfs@model")
    assert "0.0.9" in machine.run("lazyfs status /srv/model --json").stdout
    of_ann = f"env {KEYS} XDG_RUNTIME_DIR=/run/user/1000 lazyfs"
    options = f"--endpoint-url {endpoint}"
    machine.run("mkdir ~/model", user="ann")
    machine.run(f"{of_ann} mount s3://release/m ~/model {options}", user="ann")
    reader = subprocess.Popen(
        [*machine.enter(), "sh", "-c", READER.replace("SIZE", str(SIZE))],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    machine.wait("[ -s /tmp/count ]")
    install(machine, package)
    assert __version__ in machine.run("lazyfs status /srv/model --json").stdout
    status = machine.run(f"{of_ann} status /home/ann/model --json", user="ann").stdout
    assert __version__ in status and "0.0.9" not in status
    assert read(machine, "/home/ann/model", user="ann") == SIZE
    machine.run("cp /tmp/count /tmp/then")
    machine.wait("[ $(cat /tmp/count) -gt $(($(cat /tmp/then) + 1)) ]")
    machine.run("touch /tmp/enough")
    assert reader.wait(60) == 0, reader.stderr and reader.stderr.read()
    assert machine.run("systemctl is-active lazyfs@model").stdout.strip() == "active"


def test_removal_says_what_is_in_use_and_purge_leaves_nothing(
    machine: Machine, package: Path, endpoint: str
) -> None:
    there = machine.files()
    install(machine, package)
    configure(machine, endpoint)
    machine.run("systemctl start lazyfs@model")
    assert read(machine, "/srv/model") == SIZE
    assert machine.run("find /var/cache/lazyfs -type f -size +1M").stdout
    reader = subprocess.Popen([*machine.enter(), "sh", "-c", USER])
    machine.wait("ls -l /proc/[0-9]*/fd/0 2>/dev/null | grep -q /srv/model")
    refused = machine.run("dpkg --remove lazyfs", check=False)
    assert refused.returncode != 0
    assert "/srv/model" in refused.stderr and "used by" in refused.stderr
    assert read(machine, "/srv/model") == SIZE
    machine.run("touch /tmp/enough")
    assert reader.wait(60) == 0

    machine.run("dpkg --remove lazyfs")
    assert "fuse.lazyfs" not in machine.run("cat /proc/mounts").stdout
    assert machine.run("ls /var/cache/lazyfs").stdout
    assert machine.run("ls /etc/lazyfs").stdout.split() == [
        "example.toml",
        "model.env",
        "model.toml",
    ]
    machine.run("dpkg --purge lazyfs")
    machine.run("rm /root/lazyfs.deb; rmdir /srv/model")
    assert machine.files() - there == set()
