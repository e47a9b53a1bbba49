"""Calls of functions in other processes, on shared buffers."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from lazyfs.blocks import buffers
from lazyfs.blocks.buffers import LEAST_SHARED, MOST_IDLE_BYTES, shared_offset, take_buffer
from lazyfs.cache.block_format import Content, running_sums
from lazyfs.cache.block_io import NewFile, read_block, write_blocks
from lazyfs.machine import stat_of
from lazyfs.movers import pool
from lazyfs.movers.call import MOST_BYTES, MoverFaultError, MoverLostError
from lazyfs.movers.mover import SILENT_S, Mover
from lazyfs.movers.pool import Movers

SIZE = 3 << 20


@pytest.fixture
def movers() -> Iterator[Movers]:
    made = Movers(2)
    yield made
    made.close()
    buffers.share(None)


# Found by name in a mover, which has this file's folder in its path.
def digest(salt: str, data: memoryview) -> str:
    return hashlib.sha256(salt.encode() + data).hexdigest()


def fill(value: int, data: memoryview) -> int:
    data[:] = bytes([value]) * len(data)
    return os.getpid()


def swap(one: memoryview, other: memoryview) -> None:
    one[:], other[:] = bytes(other), bytes(one)


def fail(kind: str, data: memoryview) -> None:
    raise {
        "file": FileNotFoundError(2, "No such file or directory"),
        "time": TimeoutError("timed out"),
        "cut": ConnectionResetError("cut off"),
        "full": OSError(28, "No space left on device"),
        "bug": ValueError("surprise"),
    }[kind]


def end(data: memoryview) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for(port: int, data: memoryview) -> int:
    from lazyfs.movers.context import tell_wire

    with socket.create_connection(("127.0.0.1", port)) as connection:
        tell_wire(connection)
        return connection.recv_into(data)


def work(seconds: float, data: memoryview) -> None:
    until_s = time.process_time() + seconds
    while time.process_time() < until_s:
        pass


def write_for_ever(port: int, data: memoryview) -> None:
    from lazyfs.movers.context import tell_wire

    data[:8] = os.getpid().to_bytes(8, "little")
    with socket.create_connection(("127.0.0.1", port)) as connection:
        tell_wire(connection)
        while True:
            data[8:16] = os.urandom(8)


def secrets_of(data: memoryview) -> list[object]:
    """Its environment, and whether others may look into it."""
    dumpable = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)  # PR_GET_DUMPABLE
    return [dict(os.environ), dumpable]


def called(movers: Movers, function: Callable[..., object], *arguments: object) -> object:
    """Call as soon as a mover runs."""
    buffer = take_buffer(SIZE)
    until_s = time.monotonic() + 60
    while True:
        try:
            return movers.call(function, *arguments, buffer=buffer)
        except MoverLostError:
            assert time.monotonic() < until_s
            time.sleep(0.01)


def wait_until(what: Callable[[], bool]) -> None:
    until_s = time.monotonic() + 60
    while not what():
        assert time.monotonic() < until_s
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have movers find this module."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def test_bytes_are_seen_on_both_sides(movers: Movers) -> None:
    called(movers, fill, 0)
    one, other = take_buffer(SIZE), take_buffer(SIZE)
    other[:] = os.urandom(SIZE)
    pid = movers.call(fill, 7, buffer=one)
    assert pid != os.getpid()
    assert one == bytes([7]) * SIZE
    assert movers.call(digest, "salt", buffer=other) == digest("salt", other)
    part = other[1000:5000]
    assert movers.call(digest, "", buffer=part) == digest("", part)
    assert movers.lost == 0


def test_a_call_may_have_several_buffers(movers: Movers) -> None:
    called(movers, fill, 0)
    one, other = take_buffer(SIZE), take_buffer(SIZE)
    one[:], other[:] = b"1" * SIZE, b"2" * SIZE
    movers.call(swap, buffer=[one[10:20], other[30:40]])
    assert one == b"1" * 10 + b"2" * 10 + b"1" * (SIZE - 20)
    assert other == b"2" * 30 + b"1" * 10 + b"2" * (SIZE - 40)
    alone = memoryview(bytearray(10))
    with pytest.raises(MoverLostError):
        movers.call(swap, buffer=[one[:10], alone])


def test_a_call_that_is_too_long_for_a_message_is_not_made(movers: Movers) -> None:
    called(movers, fill, 0)
    with pytest.raises(MoverLostError):
        movers.call(digest, "x" * MOST_BYTES, buffer=take_buffer(SIZE))
    assert isinstance(movers.call(fill, 0, buffer=take_buffer(SIZE)), int), "it goes on"
    assert movers.lost == 0


def test_blocks_are_written_by_one_call(movers: Movers, tmp_path: Path) -> None:
    """What was written before a failure counts."""
    called(movers, fill, 0)
    size = 3 * SIZE
    content = Content("http://s3", "b", "k", '"1"', size, SIZE)
    blocks = [take_buffer(SIZE) for _ in range(3)]
    for block in blocks:
        block[:] = os.urandom(SIZE)
    files = [NewFile(tmp_path / str(n), content, n, block) for n, block in enumerate(blocks)]
    assert write_blocks(files, movers) == ([running_sums(block) for block in blocks], None)
    for file in files:
        assert read_block(file.path, content, file.number, movers) == file.data
    files[1].path.rename(tmp_path / "in the way")
    files[0].path.unlink()
    sums, error = write_blocks([files[0], files[2], files[1]], movers)
    assert sums == [running_sums(blocks[0])]
    assert isinstance(error, FileExistsError)
    assert not files[1].path.exists()
    assert movers.lost == 0


def test_memory_grows_after_a_mover_has_begun(movers: Movers) -> None:
    called(movers, fill, 0)
    buffers_now = [take_buffer(SIZE) for _ in range(20)]
    for value, buffer in enumerate(buffers_now):
        movers.call(fill, value, buffer=buffer)
    for value, buffer in enumerate(buffers_now):
        assert buffer == bytes([value]) * SIZE


@pytest.mark.parametrize(
    ("kind", "error"),
    [("file", FileNotFoundError), ("time", TimeoutError), ("cut", ConnectionError),
     ("full", OSError), ("bug", MoverFaultError)],
)  # fmt: skip
def test_errors_come_back_as_what_they_are(
    movers: Movers, kind: str, error: type[Exception]
) -> None:
    called(movers, fill, 0)
    with pytest.raises(error) as caught:
        called(movers, fail, kind)
    if kind == "full":
        assert isinstance(caught.value, OSError)
        assert caught.value.errno == 28
    assert isinstance(called(movers, fill, 0), int), "it goes on"
    assert movers.lost == 0


def test_a_mover_that_dies_is_replaced(movers: Movers) -> None:
    called(movers, fill, 0)
    with pytest.raises(MoverLostError):
        movers.call(end, buffer=take_buffer(SIZE))
    assert movers.lost == 1
    assert isinstance(called(movers, fill, 1), int)


def test_a_call_that_breaks_off_leaves_the_buffer_alone(
    movers: Movers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its caller uses the buffer again at once, so nobody else may still write into it."""

    class Refusing:
        def use(self, connection: socket.socket | None) -> None:
            if connection is not None:
                raise RuntimeError("refused")

    end = Mover.end
    # A process does not end at once.
    monkeypatch.setattr(Mover, "end", lambda mover: threading.Timer(0.3, end, [mover]).start())
    called(movers, fill, 0)
    buffer = take_buffer(SIZE)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(RuntimeError):
            movers.call(write_for_ever, port, buffer=buffer, wire=Refusing())
    pid = int.from_bytes(buffer[:8], "little")
    status = Path(f"/proc/{pid}/status")
    assert pid and not (status.exists() and "\nVmSize" in status.read_text()), "its memory is gone"
    assert isinstance(called(movers, fill, 1), int)


