"""Changes made to a running mount, for the next worker.

A small JSON file in memory, kept with the session (`lazyfs/handover/handover.py`) and gone with the
mount. Fields may be missing, because another version may have written it.
"""

from __future__ import annotations

import json
import os
from typing import Any

from lazyfs.memory_file import read_whole


class RuntimeChanges:
    """Changes that all later workers of one mount apply.

    Args:
        descriptor: the memory file.

    Attributes:
        paused: prefetching is paused (`lazyfs pause`).
        options: changed options, text by name (`lazyfs set`).
        resumes: how often a worker resumed the mount.
        compared: what the last comparison with S3 showed (`lazyfs/control/snapshot.py`).
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        fields: dict[str, Any] = json.loads(read_whole(descriptor) or b"{}")
        self.paused: bool = fields.get("paused", False)
        self.options: dict[str, str] = fields.get("options", {})
        self.resumes: int = fields.get("resumes", 0)
        self.compared: dict[str, Any] = fields.get("compared", {})

    def save(self) -> None:
        """Write the current state to the memory file."""
        fields = {
            "paused": self.paused,
            "options": self.options,
            "resumes": self.resumes,
            "compared": self.compared,
        }
        content = json.dumps(fields).encode()
        # With one call over the old content: a reader gets either the old or the new state.
        size = os.fstat(self.descriptor).st_size
        os.pwrite(self.descriptor, content.ljust(size), 0)
