"""A store of descriptors, in a process that does nothing else.

It keeps what must outlive a worker as descriptors: the kernel's side of the mount, and memory files
with the state that the next worker needs. A held descriptor stays open, so a mount whose worker
died waits for the next worker instead of failing.

The protocol. Each message on a `SOCK_SEQPACKET` unix socket is one JSON object of up to 64 KiB,
descriptors travel beside it as SCM_RIGHTS (unix(7)), and each request has one answer:

    {"do": "store", "name": N, "labels": [L, ...]} + descriptors   {}
    {"do": "fetch", "name": N}                                     {"labels": [...]} + descriptors
    {"do": "drop", "name": N}                                      {}
    {"do": "names", "after": N}                                    {"names": [...]}
    {"do": "only", "name": N, "fixed": [L, ...]}                   {}

An answer with `error` says what was wrong with the request. `store` adds descriptors to a name and
replaces those with equal labels; `fetch` of an unknown name returns no labels. `names` are sorted,
as many as fit into a message; `"more": true` says that others follow. After `only`, this connection
is restricted to that name, and cannot store the labels that are `fixed`: a supervisor does this
before it gives the connection to a worker.

This module imports only the standard library and knows nothing of FUSE: it is never upgraded under
running mounts, so it has to be small and final.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import stat
import struct
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

LONGEST_MESSAGE = 1 << 16
# Of one name; SCM_RIGHTS itself allows 253.
MOST_LABELS = 16
MOST_NAMES = 4096
LONGEST_NAME = 512
MOST_CLIENTS = 256
ANSWER_TIMEOUT_S = 10.0
PAUSE_S = 0.2


class KeeperError(Exception):
    """The keeper is not running, or refused a request."""


class Only(NamedTuple):
    """What a restricted connection is about, and the labels that it cannot store."""

    name: str
    fixed: frozenset[str]


class Keeper:
    """The kept descriptors. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[str, dict[str, int]] = {}
        self._clients = threading.BoundedSemaphore(MOST_CLIENTS)

    def serve_at(self, path: Path) -> None:
        """Serve on a unix socket, for ever. Answers only processes of this user and of root.

        Raises:
            KeeperError: the path is taken, or others can write to its directory.
        """
        allow_many_descriptors()
        with _listen(path) as listener:
            while True:
                try:
                    self._accept(listener)
                except (OSError, RuntimeError):
                    # Out of descriptors or threads for the moment: keep the descriptors.
                    time.sleep(PAUSE_S)

    def _accept(self, listener: socket.socket) -> None:
        """Answer one more client in a new thread.

        Raises:
            OSError, RuntimeError: no descriptor or thread is free now.
        """
        connection, _ = listener.accept()
        is_served = False
        try:
            if is_trusted(connection) and self._clients.acquire(blocking=False):
                serving = threading.Thread(
                    target=self._serve_client, args=[connection], daemon=True
                )  # fmt: skip
                try:
                    serving.start()
                    is_served = True
                finally:
                    if not is_served:
                        self._clients.release()
        finally:
            if not is_served:
                connection.close()

    def _serve_client(self, connection: socket.socket) -> None:
        try:
            self.serve(connection)
        finally:
            self._clients.release()

    def serve(self, connection: socket.socket, only: Only | None = None) -> None:
        """Answer one client until it hangs up.

        Args:
            only: what the connection is about; None: everything, until it asks for less.
        """
        with connection, contextlib.suppress(OSError):
            while True:
                data, received, flags, _ = socket.recv_fds(
                    connection, LONGEST_MESSAGE, MOST_LABELS + 1, socket.MSG_CMSG_CLOEXEC
                )
                if not data and not received:
                    return
                try:
                    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                        raise KeeperError("the message is too long")
                    answer, descriptors, only = self._answer(data, received, only)
                except (KeeperError, OSError) as error:
                    answer, descriptors = {"error": str(error)}, []
                finally:
                    _close(received)
                try:
                    socket.send_fds(connection, [json.dumps(answer).encode()], descriptors)
                finally:
                    _close(descriptors)

    def _answer(
        self, data: bytes, received: list[int], only: Only | None
    ) -> tuple[dict[str, Any], list[int], Only | None]:
        """The answer to a message, descriptors to send with it, and what is allowed from now on.

        The caller owns both lists.
        """
        try:
            message = json.loads(data)
            action, name = message["do"], message.get("name")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise KeeperError("not a request") from None
        if only is not None and (name != only.name or action in ("names", "only")):
            raise KeeperError(f"this connection is restricted to {only.name}")
        if action == "names":
            return self._names(message.get("after") or ""), [], only
        if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME:
            raise KeeperError("a request needs a name")
        if action == "store":
            labels = _texts(message.get("labels"))
            if only is not None and (fixed := only.fixed.intersection(labels)):
                raise KeeperError(f"this connection cannot store {', '.join(sorted(fixed))}")
            self._store(name, labels, received)
        elif action == "fetch":
            with self._lock:
                kept = self._kept.get(name, {})
                return {"labels": list(kept)}, _duplicates(kept.values()), only
        elif action == "drop":
            with self._lock:
                _close(self._kept.pop(name, {}).values())
        elif action == "only":
            only = Only(name, frozenset(_texts(message.get("fixed", []))))
        else:
            raise KeeperError(f"no such request: {action!r}")
        return {}, [], only

    def _names(self, after: Any) -> dict[str, Any]:
        if not isinstance(after, str):
            raise KeeperError("names are texts")
        with self._lock:
            known = sorted(name for name in self._kept if name > after)
        names: list[str] = []
        room = LONGEST_MESSAGE // 2
        for name in known:
            room -= len(json.dumps(name)) + 2
            if room < 0:
                break
            names.append(name)
        return {"names": names} | ({"more": True} if len(names) < len(known) else {})

    def _store(self, name: str, labels: list[str], received: list[int]) -> None:
        if len(labels) != len(received) or len(set(labels)) != len(labels):
            raise KeeperError(f"{len(labels)} labels for {len(received)} descriptors")
        with self._lock:
            if name not in self._kept and len(self._kept) >= MOST_NAMES:
                raise KeeperError(f"{MOST_NAMES} names are kept already")
            kept = self._kept.get(name, {})
            if len(kept.keys() | set(labels)) > MOST_LABELS:
                raise KeeperError(f"{name}: more than {MOST_LABELS} labels")
            added = dict(zip(labels, _duplicates(received), strict=True))
            _close(kept[label] for label in kept.keys() & added.keys())
            self._kept[name] = {**kept, **added}


