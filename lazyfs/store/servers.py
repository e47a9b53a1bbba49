"""The servers of one service: the endpoint, and those that redirects lead to."""

from __future__ import annotations

import ssl

from lazyfs.store.addresses import anywhere, may_be_redirected_to, must_be_elsewhere
from lazyfs.store.http import Transport, tls_context
from lazyfs.store.resolved_source import Endpoint
from lazyfs.store.signing import Signer

# How many servers that redirects led to are kept with their connections.
MOST_SERVERS = 16


class Servers:
    """Connections to each server, and a signer of requests for it.

    Args:
        endpoint: the one that the options name.
        refuse_local: addresses of this machine are not contacted.
    """

    def __init__(self, endpoint: Endpoint, *, refuse_local: bool) -> None:
        self._endpoint = endpoint
        self._refuse_local = refuse_local
        self._servers: dict[str, tuple[Transport, Signer]] = {}
        self._tls: ssl.SSLContext | None = None
        # How far the clock of the service is ahead of ours, if the service has refused our time.
        self._ahead_s = 0.0
        self.get(endpoint.server)

    def close_idle(self, longer_than_s: float) -> None:
        """Close connections that have been idle for this long."""
        for transport, _ in list(self._servers.values()):
            transport.close_idle(longer_than_s)

    def set_clock(self, ahead_s: float) -> None:
        """Sign with the time of the service, whose clock is ahead of ours by this."""
        self._ahead_s = ahead_s
        for _, signer in list(self._servers.values()):
            signer.ahead_s = ahead_s

    def get(self, server: str) -> tuple[Transport, Signer]:
        """Connections to a server, and the signer of requests for it."""
        found = self._servers.get(server)
        if found is None:
            if server.startswith("https:") and self._tls is None:
                self._tls = tls_context(self._endpoint.authorities)
            may_connect = must_be_elsewhere if self._refuse_local else anywhere
            if self._servers:
                first = next(iter(self._servers.values()))[0]
                if not self._refuse_local:
                    may_connect = lambda address: may_be_redirected_to(address, first.address)  # noqa: E731
                self._forget()
            transport = Transport(server, self._tls, self._endpoint.proxy, may_connect)
            found = transport, Signer(server, self._endpoint.region, self._endpoint.service)
            found[1].ahead_s = self._ahead_s
            self._servers[server] = found
        return found

    def _forget(self) -> None:
        """Drop a server if there are too many. The first one is the endpoint, which stays."""
        for server in list(self._servers)[1:]:
            if len(self._servers) < MOST_SERVERS:
                return
            if dropped := self._servers.pop(server, None):
                dropped[0].close_idle(0.0)
