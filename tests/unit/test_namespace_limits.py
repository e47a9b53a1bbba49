"""How many volumes a namespace may have on a node."""

from __future__ import annotations

from pathlib import Path

import pytest

from csi.errors import RpcError
from csi.namespace_limits import VolumeLimit
from csi.node_records import Place, VolumeRecord


def test_a_volume_that_is_saved_during_another_call_counts() -> None:
    bound, saved = VolumeLimit(1), list[VolumeRecord]()
    place = Place("target", None, "asked", namespace="team", pod="p")
    with bound.one_more("team", "first", lambda: saved):
        second = bound.one_more("team", "second", lambda: saved)
        saved.append(VolumeRecord("first", {str(Path("/p")): place}))
    with pytest.raises(RpcError, match="has 1 volumes"), second:
        pass
    saved.clear()
    with bound.one_more("team", "second", lambda: saved):
        pass