class KeeperClient:
    """A connection to a keeper.

    Args:
        connection: a SOCK_SEQPACKET socket; the client owns it from now on.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(ANSWER_TIMEOUT_S)
        self._connection = connection
        self._lock = threading.Lock()

    @classmethod
    def connect(cls, path: Path) -> KeeperClient:
        """Raises KeeperError when no keeper answers there."""
        return cls(connect(path))

    def store(self, name: str, descriptors: Mapping[str, int]) -> None:
        """Store copies of descriptors under a name, each with a label."""
        self._ask({"do": "store", "name": name, "labels": [*descriptors]}, [*descriptors.values()])

    def fetch(self, name: str) -> dict[str, int]:
        """The descriptors under a name, by label; maybe none. The caller closes them."""
        answer, descriptors = self._ask({"do": "fetch", "name": name})
        return dict(zip(answer["labels"], descriptors, strict=True))

    def drop(self, name: str) -> None:
        """Forget a name and close its descriptors."""
        self._ask({"do": "drop", "name": name})

    def names(self) -> list[str]:
        """All names with kept descriptors."""
        names: list[str] = []
        more = True
        while more:
            answer, _ = self._ask({"do": "names", "after": names[-1] if names else ""})
            names += answer["names"]
            more = answer.get("more", False)
        return names

    def close(self) -> None:
        """Close the connection. The stored descriptors stay."""
        self._connection.close()

    def _ask(
        self, message: dict[str, Any], descriptors: list[int] | None = None
    ) -> tuple[dict[str, Any], list[int]]:
        with self._lock:
            return _ask(self._connection, message, descriptors or [])


def restrict_to(connection: socket.socket, name: str, fixed: Iterable[str] = ()) -> None:
    """Restrict a connection to one name, from now on.

    Args:
        fixed: the labels that cannot be stored over this connection.

    Raises:
        KeeperError: it does not; a keeper of a version before this cannot.
    """
    _ask(connection, {"do": "only", "name": name, "fixed": list(fixed)}, [])


def _ask(
    connection: socket.socket, message: dict[str, Any], descriptors: list[int]
) -> tuple[dict[str, Any], list[int]]:
    try:
        socket.send_fds(connection, [json.dumps(message).encode()], descriptors)
        data, received, _, _ = socket.recv_fds(
            connection, LONGEST_MESSAGE, MOST_LABELS, socket.MSG_CMSG_CLOEXEC
        )
    except OSError as error:
        raise KeeperError(f"the keeper does not answer: {error}") from error
    try:
        answer = json.loads(data or '{"error": "the keeper hung up"}')
        if "error" in answer:
            raise KeeperError(answer["error"])
    except BaseException as error:
        _close(received)
        if isinstance(error, ValueError):
            raise KeeperError("the keeper's answer is not valid") from error
        raise
    return answer, received


def connect(path: Path) -> socket.socket:
    """A connection to the keeper at a path. Raises KeeperError if none answers."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(ANSWER_TIMEOUT_S)
    try:
        connection.connect(str(path))
    except OSError as error:
        connection.close()
        raise KeeperError(f"no keeper at {path}: {error.strerror}; is it running?") from error
    return connection


def private_directory(directory: Path) -> None:
    """Make a directory that only this user can write to, if it does not exist.

    Raises:
        PermissionError: it exists, and others can write to it.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not is_private(directory):
        raise PermissionError(
            f"{directory}: is not a directory that only this user can write to; "
            "chmod go-w it, or remove it"
        )


def is_private(directory: Path) -> bool:
    """Whether a path is a directory of this user that no other user can write to."""
    try:
        status = directory.lstat()
    except OSError:
        return False
    is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    return is_ours and not status.st_mode & 0o022


def is_trusted(connection: socket.socket) -> bool:
    """Whether the peer is a process of this user or of root (unix(7), SO_PEERCRED)."""
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    )
    return uid in (0, os.geteuid())


def _listen(path: Path) -> socket.socket:
    try:
        private_directory(path.parent)
        if _answers(path):
            raise KeeperError(f"{path}: another keeper answers there; end it first")
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(mask)
        listener.listen(MOST_CLIENTS)
    except OSError as error:
        raise KeeperError(f"{path}: {error}") from error
    return listener


def _answers(path: Path) -> bool:
    try:
        KeeperClient.connect(path).close()
    except KeeperError:
        return False
    return True


def allow_many_descriptors() -> None:
    """Raise the limit of open descriptors to the hard limit: each mount needs several."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _texts(labels: Any) -> list[str]:
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise KeeperError("labels must be a list of texts")
    return labels


def _duplicates(descriptors: Iterable[int]) -> list[int]:
    """Duplicates of all. Raises OSError, with none made, if there is no room for all."""
    made: list[int] = []
    try:
        for descriptor in descriptors:
            made.append(os.dup(descriptor))  # noqa: PERF401 - what was made must be known
    except OSError:
        _close(made)
        raise
    return made


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
