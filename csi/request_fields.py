"""Checks fields of CSI requests against the specification. Pure.

The limits are those of spec.md, "Size Limits" (container-storage-interface/spec, v1.12.0).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from csi.csi_pb2 import VolumeCapability
from csi.errors import InvalidArgumentError

# Of a string, and of a map of strings.
LONGEST_TEXT_BYTES = 128
LARGEST_MAP_BYTES = 4096
# spec.md, CreateVolumeRequest.name: control characters other than white space.
_BANNED = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def has_control_characters(text: str) -> bool:
    """Whether a text has control characters other than white space."""
    return _BANNED.search(text) is not None


def check_text(what: str, text: str) -> None:
    """Refuse a required text that is empty, too long or has control characters.

    Raises:
        InvalidArgumentError: `what` names the field in the message.
    """
    if not text:
        raise InvalidArgumentError(f"{what} is missing")
    if len(text.encode()) > LONGEST_TEXT_BYTES:
        raise InvalidArgumentError(f"{what} is longer than {LONGEST_TEXT_BYTES} bytes")
    if has_control_characters(text):
        raise InvalidArgumentError(f"{what} has control characters: {text!r}")


def check_size(what: str, texts: Mapping[str, str]) -> None:
    """Refuse a map that is larger than the specification allows.

    Raises:
        InvalidArgumentError: `what` names the map in the message.
    """
    size = sum(len(key.encode()) + len(value.encode()) for key, value in texts.items())
    if size > LARGEST_MAP_BYTES:
        raise InvalidArgumentError(f"{what}: {size} bytes, more than {LARGEST_MAP_BYTES}")


def check_capability(capability: VolumeCapability) -> None:
    """Refuse any use of a volume other than as a filesystem.

    Every access mode is accepted: users often request ReadWriteOnce, and the mount is read-only in
    any case.

    Raises:
        InvalidArgumentError: block access, or a field is missing.
    """
    kind = capability.WhichOneof("access_type")
    if kind == "block":
        raise InvalidArgumentError(
            "block access is not possible: a lazyfs volume is a directory; "
            "use volumeMode: Filesystem"
        )
    if kind is None:
        raise InvalidArgumentError("volume_capability has no access type")
    mode = capability.access_mode.mode
    if mode not in VolumeCapability.AccessMode.Mode.values() or mode == 0:
        raise InvalidArgumentError("volume_capability has no access mode")
