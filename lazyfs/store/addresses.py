"""Which servers may be contacted, and which of them get the signatures of one service."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from urllib.parse import urlsplit


class BadAddressError(Exception):
    """A host name resolves to an address that must not be connected to."""


class BadRedirectError(BadAddressError):
    """A redirect leads to a server that must not be connected to."""


def anywhere(address: str) -> None:
    """Allow every address: the options name the endpoint."""


def may_be_redirected_to(address: str, from_address: str | None) -> None:
    """Check that a server may redirect us to another server with this address.

    An endpoint must not make us contact what only this machine can reach: its metadata service, or,
    if the endpoint itself is not on this machine, services on the loopback device.

    Raises:
        BadRedirectError: it may not.
    """
    target = ipaddress.ip_address(address)
    target = getattr(target, "ipv4_mapped", None) or target
    ours = from_address is not None and ipaddress.ip_address(from_address).is_loopback
    if (
        target.is_link_local
        or target.is_multicast
        or target.is_unspecified
        or (target.is_loopback and not ours)
    ):
        raise BadRedirectError(f"a redirect to the address {address} is not followed")


def must_be_elsewhere(address: str) -> None:
    """Check that an address belongs to another machine, as far as this one knows.

    Raises:
        BadAddressError: it is link-local, a loopback address, or one of this machine.
    """
    ours = "link-local addresses and addresses of this machine are not contacted"
    target = ipaddress.ip_address(address)
    target = getattr(target, "ipv4_mapped", None) or target
    if target.is_link_local or target.is_loopback or target.is_multicast or target.is_unspecified:
        raise BadAddressError(ours)
    family = socket.AF_INET if target.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((str(target), 9))  # sends nothing
        # Packets that a machine sends to itself have equal source and destination addresses.
        if ipaddress.ip_address(probe.getsockname()[0]) == target:
            raise BadAddressError(ours)


def is_same_service(ours: str, other: str) -> bool:
    """Whether two servers belong to one service, so that both may get its signatures."""
    one, two = urlsplit(ours), urlsplit(other)
    if one.netloc == two.netloc:
        return True
    a, b = one.hostname or "", two.hostname or ""
    of_aws = (".amazonaws.com", ".amazonaws.com.cn")
    if a.endswith(of_aws) and b.endswith(of_aws):
        return True
    # BUCKET.HOST and HOST, on the same port.
    return one.port == two.port and (a.endswith(f".{b}") or b.endswith(f".{a}"))
