"""Finds the nodes of a fleet, and the DNS servers."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path

from lazyfs.errors import LazyfsError
from lazyfs.fleet.settings import FleetSettings

RESOLV_CONF = Path("/etc/resolv.conf")


class MembersError(LazyfsError):
    """The nodes of the fleet cannot be determined now."""


def members(settings: FleetSettings) -> list[str]:
    """The addresses of all nodes, sorted. Blocks. Raises MembersError."""
    if settings.members_file is not None:
        return _of_file(settings.members_file)
    assert settings.members_dns is not None
    try:
        found = socket.getaddrinfo(settings.members_dns, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise MembersError(f"{settings.members_dns}: {error.strerror or error}") from None
    # Doors must agree on the names of nodes: of a node with IPv4 and IPv6 addresses, one is used.
    family = ipaddress.ip_address(settings.address).version
    addresses = {str(each[4][0]).partition("%")[0] for each in found}
    return sorted(each for each in addresses if ipaddress.ip_address(each).version == family)


def _of_file(path: Path) -> list[str]:
    found = set()
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MembersError(f"{path}: {error}") from None
    for number, line in enumerate(lines, 1):
        word = line.partition("#")[0].strip()
        try:
            found |= {str(ipaddress.ip_address(word))} if word else set()
        except ValueError:
            raise MembersError(f"{path}, line {number}: {word!r} is not an IP address") from None
    return sorted(found)


def resolvers(settings: FleetSettings) -> list[str]:
    """The DNS servers for nginx, which does not read /etc/resolv.conf; empty if there are none."""
    if settings.resolvers:
        return list(settings.resolvers)
    try:
        lines = RESOLV_CONF.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        words = line.split()
        if words[:1] == ["nameserver"] and len(words) > 1:
            address = words[1].partition("%")[0]
            found.append(f"[{address}]" if ":" in address else address)
    return found
