"""Headers to tensors: what is taken, what is refused, and whether the reference agrees.

The reference is the safetensors crate, through `safetensors.deserialize`. The differences that
these tests allow are those that `lazyfs.model.safetensors` lists.
"""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open

from lazyfs.model.safetensors import (
    DTYPE_BITS,
    MAX_HEADER_LENGTH,
    MalformedHeaderError,
    TensorTable,
    header_size,
    parse_header,
)

LAYOUT = Path(__file__).parent.parent / "data" / "llama-6-shards.layout.json"
U8 = '{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'


def in_file(header: str | bytes | Mapping[str, object], data: bytes = b"") -> bytes:
    if isinstance(header, Mapping):
        header = json.dumps(header)
    text = header if isinstance(header, bytes) else header.encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: object, shape: object, begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def parse(file: bytes) -> TensorTable:
    assert header_size(file[:8], len(file)) <= len(file)
    return parse_header(file, len(file))


def reference(file: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    try:
        found = deserialize(file)
    except SafetensorError:
        return None
    return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in found}


def compare(file: bytes) -> None:
    """We and the reference say the same of the file, or differ in a way that is on the list."""
    theirs = reference(file)
    try:
        table = parse(file)
    except MalformedHeaderError as error:
        message = str(error)
        assert "\n" not in message
        assert theirs is None or "begins with" in message or "duplicate key" in message, message
        return
    check_sound(table, file)
    if b"-0" not in file:
        assert theirs == {
            t.name: (t.dtype, t.shape, file[t.begin : t.end]) for t in table.tensors
        }, file


def check_sound(table: TensorTable, file: bytes) -> None:
    assert table.size_bytes == len(file)
    edges = [table.header_bytes, *(t.end for t in table.tensors)]
    assert [t.begin for t in table.tensors] == edges[:-1] and edges[-1] == len(file)
    for offset in {0, table.header_bytes - 1, len(file), -1}:
        assert table.at(offset) is None
    for tensor in table.tensors:
        if tensor.begin < tensor.end:
            assert table.at(tensor.begin) is tensor is table.at(tensor.end - 1)


def refused(file: bytes) -> str:
    with pytest.raises(MalformedHeaderError) as caught:
        parse(file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
    return str(caught.value)


@st.composite
def valid_files(draw: st.DrawFn) -> bytes:
    """Any shape and dtype, names in any order, metadata or none, spaces behind or none."""
    names = draw(st.lists(st.text(max_size=3), unique=True, max_size=5))
    header: dict[str, object] = {}
    end = 0
    for name in names:
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        if DTYPE_BITS[dtype] < 8:
            shape.append(4)
        begin = end
        elements = 1
        for dimension in shape:
            elements *= dimension
        end += elements * DTYPE_BITS[dtype] // 8
        header[name] = entry(dtype, shape, begin, end)
    ordered = dict(draw(st.permutations(list(header.items()))))
    if draw(st.booleans()):
        ordered["__metadata__"] = draw(st.dictionaries(st.text(max_size=2), st.text(max_size=2)))
    text = json.dumps(ordered, ensure_ascii=draw(st.booleans()))
    return in_file(text + " " * draw(st.integers(0, 8)), bytes(i % 256 for i in range(end)))


@st.composite
def mutated_files(draw: st.DrawFn) -> bytes:
    file = bytearray(draw(valid_files()))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(file)))
        cut = draw(st.integers(0, 2))
        letters = b'{}[]":, \\0123456789-.eEuUF_adtn\x00\xff'
        file[at : at + cut] = bytes(draw(st.lists(st.sampled_from(letters), max_size=2)))
    if draw(st.booleans()) and len(file) > 8:  # the length as it was before
        file[:8] = draw(st.integers(0, len(file))).to_bytes(8, "little")
    return bytes(file)


ODD_VALUES = st.one_of(
    st.sampled_from([None, True, -1, 0, 1, 2, 4, 1.0, 2**63, 2**64, "U8", "F4", "U4", {}, []]),
    st.lists(st.sampled_from([0, 1, 2, 3, 4, -1, 2**63, 2**64 - 1, 2.0, False, "1"]), max_size=3),
)
ODD_ENTRIES = st.dictionaries(
    st.sampled_from(["dtype", "shape", "data_offsets", "note"]), ODD_VALUES, max_size=4
) | st.builds(
    entry,
    st.sampled_from(["U8", "F4", "F6_E2M3", "C64"]),
    st.lists(st.sampled_from([0, 1, 2, 4, 2**63]), max_size=3),
    st.integers(0, 4),
    st.integers(0, 4),
)


@given(valid_files())
def test_a_valid_file_is_read_as_the_reference_reads_it(file: bytes) -> None:
    assert reference(file) is not None
    compare(file)
    table = parse(file)
    assert table == parse_header(memoryview(file), len(file))
    assert table == parse_header(bytearray(file[: table.header_bytes]), len(file))


