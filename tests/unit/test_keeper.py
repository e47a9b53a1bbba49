"""The keeper: what it keeps, and whom it does not believe."""

from __future__ import annotations

import json
import os
import resource
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from mounting import descriptors

from lazyfs.handover.handover import (
    OF_SUPERVISOR,
    Beginning,
    Handover,
    new_carried,
    new_in_hand,
    new_near,
)
from lazyfs.handover.keeper import (
    LONGEST_MESSAGE,
    MOST_LABELS,
    Keeper,
    KeeperClient,
    KeeperError,
    Only,
    restrict_to,
)
from lazyfs.handover.runtime_changes import RuntimeChanges
from lazyfs.memory_file import memory_file, read_whole
from lazyfs.process.mount_spec import MountSpec


def connection_to(keeper: Keeper) -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    threading.Thread(target=keeper.serve, args=[ours], daemon=True).start()
    theirs.settimeout(10)
    return theirs


@pytest.fixture
def keeper() -> Keeper:
    return Keeper()


@pytest.fixture
def client(keeper: Keeper) -> Iterator[KeeperClient]:
    client = KeeperClient(connection_to(keeper))
    yield client
    client.close()


def contents(kept: dict[str, int]) -> dict[str, bytes]:
    found = {label: read_whole(descriptor) for label, descriptor in kept.items()}
    for descriptor in kept.values():
        os.close(descriptor)
    return found


def test_stored_descriptors_can_be_fetched_by_other_clients(
    keeper: Keeper, client: KeeperClient
) -> None:
    for labels in ({"a": b"1", "b": b"2"}, {"b": b"3", "c": b"4"}):
        client.store("volume", {key: memory_file(key, value) for key, value in labels.items()})
    client.close()
    other = KeeperClient(connection_to(keeper))
    assert other.names() == ["volume"]
    for _ in range(2):
        assert contents(other.fetch("volume")) == {"a": b"1", "b": b"3", "c": b"4"}
    other.drop("volume")
    assert (other.names(), other.fetch("volume")) == ([], {})
    other.drop("volume")


def test_a_worker_s_connection_is_about_its_own_name(keeper: Keeper, client: KeeperClient) -> None:
    client.store("theirs", {"spec": memory_file("theirs", b"secret")})
    connection = connection_to(keeper)
    restrict_to(connection, "ours")
    worker = KeeperClient(connection)
    worker.store("ours", {"spec": memory_file("ours", b"ours")})
    assert contents(worker.fetch("ours")) == {"spec": b"ours"}
    attempts: list[Callable[[], object]] = [
        worker.names,
        lambda: worker.fetch("theirs"),
        lambda: worker.store("theirs", {}),
        lambda: worker.drop("theirs"),
        lambda: restrict_to(connection, "theirs"),
    ]
    for attempt in attempts:
        with pytest.raises(KeeperError, match="restricted to ours"):
            attempt()
    assert contents(client.fetch("theirs")) == {"spec": b"secret"}
    worker.close()


