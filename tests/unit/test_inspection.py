"""What is said of a source that nobody has mounted."""

from __future__ import annotations

import json
import re
import struct

import pytest

from lazyfs.errors import AccessDeniedError
from lazyfs.model.inspection import Model, group_similar, inspect_files, layer_of


def shard(*names: str, size: int = 4, dtype: str = "BF16") -> bytes:
    """A safetensors file of tensors of so many bytes."""
    header = {
        name: {"dtype": dtype, "shape": [size // 2], "data_offsets": [at * size, at * size + size]}
        for at, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size * len(names))


def look(files: dict[str, bytes], **settings: object) -> list[Model]:
    def read(path: str, offset: int, length: int) -> bytes:
        return files[path][offset : offset + length]

    sizes = {path: len(content) for path, content in files.items()}
    return inspect_files(sizes, read, **settings)  # type: ignore[arg-type]


ONE = {
    "model-1.safetensors": shard("model.layers.0.a", "model.layers.0.b", "model.layers.1.a"),
    "model-2.safetensors": shard("lm_head.weight", "model.layers.1.b", "model.layers.10.a"),
    "config.json": b"{}",
}


def test_layers_and_what_is_in_them() -> None:
    (model,) = look(ONE)
    assert [(layer.name, layer.tensors, layer.size_bytes) for layer in model.layers] == [
        ("lm_head", 1, 4),
        ("model.layers.0", 2, 8),
        ("model.layers.1", 2, 8),
        ("model.layers.10", 1, 4),
    ]
    assert model.total.parameters == 12
    assert model.total.dtypes == {"BF16": 24}
    assert [item.path for item in model.shards] == ["model-1.safetensors", "model-2.safetensors"]


def test_layers_that_are_alike_are_shown_once() -> None:
    (model,) = look(ONE)
    assert [(name, count) for name, _, count in group_similar(model.layers)] == [
        ("lm_head", 1),
        ("model.layers.0-1", 2),
        ("model.layers.10", 1),
    ]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.7.mlp.experts.3.up", "model.layers.7"),
        ("transformer.h.0", "transformer.h.0"),
        ("lm_head.weight", "lm_head"),
        ("weight", "weight"),
        ("", ""),
        ("7", "7"),
        ("x." + "9" * 5000, "x." + "9" * 5000),
    ],
)
def test_the_layer_of_a_name(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_a_hostile_number_is_no_trouble() -> None:
    (model,) = look({"m.safetensors": shard("x." + "9" * 5000, "x.1")})
    assert model.total.tensors == 2


@pytest.mark.parametrize("body", [b"", b"x", b"\xff" * 64, bytes(64)], ids=repr)
def test_invalid_headers_are_reported_for_their_shard(body: bytes) -> None:
    (model,) = look({**ONE, "model-3.safetensors": body})
    assert [item.tensors for item in model.shards] == [3, 3, None]
    assert ("its header is not valid" if body else "empty") in str(model.shards[2].trouble)


def test_unreadable_headers_are_reported_for_their_shard() -> None:
    def read(path: str, offset: int, length: int) -> bytes:
        raise AccessDeniedError("denied")

    (model,) = inspect_files({"m.safetensors": 100}, read)
    assert model.shards[0].trouble == "denied"


def test_when_it_is_prefetched() -> None:
    several = {f"{name}/{path}": body for name in "ab" for path, body in ONE.items()}
    assert [model.prefetched for model in look(ONE)] == ["mount"]
    assert [model.prefetched for model in look(ONE, prefetch_on="open")] == ["open"]
    assert [model.prefetched for model in look(ONE, prefetch="sequential")] == ["never"]
    assert [model.prefetched for model in look(several)] == ["open", "open"]


def test_how_much_of_a_shard_is_wanted() -> None:
    (model,) = look(ONE, wanted=lambda name: ".layers.0." in name)
    assert [item.wanted_bytes for item in model.shards] == [8, 0]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0123" * 16 + b"\nsize 99\n"
INDEX = json.dumps(
    {"weight_map": {"a": "model-1.safetensors", "b": "model-7.safetensors"}}
).encode()
# No values, and one tensor of 512 numbers in F32.
GGUF = b"GGUF" + struct.pack("<IQQ Q1sIQIQ", 3, 1, 0, 1, b"t", 1, 512, 0, 0) + bytes(7 + 2048)
TORCH = b"PK\3\4\0\0\x08\x08\0\0" + bytes(16) + b"\x10\0\x12\0archive/data.pkl" + bytes(300)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"model-2.safetensors": ONE["model-2.safetensors"][:-1]},
            "model-2.safetensors: .*cut off",
        ),
        (
            {"model-2.safetensors": ONE["model-2.safetensors"][:20]},
            "model-2.safetensors: .*cut off",
        ),
        ({"model-2.safetensors": b""}, "model-2.safetensors is empty"),
        ({"model-2.safetensors": POINTER}, "model-2.safetensors is a Git LFS pointer"),
        ({"tokenizer.json": POINTER}, "tokenizer.json is a Git LFS pointer"),
        ({"q4.gguf": POINTER, "q8.gguf": bytes(2000)}, None),
        (
            {"model.safetensors.index.json": INDEX},
            "shards that do not exist: 'model-7.safetensors'",
        ),
        ({"encoder.pth": TORCH}, "encoder.pth is cut off"),
        ({"encoder.pth": TORCH + b"PK\5\6" + bytes(18)}, None),
        ({"encoder.pth": b"PK\3\4" + bytes(500)}, None),
    ],
    ids=str,
)
def test_a_broken_model_is_told_from_a_whole_one(files: dict[str, bytes], said: str | None) -> None:
    (model,) = look({**ONE, **files})
    assert [*model.broken] == [] if said is None else re.search(said, "; ".join(model.broken))


