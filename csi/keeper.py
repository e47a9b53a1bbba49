"""The keeper of a node, as a program: `python -m csi.keeper SOCKET`.

It is not restarted when the rest of the driver is upgraded, so it is as small as possible: the
standard library and `lazyfs/handover/keeper.py`.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from lazyfs.end_signals import EndSignals, end_signals
from lazyfs.escaping import escaped
from lazyfs.handover.keeper import Keeper, KeeperError
from lazyfs.process.privileges import leave_no_core_dump, protect_from_oom


def main(socket: Path) -> int:
    """Keep descriptors until SIGTERM or SIGINT; the exit code."""
    # The first process of a container is not ended by signals without a handler.
    with end_signals() as signals:
        ending = threading.Thread(target=_end_with, args=[signals], daemon=True)
        ending.start()
        protect_from_oom()
        leave_no_core_dump()
        try:
            Keeper().serve_at(socket)
        except KeeperError as error:
            print(f"lazyfs-csi: {escaped(str(error))}", file=sys.stderr)
        finally:  # a thread that still runs while the interpreter ends prints its own error
            signals.wake()
            ending.join()
    return 1


def _end_with(signals: EndSignals) -> None:
    if signals.wait() is not None:
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