def test_a_worker_cannot_change_what_its_supervisor_obeys(
    keeper: Keeper, client: KeeperClient
) -> None:
    spec = MountSpec("s3://ours", "/ours", {"cache-dir": "/ours"})
    client.store("ours", {"spec": spec.to_descriptor(), "fuse": memory_file("fuse", b"")})
    connection = connection_to(keeper)
    restrict_to(connection, "ours", OF_SUPERVISOR)
    worker = KeeperClient(connection)
    other = MountSpec("s3://ours", "/ours", {"cache-dir": "/etc"}).to_descriptor()
    for labels in ({"spec": other}, {"fuse": other, "lock": other}, {"log": other}):
        with pytest.raises(KeeperError, match="cannot store"):
            worker.store("ours", labels)
    for release in (lambda: restrict_to(connection, "ours"), lambda: names_of(connection, "ours")):
        with pytest.raises(KeeperError, match="restricted to ours"):
            release()
    kept = worker.fetch("ours")
    with pytest.raises(PermissionError):
        os.pwrite(kept["spec"], b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(kept["spec"], 0)
    worker.store("ours", {"fuse": memory_file("fuse", b"newer"), "listing": memory_file("x", b"")})
    kept = client.fetch("ours")
    assert MountSpec.from_descriptor(kept["spec"]) == spec
    assert set(kept) == {"spec", "fuse", "listing"}
    worker.close()


def test_a_connection_can_be_restricted_from_the_start(keeper: Keeper) -> None:
    """That of a worker that was started before it was known what to mount."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    only = Only("ours", frozenset(OF_SUPERVISOR))
    threading.Thread(target=keeper.serve, args=[ours, only], daemon=True).start()
    worker = KeeperClient(theirs)
    with pytest.raises(KeeperError, match="restricted to ours"):
        worker.fetch("theirs")
    with pytest.raises(KeeperError, match="cannot store spec"):
        worker.store("ours", {"spec": memory_file("x", b"x")})
    worker.close()


def names_of(connection: socket.socket, name: str) -> None:
    """Ask for the names of all mounts in a message that has the allowed name."""
    connection.send(json.dumps({"do": "names", "name": name}).encode())
    answer = json.loads(connection.recv(1 << 16))
    raise KeeperError(answer.get("error", f"told {answer}"))


def test_descriptors_do_not_leak(client: KeeperClient) -> None:
    before = descriptors(os.getpid())
    for _ in range(20):
        descriptor = memory_file("x", b"x")
        client.store("n", {"label": descriptor})
        os.close(descriptor)
        contents(client.fetch("n"))
        with pytest.raises(KeeperError):
            client.store("n", {str(number): 0 for number in range(MOST_LABELS + 1)})
        client.drop("n")
    assert descriptors(os.getpid()) <= before + 1


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (b"no json", "not a request"),
        (b"[" * 60_000, "not a request"),
        (b'"store"', "not a request"),
        (b"{}", "not a request"),
        (b'{"do": "explode", "name": "x"}', "no such request"),
        (b'{"do": "fetch"}', "needs a name"),
        (b'{"do": "fetch", "name": ["x"]}', "needs a name"),
        (b'{"do": "fetch", "name": "%s"}' % (b"x" * 1000), "needs a name"),
        (b'{"do": "store", "name": "x", "labels": 3}', "must be a list"),
        (b'{"do": "store", "name": "x", "labels": ["a"]}', "1 labels for 0"),
        (b" " * (LONGEST_MESSAGE + 10) + b"{}", "too long"),
    ],
)
def test_malformed_requests_are_answered(keeper: Keeper, message: bytes, complaint: str) -> None:
    with connection_to(keeper) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        for _ in range(2):
            connection.send(message)
            assert complaint in connection.recv(1000).decode()
        connection.send(b'{"do": "names"}')
        assert connection.recv(1000) == b'{"names": []}'


def test_at_a_socket(tmp_path: Path) -> None:
    """Its socket is private, a second keeper is refused, and a stale socket is taken over."""
    path = tmp_path / "run" / "keeper"
    code = (
        "import pathlib, sys\n"
        "from lazyfs.handover.keeper import Keeper, KeeperError\n"
        "try: Keeper().serve_at(pathlib.Path(sys.argv[1]))\n"
        "except KeeperError as error: sys.exit(str(error))"
    )
    command = [sys.executable, "-c", code, path]
    for _ in range(2):
        process = subprocess.Popen(command)
        try:
            client = connect(path)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            client.store("x", {"y": 0})
            second = subprocess.run(
                command, capture_output=True, text=True, timeout=30, check=False
            )
            assert "another keeper answers there" in second.stderr
            assert client.names() == ["x"]
        finally:
            process.kill()
            process.wait(timeout=10)
        with pytest.raises(KeeperError):
            client.names()
    with pytest.raises(KeeperError, match="is it running"):
        KeeperClient.connect(path)
    path.parent.chmod(0o777)
    refused = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert "only this user can write to" in refused.stderr


def connect(path: Path) -> KeeperClient:
    deadline = time.monotonic() + 20
    while True:
        try:
            return KeeperClient.connect(path)
        except KeeperError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_runtime_changes_are_kept_with_the_session(client: KeeperClient) -> None:
    carried = RuntimeChanges(new_carried())
    assert (carried.paused, carried.options, carried.resumes) == (False, {}, 0)
    beginning = Beginning("00", "01", "us-east-1", 7)
    fuse, listing = memory_file("fuse", b""), memory_file("listing", b"")
    Handover(
        fuse, listing, carried.descriptor, new_near(), new_in_hand(), beginning
    ).store(client, "mount")  # fmt: skip
    carried.paused, carried.resumes = True, 10
    carried.options["max-concurrency"] = "200"
    carried.save()
    carried.options["max-concurrency"] = "3"
    carried.save()  # shorter than before
    handover = Handover.fetch(client, "mount")
    assert handover is not None and handover.beginning == beginning
    found = RuntimeChanges(handover.carried)
    assert (found.paused, found.options, found.resumes) == (True, {"max-concurrency": "3"}, 10)


def test_a_session_of_a_version_that_carried_nothing(client: KeeperClient) -> None:
    beginning = b'{"init_message": "00", "init_answer": "01", "region": "r", "mounted_ns": 7}'
    contents = {"fuse": b"", "session": beginning, "listing": b""}
    client.store("old", {key: memory_file(key, value) for key, value in contents.items()})
    handover = Handover.fetch(client, "old")
    assert handover is not None
    carried = RuntimeChanges(handover.carried)
    assert (carried.paused, carried.resumes) == (False, 0)
    assert read_whole(handover.near) == b""
    carried.resumes = 1
    carried.save()
    again = Handover.fetch(client, "old")
    assert again is not None and RuntimeChanges(again.carried).resumes == 1
    assert os.fstat(again.near).st_ino == os.fstat(handover.near).st_ino


def test_an_incomplete_session_cannot_be_resumed(client: KeeperClient) -> None:
    """The supervisor died after it had mounted, before a worker had told how the mount began."""
    client.store("half", {"fuse": memory_file("fuse", b"")})
    assert Handover.fetch(client, "half") is None


def test_more_names_than_fit_into_a_message(client: KeeperClient) -> None:
    """A plugin asks for all of them every two seconds."""
    names = {f"/var/lib/kubelet/plugins/csi.lazyfs.io/mounts/{'x' * 100}-{i}" for i in range(1000)}
    kept = memory_file("kept", b"")
    for name in names:
        client.store(name, {"kept": kept})
    os.close(kept)
    assert sum(map(len, names)) > LONGEST_MESSAGE
    assert set(client.names()) == names
    assert len(client.names()) == len(names)


def test_a_keeper_without_descriptors_says_so_and_goes_on(client: KeeperClient) -> None:
    kept = memory_file("kept", b"")
    client.store("before", {"kept": kept})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(each.name) for each in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
    fill = []
    try:
        with suppress(OSError):
            while True:
                fill.append(os.dup(kept))
        os.close(fill.pop())
        # The descriptor that is passed takes the last one.
        with pytest.raises(KeeperError, match=r"Too many open files|too long"):
            client.store("more", {"kept": kept})
    finally:
        for descriptor in (*fill, kept):
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert client.names() == ["before"]
