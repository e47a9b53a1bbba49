"""The metrics of one mount on a TCP port, for Prometheus."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import trio

from lazyfs.control import Route
from lazyfs.control.server import serve_http, still_open
from lazyfs.errors import MountError

log = logging.getLogger(__name__)

Address = tuple[str, int]
# A killed worker may keep its port until its last thread returns from the kernel.
AGAIN_S = 2.0


async def listen(address: Address) -> list[trio.SocketListener]:
    """Listen on a host (empty: all addresses) and port.

    Raises:
        MountError: the address is in use or not permitted.
    """
    host, port = address
    try:
        return await trio.open_tcp_listeners(port, host=host or None)
    except OSError as error:
        raise MountError(
            f"--metrics-address: {host}:{port}: cannot listen there: {error}; choose another port"
        ) from error


async def listen_patiently(address: Address) -> list[trio.SocketListener]:
    """The same, for a mount that continues without metrics until the address is free."""
    told = False
    while True:
        try:
            return await listen(address)
        except MountError as error:
            if not told:
                log.warning("%s; trying again", error)
                told = True
            await trio.sleep(AGAIN_S)


async def serve_metrics(
    address: Address,
    listeners: list[trio.SocketListener],
    routes: Mapping[tuple[str, str], Route],
) -> None:
    """Answer scrapes until cancelled.

    Args:
        listeners: on the address. If there are none, or they are closed, new ones are made as
            soon as the address is free.
        routes: `GET /metrics`.
    """
    listeners = still_open(listeners) or await listen_patiently(address)
    shown = [":".join(map(str, one.socket.getsockname()[:2])) for one in listeners]
    log.info("metrics at http://%s/metrics", shown[0])
    await serve_http(listeners, routes)
