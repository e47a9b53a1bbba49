"""The condition of a volume at a path, for kubelet (NodeGetVolumeStats)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csi import mounts
from csi.daemons import Daemons
from csi.node_records import Place
from csi.snapshots import doubts, told


@dataclass(frozen=True, slots=True)
class Condition:
    """The condition of a volume.

    Attributes:
        trouble: what is wrong, in words; None if nothing is known to be wrong.
        status: the status of its daemon's worker; None if no daemon answers.
    """

    trouble: str | None
    status: dict[str, Any] | None

    @property
    def message(self) -> str:
        """The condition as text."""
        if self.trouble:
            return self.trouble
        return told(self.status["snapshot"]) if self.status else "the volume is served"


def condition_of(path: Path, place: Place, daemons: Daemons) -> Condition:
    """The condition of the volume at a place."""
    if place.daemon is None:
        return Condition(None, None)
    daemon = daemons.get(place.daemon)
    if daemon is None:
        return Condition("its daemon is gone", None)
    status, trouble = daemon.report()
    troubles = [trouble] if trouble else []
    if status is not None and (is_old := doubts(status["snapshot"])):
        troubles.append(is_old)
    if place.is_mounted and daemon.device and not mounts.shows(path, daemon.device):
        troubles.append(f"it is not mounted at {path} any more")
    if place.renewed is not None:
        troubles.append(
            f"it was mounted again at {place.renewed}: containers that started before have the "
            "old mount, which is dead, unless they have mountPropagation HostToContainer; "
            "delete the pod"
        )
    return Condition("; ".join(troubles) or None, status)
