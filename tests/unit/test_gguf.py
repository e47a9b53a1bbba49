"""Where the tensors of GGUF files end, as the writer of llama.cpp lays them."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import numpy
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFEndian, GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.model.gguf import BLOCKS, check_is_whole
from lazyfs.model.safetensors import MalformedHeaderError, TruncatedFileError

HEAD_BYTES = 64 << 10


def written(
    path: Path, *, words: int = 300, alignment: int = 32, endian: GGUFEndian = GGUFEndian.LITTLE
) -> bytes:
    """A file with values of all kinds, a vocabulary, and tensors that are quantised and not."""
    writer = GGUFWriter(path, "llama", endianess=endian)
    writer.add_custom_alignment(alignment)
    writer.add_context_length(4096)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_bool("some.flag", True)
    writer.add_uint8("some.small", 7)
    writer.add_float64("some.double", 0.5)
    writer.add_token_list([f"word {at}" for at in range(words)])
    writer.add_token_scores([float(at) for at in range(words)])
    writer.add_token_types([1] * words)
    writer.add_tensor("norm", numpy.ones(9, numpy.float32))
    writer.add_tensor("plain", numpy.ones((4, 8), numpy.float16))
    writer.add_tensor(
        "quantised", numpy.ones((3, 2 * 144), numpy.uint8), raw_dtype=GGMLQuantizationType.Q4_K
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def check(content: bytes) -> None:
    """Look at a file of which only so much is there."""

    def read(offset: int, length: int) -> bytes:
        assert offset + length <= len(content)
        return content[offset : offset + length]

    check_is_whole(content[:HEAD_BYTES], len(content), read)


def test_the_sizes_of_blocks_are_those_of_ggml() -> None:
    assert {kind.value: sizes for kind, sizes in GGML_QUANT_SIZES.items()} == BLOCKS


@pytest.mark.parametrize("words", [3, 60_000])
@pytest.mark.parametrize("alignment", [32, 4096])
@pytest.mark.parametrize("endian", [GGUFEndian.LITTLE, GGUFEndian.BIG])
def test_a_file_is_whole_until_its_last_tensor_ends(
    words: int, alignment: int, endian: GGUFEndian, tmp_path: Path
) -> None:
    content = written(tmp_path / "m.gguf", words=words, alignment=alignment, endian=endian)
    check(content)
    # The writer fills up behind the last tensor; llama.cpp does not need that.
    last = content.rindex(b"\1" * 3 * 2 * 144) + 3 * 2 * 144
    check(content[:last])
    for size in (last - 1, len(content) // 2, 5000, 100, 12, 5):
        if size < last:
            with pytest.raises(TruncatedFileError, match="cut off"):
                check(content[:size])


def test_a_type_that_is_not_known_is_not_judged(tmp_path: Path) -> None:
    content = written(tmp_path / "m.gguf")
    name = content.index(b"quantised") + len(b"quantised")
    kind = name + 4 + 2 * 8
    assert struct.unpack_from("<I", content, kind) == (GGMLQuantizationType.Q4_K,)
    unknown = content[:kind] + struct.pack("<I", 999) + content[kind + 4 :]
    check(unknown[: content.rindex(b"\1" * 3 * 2 * 144)])


@pytest.mark.parametrize(
    "content",
    [
        b"GGML" + bytes(100),
        b"GGUF" + struct.pack("<I", 1) + bytes(100),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 40) + bytes(100),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<QI", 0, 77) + bytes(100),
        b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<QI", 0, 9) + bytes(100),
    ],
    ids=["magic", "version", "name", "value", "dimensions"],
)
def test_what_is_no_header_is_malformed(content: bytes) -> None:
    with pytest.raises(MalformedHeaderError) as error:
        check(content)
    assert not isinstance(error.value, TruncatedFileError)


def test_a_header_is_read_so_far_and_no_farther() -> None:
    """A count that is made up does not make it read gigabytes."""
    size_bytes = 1 << 40
    asked = 0

    def read(offset: int, length: int) -> bytes:
        nonlocal asked
        asked += length
        return bytes(length)

    first = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<QIIQ", 0, 9, 8, 1 << 60)
    with pytest.raises(MalformedHeaderError, match="more than"):
        check_is_whole(first, size_bytes, read)
    assert asked < 80 << 20


@given(st.binary(max_size=200))
def test_any_bytes_are_judged(content: bytes) -> None:
    with contextlib.suppress(MalformedHeaderError):
        check(b"GGUF" + struct.pack("<I", 3) + content)