def test_calls_on_unshared_memory_are_refused(movers: Movers) -> None:
    called(movers, fill, 0)
    for buffer in (memoryview(bytearray(SIZE)), take_buffer(LEAST_SHARED // 4)):
        assert shared_offset(buffer) is None
        with pytest.raises(MoverLostError):
            movers.call(fill, 0, buffer=buffer)
    assert shared_offset(take_buffer(SIZE).toreadonly()) is None


class Wire:
    def __init__(self) -> None:
        self.connection: socket.socket | None = None
        self.told = threading.Event()

    def use(self, connection: socket.socket | None) -> None:
        if connection is not None:
            self.connection = connection
            self.told.set()


def test_the_connection_that_a_call_waits_for_can_be_ended(movers: Movers) -> None:
    called(movers, fill, 0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        wire, came = Wire(), []

        def call() -> None:
            port = server.getsockname()[1]
            came.append(movers.call(wait_for, port, buffer=take_buffer(SIZE), wire=wire))

        thread = threading.Thread(target=call)
        thread.start()
        assert wire.told.wait(30)
        assert wire.connection is not None
        wire.connection.shutdown(socket.SHUT_RDWR)
        thread.join(30)
    assert came == [0]


def test_a_task_awaits_calls_without_threads(movers: Movers) -> None:
    called(movers, fill, 0)
    threads = threading.active_count()
    many = [take_buffer(SIZE) for _ in range(8)]

    async def run() -> None:
        async def call(value: int) -> None:
            assert await movers.run(fill, value, buffer=many[value]) != os.getpid()
            assert many[value] == bytes([value]) * SIZE
            assert threading.active_count() <= threads

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for value in range(len(many)):
                    nursery.start_soon(call, value)
            with pytest.raises(FileNotFoundError):
                await movers.run(fail, "file", buffer=many[0])
            with pytest.raises(MoverFaultError):
                await movers.run(fail, "bug", buffer=many[0])
            with pytest.raises(MoverLostError):
                await movers.run(end, buffer=many[0])

    trio.run(run)
    assert movers.lost == 1
    assert sum(mover.busy for mover in movers._movers) == 0


def test_a_call_goes_on_without_its_task(movers: Movers) -> None:
    """Its buffer and its line stay in use until the mover is done."""
    called(movers, fill, 0)

    async def run(server: socket.socket) -> None:
        wire, ended = Wire(), trio.Event()
        port = server.getsockname()[1]
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:

                async def call() -> None:
                    await movers.run(
                        wait_for, port, buffer=take_buffer(SIZE), wire=wire, ended=ended.set
                    )

                nursery.start_soon(call)
                while not wire.told.is_set():
                    await trio.sleep(0.01)
                nursery.cancel_scope.cancel()
            assert not ended.is_set()
            assert sum(mover.busy for mover in movers._movers) == 1
            connection, _ = server.accept()
            with connection:
                connection.send(b"abc")
            await ended.wait()
        assert sum(mover.busy for mover in movers._movers) == 0

    with socket.create_server(("127.0.0.1", 0)) as server:
        trio.run(run, server)
    assert movers.lost == 0


def test_a_worker_ends_without_a_call_that_is_stuck(movers: Movers) -> None:
    """The mover may wait for a page that the next worker unlocks."""
    pid = called(movers, fill, 0)
    assert isinstance(pid, int)

    async def run(port: int) -> None:
        wire = Wire()

        async def call() -> None:
            await movers.run(wait_for, port, buffer=take_buffer(SIZE), wire=wire)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            while not wire.told.is_set():
                await trio.sleep(0.01)
            for mover in movers._movers:
                os.kill(mover.process.pid, signal.SIGSTOP)
            nursery.cancel_scope.cancel()

    with socket.create_server(("127.0.0.1", 0)) as server:
        trio.run(run, server.getsockname()[1])
    assert sum(mover.busy for mover in movers._movers) == 1, "it was not waited for"


def test_a_mover_that_is_stopped_gets_no_calls_until_it_answers(movers: Movers) -> None:
    called(movers, fill, 0)
    movers.start()
    wait_until(lambda: movers.running == 2)
    stopped, other = (mover.process.pid for mover in movers._movers)
    os.kill(stopped, signal.SIGSTOP)
    threads = [*Path(f"/proc/{stopped}/task").iterdir()]
    wait_until(lambda: all(stat_of(thread)[:1] == ["T"] for thread in threads))

    async def call(answered: set[int]) -> None:
        answered.add(await movers.run(fill, 1, buffer=take_buffer(SIZE)))

    async def pids() -> set[int]:
        """Which movers answer to many calls made at once."""
        answered: set[int] = set()
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(call, answered)
        return answered

    async def run() -> None:
        answered: set[int] = set()
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(call, answered)
            while not answered:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        assert answered == {other}
        await trio.sleep(2 * SILENT_S)
        with trio.fail_after(120):
            assert stopped not in await pids()
            while len(await pids()) < 2:
                assert movers.lost == 0, "another one takes its place"
            os.kill(stopped, signal.SIGCONT)
            while stopped not in await pids():
                pass

    trio.run(run)
    assert movers.lost == 0


def test_a_mover_that_stays_silent_is_ended(
    movers: Movers, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = called(movers, fill, 0)
    assert isinstance(pid, int)
    [mover] = [mover for mover in movers._movers if mover.process.pid == pid]
    os.kill(pid, signal.SIGSTOP)

    async def run() -> None:
        ended = trio.Event()
        with trio.move_on_after(0.1):
            await movers.run(fill, 1, buffer=take_buffer(SIZE), ended=ended.set)
        movers.look_after()
        assert mover in movers._movers
        monkeypatch.setattr(pool, "MOST_IDLE_S", 0.0)
        movers.look_after()
        with trio.fail_after(60):
            await ended.wait()

    trio.run(run)
    assert mover.process.wait(60) == -signal.SIGKILL


def test_a_mover_that_stays_stopped_loses_its_calls(movers: Movers) -> None:
    pid = called(movers, fill, 0)
    assert isinstance(pid, int)
    [mover] = [mover for mover in movers._movers if mover.process.pid == pid]
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: mover.is_stopped)
    lost: list[MoverLostError] = []

    def call() -> None:
        try:
            movers.call(fill, 1, buffer=take_buffer(SIZE))
        except MoverLostError as error:
            lost.append(error)

    calling = [threading.Thread(target=call) for _ in range(2 * movers.running)]
    for thread in calling:
        thread.start()
    wait_until(lambda: mover.busy > 0)
    movers.look_after()
    assert not lost
    movers.look_after()
    for thread in calling:
        thread.join(60)
        assert not thread.is_alive()
    assert lost


def test_garbage_instead_of_an_answer_ends_a_mover(
    movers: Movers, monkeypatch: pytest.MonkeyPatch
) -> None:
    called(movers, fill, 0)
    ended: list[bool] = []

    async def run() -> None:
        with monkeypatch.context() as patched:

            def garbage(message: bytes) -> None:
                raise ValueError("garbage")

            patched.setattr("lazyfs.movers.call.json.loads", garbage)
            with pytest.raises(MoverLostError):
                await movers.run(
                    fill, 1, buffer=take_buffer(SIZE), ended=lambda: ended.append(True)
                )
        with trio.fail_after(60):
            while not ended:
                await trio.sleep(0.01)

    trio.run(run)
    assert movers.lost == 1


def test_movers_can_be_started_ahead(movers: Movers) -> None:
    """A prefetch waits for the first; a reader does not."""

    async def run() -> None:
        with trio.fail_after(60):
            await movers.wait_for_first(lambda: False)
            assert movers.running == 0
            await movers.wait_for_first(lambda: True)
            assert movers.running
            while movers.running < 2:
                await trio.sleep(0.01)

    trio.run(run)


def test_a_long_call_is_not_idle(movers: Movers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block over a slow link takes minutes, in which no other call may begin."""
    called(movers, fill, 0)
    monkeypatch.setattr(pool, "MOST_IDLE_S", -1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port, wire, came = server.getsockname()[1], Wire(), []
        thread = threading.Thread(
            target=lambda: came.append(
                movers.call(wait_for, port, buffer=take_buffer(SIZE), wire=wire)
            )
        )
        thread.start()
        assert wire.told.wait(30)
        movers.look_after()
        connection, _ = server.accept()
        with connection:
            connection.send(b"abc")
            thread.join(30)
    assert came == [3]
    assert movers.lost == 0
    movers.look_after()
    assert movers.running == 0, "now it is"


def test_processor_time_of_movers_is_counted_when_they_have_ended(
    movers: Movers, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert movers.processor_s == 0
    called(movers, work, 0.3)
    used_s = movers.processor_s
    assert used_s >= 0.25, "and ticks of 10 ms"
    monkeypatch.setattr(pool, "MOST_IDLE_S", -1.0)
    movers.look_after()
    assert movers.running == 0
    assert movers.processor_s >= used_s
    called(movers, work, 0.3)
    assert movers.processor_s >= used_s + 0.25


def test_a_mover_that_ended_before_its_first_call_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "FIRST_PAUSE_S", 0.0)
    movers = Movers(1)
    try:
        with pytest.raises(MoverLostError):
            movers.call(fill, 0, buffer=take_buffer(SIZE))
        until_s = time.monotonic() + 60
        while not movers.running:
            assert time.monotonic() < until_s
            time.sleep(0.01)
        former = movers._movers[0].process
        former.kill()
        former.wait()
        assert called(movers, fill, 0) != former.pid
    finally:
        movers.close()
        buffers.share(None)


def test_movers_survive_a_lack_of_descriptors(
    movers: Movers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever calls then does it without a mover, and movers go on."""
    pid = called(movers, fill, 0)
    taken = [movers._take() for _ in range(2)]

    def refuse(*_: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(socket, "socketpair", refuse)
        for mover in movers._movers:
            mover.idle.clear()
        with pytest.raises(MoverLostError):
            movers.call(fill, 0, buffer=take_buffer(SIZE))
    for line in taken:
        movers._give_back(line)
    assert all(mover.busy == 0 for mover in movers._movers)
    assert movers.lost == 0
    assert isinstance(called(movers, fill, 0), int), pid


def test_movers_get_no_keys_and_their_memory_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalr")
    monkeypatch.setenv("HTTPS_PROXY", "http://user:word@proxy:1")
    movers = Movers(1)
    try:
        told = called(movers, secrets_of)
        assert isinstance(told, list)
        environment, dumpable = told
        assert "PATH" in environment
        assert not {"AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY"} & environment.keys()
        assert dumpable == 0
    finally:
        movers.close()
        buffers.share(None)


def test_movers_end_with_the_pool(movers: Movers) -> None:
    pid = called(movers, fill, 0)
    assert isinstance(pid, int)
    movers.close()
    until_s = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < until_s
        time.sleep(0.01)
    with pytest.raises(MoverLostError):
        movers.call(fill, 0, buffer=take_buffer(SIZE))


def test_memory_of_unused_buffers_is_freed(movers: Movers) -> None:
    many = [take_buffer(SIZE) for _ in range(3 * MOST_IDLE_BYTES // SIZE)]
    for buffer in many:
        buffer[:] = b"x" * SIZE
    descriptor = movers._arena.descriptor
    used = os.fstat(descriptor).st_blocks * 512
    assert used >= len(many) * SIZE
    del many, buffer
    assert os.fstat(descriptor).st_blocks * 512 == used, "not in the middle of a load"
    buffers.free_idle()
    assert os.fstat(descriptor).st_blocks * 512 <= used / 2
    assert all(take_buffer(SIZE) is not None for _ in range(3))


def test_buffers_take_no_descriptors(movers: Movers) -> None:
    """On a large machine there are thousands of them."""

    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    # What earlier tests left open, also in threads that are ending.
    gc.collect()
    before = -1
    while before != (before := count()):
        time.sleep(0.2)
    many = [take_buffer(SIZE) for _ in range(50)]
    assert all(shared_offset(buffer) is not None for buffer in many)
    assert count() == before


def test_none() -> None:
    movers = Movers(0)
    with pytest.raises(MoverLostError):
        movers.call(fill, 0, buffer=take_buffer(SIZE))
    assert movers.running == 0