def test_a_gguf_that_is_cut_off_is_told_from_a_whole_one() -> None:
    assert [*look({"q4.gguf": GGUF})[0].broken] == []
    for size in (len(GGUF) - 1, 40, 10):
        (why,) = look({"q4.gguf": GGUF[:size]})[0].broken
        assert re.match(r"q4\.gguf: .*it is cut off; upload it again", why)


def test_one_of_many_models_that_is_cut_off_is_named() -> None:
    many = {"q4.gguf": GGUF, "q6.gguf": GGUF[:-1], "q8.gguf": GGUF}
    (model,) = look(many)
    assert not model.shards
    (why,) = model.broken
    assert why.startswith("q6.gguf: ")
    assert [*look(many, look_at_alternatives=False)[0].broken] == []


def test_a_gguf_with_an_odd_header_is_a_warning() -> None:
    (model,) = look({"q4.gguf": b"ggml" + bytes(2000)})
    assert [*model.broken] == []
    assert "its header is not valid" in str(model.shards[0].trouble)


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["q8-00001-of-00003.gguf", "q8-00003-of-00003.gguf"], "'q8-00002-of-00003.gguf'"),
        (["q8-00001-of-00002.gguf", "q4.gguf"], "'q8-00002-of-00002.gguf'"),
        (["pytorch_model_00000-of-00002.bin"], "'pytorch_model_00001-of-00002.bin'"),
        (["model.fp16-00002-of-00002.safetensors"], "'model.fp16-00001-of-00002.safetensors'"),
        (["q8-00001-of-00002.gguf", "q8-00002-of-00002.gguf"], ""),
    ],
    ids=str,
)
def test_parts_are_missed_by_their_numbers(names: list[str], missing: str) -> None:
    (model,) = look(dict.fromkeys(names, b"x" * 2000))
    assert missing in "".join(model.broken) and bool(model.broken) == bool(missing)


def test_lfs_pointers_among_many_models_are_reported() -> None:
    (model,) = look({"q4.gguf": POINTER, "q8.gguf": POINTER})
    assert len(model.broken) == 2 and not model.shards


def test_unreadable_files_break_the_model() -> None:
    def read(path: str, offset: int, length: int) -> bytes:
        raise AccessDeniedError(f"{path}: denied")

    files = {"model.safetensors.index.json": 100, "model-1.safetensors": 100, "vae.pth": 100}
    (model,) = inspect_files(files, read)
    assert [*model.broken] == [f"{path}: denied" for path in files]


def test_components_that_a_pipeline_lacks() -> None:
    components = {
        "vae": ["diffusers", "V"],
        "unet": ["diffusers", "U"],
        "scheduler": ["d", "XScheduler"],
    }
    files = {"model_index.json": json.dumps(components).encode(), "vae/a.safetensors": shard("a")}
    broken = [why for model in look(files) for why in model.broken]
    assert len(broken) == 1 and "'unet'" in broken[0] and "scheduler" not in broken[0]
