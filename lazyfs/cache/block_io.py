"""Reads and writes the files of blocks, in a mover where there is one."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lazyfs.blocks.buffers import align, take_buffer
from lazyfs.cache.block_format import Content, DamagedBlockError, check, make_tail
from lazyfs.cache.direct_io import read_file, write_file
from lazyfs.movers.call import MoverFaultError, MoverLostError
from lazyfs.movers.pool import Movers


class NewFile(NamedTuple):
    """The file of a block that is to be written."""

    path: Path
    content: Content
    number: int
    data: memoryview


def write_blocks(files: Sequence[NewFile], movers: Movers | None) -> tuple[int, OSError | None]:
    """Write new files, in order.

    Returns:
        How many were written, and why the next one was not: it exists, or cannot be written. What
        was written of it is left for the caller.
    """
    if movers is not None and files:
        named = [(str(file.path), file.content.identity.decode(), file.number) for file in files]
        try:
            count, failed = movers.call(write, named, buffer=[file.data for file in files])
            return count, OSError(*failed) if failed else None
        except MoverLostError:
            for file in files:
                with contextlib.suppress(OSError):  # what it began
                    file.path.unlink()
        except MoverFaultError as error:
            return 0, OSError(0, str(error))
        except OSError as error:
            return 0, error
    return _write(files)


def _write(files: Sequence[NewFile]) -> tuple[int, OSError | None]:
    for at, file in enumerate(files):
        try:
            write_file(file.path, file.data, make_tail(file.content, file.number, file.data))
        except OSError as error:
            return at, error
    return len(files), None


def read_block(path: Path, content: Content, number: int, movers: Movers | None) -> memoryview:
    """The checked bytes of a block's file.

    Raises:
        DamagedBlockError: it is not what was stored.
        OSError: it cannot be read, or is not there.
    """
    data = take_buffer(align(content.length(number)))
    if movers is None or not _read_elsewhere(path, content, number, data, movers):
        _read(path, content, number, data)
    return data[: content.length(number)]


def _read_elsewhere(
    path: Path, content: Content, number: int, data: memoryview, movers: Movers
) -> bool:
    try:
        damage = movers.call(read, str(path), content.identity.decode(), number, buffer=data)
    except (MoverLostError, MoverFaultError):
        return False
    if damage:
        raise DamagedBlockError(damage)
    return True


def _read(path: Path, content: Content, number: int, data: memoryview) -> None:
    tail = read_file(path, data, content.tail_length)
    if tail is None:
        raise DamagedBlockError("has a wrong length")
    check(content, number, data[: content.length(number)], tail)


# In a mover.


def write(
    named: Sequence[tuple[str, str, int]], *parts: memoryview
) -> tuple[int, tuple[int, str] | None]:
    """Write new files: path, content and number of each. Returns as `write_blocks`."""
    count, error = _write(
        [
            NewFile(Path(path), Content.from_identity(identity.encode()), number, data)
            for (path, identity, number), data in zip(named, parts, strict=True)
        ]
    )
    return count, (error.errno or 0, error.strerror or str(error)) if error else None


def read(path: str, identity: str, number: int, data: memoryview) -> str | None:
    """Read a block's file. Returns what is wrong with it. Raises OSError."""
    try:
        _read(Path(path), Content.from_identity(identity.encode()), number, data)
    except DamagedBlockError as error:
        return str(error)
    return None
