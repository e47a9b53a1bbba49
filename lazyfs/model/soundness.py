"""What is wrong with a file of a model, as far as a look at it shows. Pure.

A loader finds out minutes after it was started. This is for the commands that say so before:

- Git LFS pointers instead of files: a repository was copied without `git lfs pull`;
- safetensors and GGUF files, and ZIP files of torch.save, that an upload cut off;
- empty weights, and objects that cannot be read: denied, archived, deleted.

A header that is not valid is `odd`: no loader of today reads the file, but formats change.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from posixpath import basename
from typing import TypeAlias

from lazyfs.errors import SourceError
from lazyfs.model.filenames import format_of
from lazyfs.model.gguf import check_is_whole
from lazyfs.model.json_cost import MOST_PARSED_BYTES, json_cost
from lazyfs.model.safetensors import (
    HEAD_BYTES,
    LENGTH_BYTES,
    LONGEST_HEADER,
    MalformedHeaderError,
    Tensor,
    TruncatedFileError,
    header_size,
    parse_header,
)

# Reads a range of a file: path, offset and length in bytes. Raises SourceError.
Reader: TypeAlias = Callable[[str, int, int], bytes]

# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
POINTER = b"version https://git-lfs.github.com/spec/"
LONGEST_POINTER = 1024
# Pointers with an sha256 and a size have 120 to 140 bytes; other small files are not looked at.
POINTER_SIZES = range(100, 200)
# The first entry of a file of torch.save, uncompressed (caffe2/serialize/inline_container.cc).
_TORCH_ZIP = re.compile(
    rb"PK\x03\x04.{4}\x00\x00.{20}[\w./-]+/(data\.pkl|\.format_version|version|byteorder)", re.S
)
_ZIP_END = b"PK\5\6"
# The record at the end of a ZIP file, without a comment (APPNOTE.TXT, 4.3.16).
ZIP_END_BYTES = 22


@dataclass(frozen=True, slots=True)
class Look:
    """What a look at a file shows.

    Attributes:
        tensors: of a safetensors file; None: they are not known.
        broken: why no loader can read it; None if nothing is known to be wrong.
        odd: why its header cannot be used; None if it can.
    """

    tensors: tuple[Tensor, ...] | None = None
    broken: str | None = None
    odd: str | None = None


def look_at(path: str, size_bytes: int, read: Reader) -> Look:
    """Look at a file of weights: at its beginning and, if need be, at its end."""
    try:
        if not size_bytes:
            return Look(broken=f"{path} is empty; upload it again", odd="the file is empty")
        first = read(path, 0, min(size_bytes, HEAD_BYTES))
        if size_bytes <= LONGEST_POINTER and first.startswith(POINTER):
            return Look(broken=_pointer(path), odd="it is a Git LFS pointer")
        if format_of(basename(path)) == "safetensors":
            return _look_at_safetensors(path, size_bytes, first, read)
        if format_of(basename(path)) == "gguf":
            return _look_at_gguf(path, size_bytes, first, read)
        if _TORCH_ZIP.match(first):
            end = read(path, max(0, size_bytes - ZIP_END_BYTES), min(size_bytes, ZIP_END_BYTES))
            if _ZIP_END not in end:
                return Look(broken=f"{path} is cut off: it has no ZIP directory; upload it again")
    except SourceError as error:
        return Look(broken=str(error), odd=str(error))
    return Look()


def is_pointer(path: str, size_bytes: int, read: Reader) -> str | None:
    """Why a small file is broken: it is a Git LFS pointer. None if it is not."""
    if size_bytes not in POINTER_SIZES:
        return None
    try:
        return _pointer(path) if read(path, 0, size_bytes).startswith(POINTER) else None
    except SourceError as error:
        return str(error)


def _pointer(path: str) -> str:
    return (
        f"{path} is a Git LFS pointer and not the file; run `git lfs pull` in the repository and "
        "upload it again"
    )


def _look_at_safetensors(path: str, size: int, first: bytes, read: Reader) -> Look:
    try:
        length = header_size(first[:LENGTH_BYTES], size)
        if length > LONGEST_HEADER:
            why = f"its header is too long ({length} bytes), so it is prefetched by offset"
            return Look(odd=why)
        rest = read(path, len(first), length - len(first)) if length > len(first) else b""
        if json_cost(first + rest) > MOST_PARSED_BYTES:
            return Look(odd="its header takes too much memory, so it is prefetched by offset")
        return Look(parse_header(first + rest, size).tensors)
    except TruncatedFileError as error:
        return Look(broken=f"{path}: {error}; upload it again", odd=str(error))
    except MalformedHeaderError as error:
        return Look(odd=f"its header is not valid, so it is prefetched by offset: {error}")


def _look_at_gguf(path: str, size: int, first: bytes, read: Reader) -> Look:
    try:
        check_is_whole(first, size, lambda offset, length: read(path, offset, length))
    except TruncatedFileError as error:
        return Look(broken=f"{path}: {error}; upload it again", odd=str(error))
    except MalformedHeaderError as error:
        return Look(odd=f"its header is not valid: {error}")
    return Look()
