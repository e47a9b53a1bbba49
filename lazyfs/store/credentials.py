"""Credentials given for a mount, as its worker gets them. Only the standard library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class StaticCredentials:
    """Access keys. Temporary ones have a session token."""

    access_key_id: str = field(repr=False)
    secret_access_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class WebIdentity:
    """A token that STS exchanges for temporary keys of a role (AssumeRoleWithWebIdentity)."""

    role_arn: str
    session_name: str
    token: str = field(repr=False)


Credentials = StaticCredentials | WebIdentity
_FORMS: tuple[type[StaticCredentials] | type[WebIdentity], ...] = (StaticCredentials, WebIdentity)


def credentials_from(fields: Mapping[str, Any]) -> Credentials:
    """Make credentials from their fields, as returned by `asdict`.

    Raises:
        ValueError: no kind of credentials has these fields; the message contains no value.
    """
    for form in _FORMS:
        try:
            credentials = form(**fields)
        except TypeError:
            continue
        if all(isinstance(value, str | None) for value in asdict(credentials).values()):
            return credentials
    raise ValueError(f"not credentials: {', '.join(sorted(fields))}")
