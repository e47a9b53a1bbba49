"""The keeper of a node, as a program: `python -m csi.keeper SOCKET`.

It is not restarted when the rest of the driver is upgraded, so it is as small as possible: the
standard library and `lazyfs/handover/keeper.py`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from lazyfs.escaping import escaped
from lazyfs.handover.keeper import Keeper, KeeperError
from lazyfs.process.privileges import leave_no_core_dump, protect_from_oom


def main(socket: Path) -> int:
    """Keep descriptors until SIGTERM or SIGINT; the exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        # The first process of a container is not ended by signals without a handler.
        signal.signal(number, lambda *_: os._exit(0))
    protect_from_oom()
    leave_no_core_dump()
    try:
        Keeper().serve_at(socket)
    except KeeperError as error:
        print(f"lazyfs-csi: {escaped(str(error))}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
