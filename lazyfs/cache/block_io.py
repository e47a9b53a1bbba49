"""Reads and writes the files of blocks, in a mover where there is one."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lazyfs.blocks.buffers import align, take_buffer
from lazyfs.cache.block_format import (
    PIECE,
    Content,
    DamagedBlockError,
    block_sum,
    check,
    check_pieces,
    make_tail,
    pieces_of,
    running_sums,
)
from lazyfs.cache.direct_io import read_file, read_part, write_file
from lazyfs.movers.call import MoverFaultError, MoverLostError
from lazyfs.movers.pool import Movers


class NewFile(NamedTuple):
    """The file of a block that is to be written."""

    path: Path
    content: Content
    number: int
    data: memoryview


def write_blocks(
    files: Sequence[NewFile], movers: Movers | None
) -> tuple[list[bytes], OSError | None]:
    """Write new files, in order.

    Returns:
        The running sums of those that were written, and why the next one was not: it exists, or
        cannot be written. What was written of it is left for the caller.
    """
    if movers is not None and files:
        named = [(str(file.path), file.content.identity.decode(), file.number) for file in files]
        try:
            sums, failed = movers.call(write, named, buffer=[file.data for file in files])
            return [bytes.fromhex(each) for each in sums], OSError(*failed) if failed else None
        except MoverLostError:
            for file in files:
                with contextlib.suppress(OSError):  # what it began
                    file.path.unlink()
        except MoverFaultError as error:
            return [], OSError(0, str(error))
        except OSError as error:
            return [], error
    return _write(files)


def _write(files: Sequence[NewFile]) -> tuple[list[bytes], OSError | None]:
    written: list[bytes] = []
    for file in files:
        sums = running_sums(file.data)
        tail = make_tail(file.content, file.number, len(file.data), block_sum(sums))
        try:
            write_file(file.path, file.data, tail)
        except OSError as error:
            return written, error
        written.append(sums)
    return written, None


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


def read_pieces(path: Path, length: int, sums: bytes, start: int, stop: int) -> memoryview:
    """Bytes `start` to `stop` of a block, of which only the pieces that have them are read.

    Args:
        length: that of the block.
        sums: its running sums.

    Raises:
        DamagedBlockError: they are not what was stored.
        OSError: they cannot be read, or the file is not there.
    """
    pieces = pieces_of(start, stop)
    begin, end = pieces.start * PIECE, min(pieces.stop * PIECE, length)
    data = take_buffer(align(end - begin))
    if not read_part(path, begin, data):
        raise DamagedBlockError("has a wrong length")
    check_pieces(sums, pieces, data[: end - begin])
    return data[start - begin : stop - begin]


# In a mover.


def write(
    named: Sequence[tuple[str, str, int]], *parts: memoryview
) -> tuple[list[str], tuple[int, str] | None]:
    """Write new files: path, content and number of each.

    Returns:
        The same as `write_blocks`, the sums in hexadecimal digits.
    """
    sums, error = _write(
        [
            NewFile(Path(path), Content.from_identity(identity.encode()), number, data)
            for (path, identity, number), data in zip(named, parts, strict=True)
        ]
    )
    failed = (error.errno or 0, error.strerror or str(error)) if error else None
    return [each.hex() for each in sums], failed


def read(path: str, identity: str, number: int, data: memoryview) -> str | None:
    """Read a block's file. Returns what is wrong with it. Raises OSError."""
    try:
        _read(Path(path), Content.from_identity(identity.encode()), number, data)
    except DamagedBlockError as error:
        return str(error)
    return None
