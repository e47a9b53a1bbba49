"""Requests that a mover makes for a task: without a thread of this process.

Movers handle ordinary answers only. Every other answer is handed back for `signed_client.py`, which
may have to wait or to ask again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, MutableSequence, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from lazyfs.movers.call import MoverFaultError, MoverLostError, Nudge, error_of
from lazyfs.store import mover_requests, ranges
from lazyfs.store.cancel import Cancel
from lazyfs.store.http_answer import Answer
from lazyfs.store.request import Asked, Request
from lazyfs.store.signed_client import Client
from lazyfs.store.signing import SigningCredentials

if TYPE_CHECKING:
    from lazyfs.movers.pool import Movers

T = TypeVar("T")

_NO_BYTES = memoryview(b"")


class MovedRequests:
    """The requests of one client that movers can make for tasks."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @property
    def may_be_made(self) -> bool:
        """Whether movers may make requests now."""
        return self._movers(self._client.present_credentials) is not None

    async def ask(
        self,
        request: Request,
        handle: Callable[[Answer, bool], T],
        cancel: Cancel,
        ended: Callable[[], None],
    ) -> T | Asked | None:
        """Make a request.

        Args:
            ended: called when the mover is done, see `Movers.run`.

        Returns:
            What `handle` returns for an ordinary answer. Any other one is for `Client.ask`. None:
            the request was not made.
        """
        client = self._client
        try:
            credentials = client.present_credentials
            movers = self._movers(credentials)
            if movers is None or request.into is None:
                ended()
                return None
            headers = client.headers(request, credentials)
        except BaseException:
            ended()
            raise
        told: mover_requests.Told
        try:
            told = await movers.run(
                mover_requests.receive, client.endpoint.server, client.endpoint.authorities,
                client.refuse_local, request.method, request.target, headers,
                buffer=request.into, wire=cancel, ended=ended,
            )  # fmt: skip
        except OSError as error:
            return Asked(error, credentials)
        except (MoverLostError, MoverFaultError):
            return None
        return self._ordinary(
            told, request.into, lambda answer: handle(answer, False), cancel, credentials
        )

    async def ask_each(
        self,
        requests: Sequence[Request],
        buffers: MutableSequence[memoryview],
        handle: Callable[[int, memoryview, Answer], T],
        came: Callable[[Sequence[tuple[int, memoryview, T | Asked]]], None],
        nudge: Nudge,
        patience_s: float,
        ended: Callable[[], None],
    ) -> None:
        """Make several requests in one call, which differ in their ranges only.

        Args:
            buffers: for the body of each request. A buffer is taken out when it is told of.
            handle: gets the position of a request, its buffer, and the answer.
            came: called with the position of a request, its buffer, and what `ask` would return, of
                some requests at a time. It is not called with requests that were not made.
            nudge: sends `EACH` and `STOP` of `protocol.py` meanwhile.
            patience_s: after this time, in seconds, what is missing is cut off.
            ended: called when the mover is done, see `Movers.run`.
        """
        client = self._client
        try:
            credentials = client.present_credentials
            movers = self._movers(credentials)
            if movers is None:
                ended()
                return
            headers = client.headers(requests[0], credentials)
        except BaseException:
            ended()
            raise

        def tell(parts: Sequence[tuple[int, Any]]) -> None:
            found: list[tuple[int, memoryview, T | Asked]] = []
            for which, told in parts:
                into, buffers[which] = buffers[which], _NO_BYTES
                answer = error_of(told) if told and "kind" in told else told
                handle_it = partial(handle, which, into)
                found.append(
                    (which, into, self._ordinary(answer, into, handle_it, Cancel(), credentials))
                )
            came(found)

        try:
            rest = await movers.run(
                mover_requests.receive_each, client.endpoint.server, client.endpoint.authorities,
                client.refuse_local, requests[0].target, headers,
                [request.headers["Range"] for request in requests], patience_s,
                buffer=buffers, ended=ended, came=tell, nudge=nudge, parts=len(buffers),
            )  # fmt: skip
        except (MoverLostError, MoverFaultError, OSError):
            return
        tell(rest)

    def _movers(self, credentials: SigningCredentials | None) -> Movers | None:
        """The movers, if they may make a request now, with these credentials."""
        client = self._client
        may_move = client.can_sign_with(credentials) and client.is_moved(client.endpoint.server)
        return client.movers if may_move else None

    def _ordinary(
        self,
        told: mover_requests.Told,
        into: memoryview,
        handle: Callable[[Answer], T],
        cancel: Cancel,
        credentials: SigningCredentials | None,
    ) -> T | Asked:
        """Handle what a mover told of a request, if it is an ordinary answer; see `ask`."""
        if isinstance(told, dict) and told["filled"]:
            # Its status is that of a success, so it is no refusal and no redirect.
            with contextlib.suppress(
                ranges.ChangedError, ranges.OtherRangeError, ranges.IgnoresRangeError, OSError
            ):
                answer = mover_requests.understand(
                    told, self._client.transport, handle, cancel, into
                )
                self._client.worked(credentials)
                return answer
        return Asked(told, credentials)
