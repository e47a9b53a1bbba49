"""Ports of this machine for servers that must know theirs before they start."""

from __future__ import annotations

import random
import socket

# Below those that the kernel gives to outgoing connections (ip_local_port_range), one of which
# could otherwise take a port between this look and the server's start.
FIRST, LAST = 20000, 32000


def free_port() -> int:
    """A port at which nothing listens."""
    while True:
        port = random.randint(FIRST, LAST)
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:
            continue
