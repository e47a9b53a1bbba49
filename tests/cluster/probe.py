"""What there is of the driver on the node, as JSON; run on the node, with any Python."""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

KUBELET = Path("/var/lib/kubelet")
PLUGIN = KUBELET / "plugins" / "csi.lazyfs.io"
STAGED = KUBELET / "plugins" / "kubernetes.io" / "csi" / "csi.lazyfs.io"


def mounts() -> list[str]:
    lines = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return [fields[1] for fields in lines if fields[2] == "fuse.lazyfs"]


def processes() -> list[dict[str, Any]]:
    """Of the driver's image, in pods; with their descriptors of FUSE and of credentials."""
    found = []
    for each in Path("/proc").iterdir():
        if not each.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it ended
            command = (each / "cmdline").read_bytes().rstrip(b"\0").decode().replace("\0", " ")
            pod = re.search(r"/pod([0-9a-f-]{36})", (each / "cgroup").read_text())
            if pod is None or not re.search(r"/opt/lazyfs/|lazyfs-csi", command):
                continue
            links = []
            for descriptor in (each / "fd").iterdir():
                with contextlib.suppress(OSError):
                    links.append(str(descriptor.readlink()))
            found.append(
                {
                    "pid": int(each.name),
                    "command": command,
                    "pod": pod.group(1),
                    "held": [it for it in links if it == "/dev/fuse" or it.startswith("/memfd:")],
                    "descriptors": len(links),
                }
            )
    return found


def places() -> list[str]:
    """Files and directories that the driver, and kubelet for it, keep for volumes."""
    own = [
        Path(directory) / name
        for directory, directories, files in os.walk(PLUGIN)  # a dead mount is passed over
        for name in directories + files
        if not name.endswith(".sock")
    ]
    staged = list(STAGED.iterdir()) if STAGED.exists() else []
    published = [
        path.parent
        for path in KUBELET.glob("pods/*/volumes/kubernetes.io~csi/*/vol_data.json")
        if json.loads(path.read_text()).get("driverName") == "csi.lazyfs.io"
    ]
    return sorted(map(str, own + staged + published))


if __name__ == "__main__":
    print(json.dumps({"mounts": mounts(), "processes": processes(), "places": places()}))
