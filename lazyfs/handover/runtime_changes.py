"""What was done to a mount while it runs, for the worker that follows this one.

A small JSON file in memory, kept with the session (`lazyfs/handover/handover.py`) and gone with the
mount. Its fields may be missing: another version wrote it.
"""

from __future__ import annotations

import json
import os
from typing import Any

from lazyfs.memory_file import read_whole


class RuntimeChanges:
    """What is carried from worker to worker of one mount.

    Args:
        descriptor: of the memory file.

    Attributes:
        paused: nothing is to be fetched ahead (`lazyfs pause`).
        options: texts by option name, that were changed (`lazyfs set`).
        resumes: how often a worker took the mount up from another.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        fields: dict[str, Any] = json.loads(read_whole(descriptor) or b"{}")
        self.paused: bool = fields.get("paused", False)
        self.options: dict[str, str] = fields.get("options", {})
        self.resumes: int = fields.get("resumes", 0)

    def save(self) -> None:
        """Write it down as it is now."""
        fields = {"paused": self.paused, "options": self.options, "resumes": self.resumes}
        content = json.dumps(fields).encode()
        # In one call, over all that was there: whoever reads has the old or the new.
        size = os.fstat(self.descriptor).st_size
        os.pwrite(self.descriptor, content.ljust(size), 0)
