"""Reads and writes the file of a block, in a mover where there is one."""

from __future__ import annotations

import contextlib
from pathlib import Path

from lazyfs.blocks.buffers import align, take_buffer
from lazyfs.cache.block_format import Content, DamagedBlockError, check, make_tail
from lazyfs.cache.direct_io import read_file, write_file
from lazyfs.movers.call import MoverFaultError, MoverLostError
from lazyfs.movers.pool import Movers


def write_block(
    path: Path, content: Content, number: int, data: memoryview, movers: Movers | None
) -> None:
    """Write a new file with a block.

    Raises:
        OSError: it exists, or cannot be written; what was written is left for the caller.
    """
    if movers is not None:
        try:
            movers.call(write, str(path), content.identity.decode(), number, buffer=data)
            return
        except MoverLostError:
            with contextlib.suppress(OSError):  # what it began
                path.unlink()
        except MoverFaultError as error:
            raise OSError(0, str(error)) from error
    write_file(path, data, make_tail(content, number, data))


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


def write(path: str, identity: str, number: int, data: memoryview) -> None:
    """Write a new file with a block. Raises OSError."""
    content = Content.from_identity(identity.encode())
    write_file(Path(path), data, make_tail(content, number, data))


def read(path: str, identity: str, number: int, data: memoryview) -> str | None:
    """Read a block's file. Returns what is wrong with it. Raises OSError."""
    try:
        _read(Path(path), Content.from_identity(identity.encode()), number, data)
    except DamagedBlockError as error:
        return str(error)
    return None
