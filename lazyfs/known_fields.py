"""Reads stored records of this version or another, whose fields may be more or fewer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any


def known_fields(record: type, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The stored fields that a dataclass has; a newer version may have stored others, too."""
    return {each.name: stored[each.name] for each in fields(record) if each.name in stored}