@given(mutated_files())
@example(in_file(""))
@example(in_file("{}", b"x"))
@example(in_file('{"a":' + U8 + ',"a":' + U8 + "}", b"ab"))
@example(in_file(b'{"\xed\xa0\x80":' + U8.encode() + b"}", b"ab"))
def test_a_mutated_file_is_judged_as_the_reference_judges_it(file: bytes) -> None:
    compare(file)


@given(
    st.dictionaries(st.sampled_from("ab"), ODD_ENTRIES, min_size=1),
    st.sampled_from([None, {}, {"k": "v"}, {"k": 1}, []]),
    st.integers(0, 4),
)
def test_odd_values_are_judged_as_the_reference_judges_them(
    header: dict[str, object], metadata: object, data_bytes: int
) -> None:
    compare(in_file({**header, "__metadata__": metadata}, bytes(data_bytes)))


@given(st.binary(max_size=40), st.integers(-1, 100))
def test_any_bytes_and_any_size_do_no_harm(header: bytes, size_bytes: int) -> None:
    try:
        table = parse_header(header, size_bytes)
    except MalformedHeaderError:
        return
    assert table.size_bytes == size_bytes


def test_the_recorded_model_parses() -> None:
    recorded = json.loads(LAYOUT.read_text())
    tensors = 0
    for name, file in recorded.items():
        if not name.endswith(".safetensors"):
            continue
        text = json.dumps(file["header"], separators=(",", ":")).ljust(file["header_length"])
        table = parse_header(in_file(text), file["size_bytes"])
        assert table.metadata == {"format": "pt"}
        assert [t.name for t in table.tensors] == list(file["header"])[1:]
        middle = table.tensors[len(table.tensors) // 2]
        assert table.at((middle.begin + middle.end) // 2) is middle
        tensors += len(table.tensors)
    assert tensors == 75


def test_tensors_are_in_the_order_of_keys(tmp_path: Path) -> None:
    header = {
        "b": entry("U8", [2], 2, 4),
        "a": entry("BF16", [1], 0, 2),
        "c": entry("U8", [], 4, 5),
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(in_file(header, b"12345"))
    with safe_open(path, framework="np") as opened:
        assert [t.name for t in parse(path.read_bytes()).tensors] == list(opened.keys())


def test_the_dtypes_are_those_of_the_reference() -> None:
    with pytest.raises(SafetensorError) as caught:
        deserialize(in_file({"t": entry("none", [0], 0, 0)}))
    listed = str(caught.value).partition("expected one of ")[2].partition(" at line")[0]
    assert set(listed.replace("`", "").split(", ")) == set(DTYPE_BITS)


def test_a_header_over_the_limit_is_refused_by_its_length() -> None:
    # Neither is the header there, nor is there room for a copy of it: only the length is looked at.
    first8 = (MAX_HEADER_LENGTH + 1).to_bytes(8, "little")
    with pytest.raises(MalformedHeaderError, match="limit is 100000000"):
        header_size(first8, 2**40)
    assert header_size(MAX_HEADER_LENGTH.to_bytes(8, "little"), 2**40) == MAX_HEADER_LENGTH + 8
    with pytest.raises(MalformedHeaderError, match="cut off"):
        parse_header(MAX_HEADER_LENGTH.to_bytes(8, "little") + b"{", 2**40)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (b"", "takes 8 bytes"),
        (b"1234567", "takes 8 bytes"),
        (b"\xff" * 8, "limit"),
        (in_file("{}")[:-1], "2 bytes, the whole file has 9"),
        (in_file(""), "begins with b''"),
        (in_file("[]"), "begins with b'['"),
        (in_file(b"\xef\xbb\xbf{}"), "begins with"),
        (in_file(b'{"\xff"'), "not UTF-8: invalid start byte at byte 10"),
        (in_file("{}\0"), "not valid JSON"),
        (in_file('{"a":NaN}'), "NaN"),
        (in_file('{"a":-Infinity}'), "Infinity"),
        (in_file('{"a":' + "9" * 10_000 + "}"), "not valid JSON"),
        (in_file('{"a":' + "[" * 100_000), "nested too deeply"),
        (in_file('{"a":' * 100_000), "nested too deeply"),
        (in_file('{"a":[' + "0," * 4_000_001 + "0]}"), "more than 4000000 values"),
        (in_file('{"a":' + U8 + ',"a":' + U8 + "}", b"ab"), "duplicate key 'a'"),
        (in_file('{"\\ud800":' + U8 + "}", b"ab"), "'\\ud800' is not Unicode"),
        (in_file('{"__metadata__":{"a":1}}'), "a value for 'a' that is not a string"),
        (in_file('{"__metadata__":{"a":"\\udfff"}}'), "not Unicode"),
        (in_file('{"__metadata__":[]}'), "__metadata__ is not an object"),
        (in_file('{"a":null}'), "tensor 'a' is not an object"),
        (in_file('{"a":["U8",[2],[0,2]]}', b"ab"), "tensor 'a' is not an object"),
        (in_file({"a": entry("U4", [2], 0, 1)}, b"a"), "unknown dtype: 'U4'"),
        (in_file({"a": entry({"U8": None}, [2], 0, 2)}, b"ab"), "unknown dtype: of type dict"),
        (in_file({"a": {"shape": [], "data_offsets": [0, 1]}}, b"a"), "unknown dtype: none"),
        (in_file({"a": entry("U8", [2.0], 0, 2)}, b"ab"), "non-negative integers"),
        (in_file({"a": entry("U8", [True], 0, 1)}, b"a"), "non-negative integers"),
        (in_file({"a": entry("U8", [-1, -2], 0, 2)}, b"ab"), "non-negative integers"),
        (in_file({"a": entry("U8", [0, 2**64], 0, 0)}), "non-negative integers"),
        (in_file({"a": entry("U8", [0], 1, 0)}, b"a"), "not a begin and an end"),
        (in_file({"a": entry("U8", [2**63, 2, 0], 0, 0)}), "overflows"),
        (in_file({"a": entry("U8", [2**61], 0, 2**61)}), "overflows"),
        (in_file({"a": entry("F4", [3], 0, 2)}, b"ab"), "whole number of bytes"),
        (
            in_file({"a": entry("F32", [2], 0, 4)}, b"abcd"),
            "data_offsets of tensor 'a' give 4 bytes",
        ),
        (in_file({"a": entry("U8", [1], 1, 2)}, b"ab"), "a gap before tensor 'a'"),
        (
            in_file({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"abc"),
            "an overlap at tensor 'b'",
        ),
        (in_file({"a": entry("U8", [2], 0, 2)}, b"a"), "cut off"),
        (in_file({"a": entry("U8", [2], 0, 2)}, b"abc"), "longer than its header says"),
        (in_file('{"' + "\\n" * 500 + '":0}'), "..."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_say_what_is_wrong(file: bytes, said: str) -> None:
    assert said in refused(file)


@pytest.mark.parametrize(
    "shape", ["[" + "2," * 200_000 + "0]", "[" + f"{2**64 - 1}," * 200_000 + "0]"]
)
def test_a_long_shape_makes_no_giant_number(shape: str) -> None:
    assert "overflows" in refused(in_file(f'{{"a":{U8.replace("[2]", shape)}}}', b"ab"))


@pytest.mark.parametrize(
    ("value", "reference_takes_it"),
    [('{"y":[1]}', True), ("[" * 200 + "]" * 200, False), ("1e999", False), ('"\\ud800"', False)],
    ids=["object", "deep", "huge", "surrogate"],
)
def test_unknown_fields_are_ignored(value: str, reference_takes_it: bool) -> None:
    file = in_file('{"a":' + U8[:-1] + f',"x":{value}}}}}', b"ab")
    assert parse(file).tensors[0].shape == (2,)
    assert (reference(file) is not None) == reference_takes_it


def test_listed_differences_to_the_reference() -> None:
    for taken_by_the_crate_only in (
        in_file("  {}"),
        in_file('{"a":' + U8 + ',"a":' + U8 + "}", b"ab"),
        in_file('{"__metadata__":{"a":"b","a":"c"}}'),
        in_file('{"a":["U8",[2],[0,2]]}', b"ab"),
        in_file('{"a":{"dtype":{"U8":null},"shape":[2],"data_offsets":[0,2]}}', b"ab"),
    ):
        assert reference(taken_by_the_crate_only) is not None
        refused(taken_by_the_crate_only)
    taken_by_us_only = in_file('{"a":' + U8.replace("[0,", "[-0,") + "}", b"ab")
    assert reference(taken_by_us_only) is None
    assert parse(taken_by_us_only).tensors[0].shape == (2,)


def test_many_tensors() -> None:
    header = {f"layer.{i}": entry("BF16", [1, 2], 4 * i, 4 * i + 4) for i in range(20_000)}
    text = in_file(header)
    table = parse_header(text, len(text) + 80_000)
    assert all(first.end == second.begin for first, second in pairwise(table.tensors))
    found = table.at(table.header_bytes + 4 * 17_777 + 3)
    assert found is not None and found.name == "layer.17777"


@pytest.mark.parametrize("value", ["[]", '{"a":1}', '{"dtype":"U8","shape":[0]}'])
def test_a_hostile_header_takes_memory_in_proportion(value: str) -> None:
    """Of many small things, which take most; what is read into memory has 16 MiB at most."""
    text = (
        "{" + ",".join(f'"{at:06x}":{value}' for at in range((2 << 20) // (len(value) + 10))) + "}"
    )
    header = len(text).to_bytes(8, "little") + text.encode()
    tracemalloc.start()
    with pytest.raises(MalformedHeaderError):
        parse_header(header, 1 << 40)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 30 * len(header)
