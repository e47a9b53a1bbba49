"""Listings of models as they are published, and what a loader reads of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.model.directory import SMALL_COUNT, SMALL_TOTAL_BYTES, ModelFile
from lazyfs.model.indexes import MAX_INDEX_BYTES, MalformedIndexError, parse_index
from lazyfs.model.layout import ModelLayout, layouts
from lazyfs.model.selection import wanted_models

LAYOUT = Path(__file__).parent.parent / "data" / "llama-6-shards.layout.json"
INDEX = "model.safetensors.index.json"
GB = 10**9
MIB = 1 << 20


def listing(*paths: str, weights: int = GB) -> list[ModelFile]:
    """Files of the sizes that such files have."""
    small = (".json", ".txt", ".md", ".py", ".jinja", ".png")
    return [ModelFile(path, 2_000 if path.endswith(small) else weights) for path in paths]


def index(*names: object) -> bytes:
    return json.dumps({"weight_map": {f"t{i}": name for i, name in enumerate(names)}}).encode()


def only(*paths: str, indexes: Mapping[str, bytes] | None = None) -> ModelLayout:
    """The layout of a listing that holds one model."""
    (found,) = layouts(listing(*paths), indexes=indexes or {})
    return found


def left_out(layout: ModelLayout) -> set[str]:
    assert all(excluded.reason for excluded in layout.excluded)
    return {excluded.path for excluded in layout.excluded}


def test_the_recorded_model() -> None:
    recorded = json.loads(LAYOUT.read_text())
    files = [ModelFile(name, file["size_bytes"]) for name, file in recorded.items()]
    shards = tuple(f"model-0000{i}-of-00006.safetensors" for i in range(1, 7))
    (before,) = layouts(reversed(files))
    assert (before.directory, before.format, before.shards) == ("", "safetensors", shards)
    assert before.small == ("config.json", INDEX, "generation_config.json")
    assert before.index_paths == (INDEX,)
    contents = json.dumps(recorded[INDEX]["json"]).encode()
    assert layouts(files, indexes={INDEX: contents}) == (before,)


def test_the_order_of_shards_is_natural() -> None:
    names = [f"model-{i}-of-12.safetensors" for i in range(1, 13)]
    assert only(*sorted(names)).shards == tuple(names)
    long = "a" + "1" * 5000 + ".safetensors"
    assert only("config.json", long, "a2.safetensors").shards == ("a2.safetensors", long)


def test_duplicates_of_a_published_model_are_excluded() -> None:
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    copies = (
        "consolidated.safetensors",
        "flax_model.msgpack",
        "tf_model.h5",
        "rust_model.ot",
        "model.gguf",
        "pytorch_model-00001-of-00001.bin",
        "original/consolidated.00.pth",
        "original/model.safetensors",
        "onnx/model.onnx",
        "onnx/fp16/model.onnx_data",
        "openvino/openvino_model.bin",
        "pytorch_model_fsdp.bin",
        "optimizer.pt",
        "optimizer-00001-of-00002.safetensors",
        "training_args.bin",
        "rng_state_0.pth",
    )
    layout = only(*copies, *shards, "config.json", "onnx/config.json", "README.md")
    assert layout.shards == shards
    assert left_out(layout) == set(copies)
    assert layout.small == ("config.json", "README.md")


@pytest.mark.parametrize("directory", [".ipynb_checkpoints", ".git/lfs/objects/ab", "x/.git"])
def test_what_programs_leave_in_a_folder_is_no_component(directory: str) -> None:
    found = layouts(
        listing("model.safetensors", "config.json", f"{directory}/checkpoint.safetensors")
    )
    assert [path for each in found for path in each.shards] == ["model.safetensors"]


def test_a_hidden_folder_may_have_a_model() -> None:
    found = only(".models/a/model.safetensors", ".models/a/config.json")
    assert found.shards == (".models/a/model.safetensors",)


def test_the_index_says_which_shards_are_read() -> None:
    files = (INDEX, "a.safetensors", "b.safetensors", "extra.safetensors")
    layout = only(*files, indexes={INDEX: index("b.safetensors", "a.safetensors")})
    assert layout.shards == ("a.safetensors", "b.safetensors", "extra.safetensors"), (
        "what it does not name is a component"
    )
    assert layout.warnings == layout.problems == ()
    named = index("model-1-of-2.safetensors", "model-2-of-2.safetensors")
    layout = only(
        *(f"model-{n}-of-2.safetensors" for n in (1, 2)), "model.safetensors", INDEX,
        indexes={INDEX: named},
    )  # fmt: skip
    assert left_out(layout) == {"model.safetensors"}


def test_a_wrong_index_is_used_as_far_as_it_is_right() -> None:
    named = ["a.safetensors", "gone.safetensors", "../b.safetensors", "d/b.safetensors", "..", ""]
    layout = only(INDEX, "a.safetensors", "b.safetensors", indexes={INDEX: index(*named)})
    assert layout.shards[0] == "a.safetensors"
    (foreign,) = layout.warnings
    (missing,) = layout.problems
    assert "outside its directory" in foreign and "and 1 more" in foreign
    assert "do not exist: 'gone.safetensors'" in missing


@pytest.mark.parametrize("contents", [b"", b"\xff", b"<html>404</html>", index("a")[:-1]])
def test_a_model_with_an_index_that_is_no_json_is_broken(contents: bytes) -> None:
    layout = only(INDEX, "b.safetensors", "a.safetensors", indexes={INDEX: contents})
    assert layout.shards == ("a.safetensors", "b.safetensors")
    (problem,) = layout.problems
    assert f"{INDEX} is broken: it is not valid JSON" in problem
    single = only(INDEX, "model.safetensors", indexes={INDEX: contents})
    assert single.problems == (), "loaders do not look at the index of one file"


def test_an_index_may_name_shards_in_another_directory() -> None:
    names = "a.safetensors", "x/b.safetensors", "../c.safetensors"
    there = [f"m/{INDEX}", "m/config.json", "m/a.safetensors", "m/x/b.safetensors"]
    contents = {f"m/{INDEX}": index(*names)}
    whole = layouts(listing(*there, "c.safetensors"), indexes=contents)
    assert [problem for each in whole for problem in each.problems] == []
    (problem,) = (
        problem for each in layouts(listing(*there), indexes=contents) for problem in each.problems
    )
    assert "do not exist: '../c.safetensors'" in problem


@pytest.mark.parametrize(
    "contents", [b"[" * 100_000, b"{}", index(), index("no.safetensors"), index(1)]
)
def test_a_useless_index_leaves_the_order_of_the_names_and_a_warning(contents: bytes) -> None:
    files = (INDEX, "b.safetensors", "a.safetensors", "consolidated.safetensors")
    layout = only(*files, indexes={INDEX: contents})
    assert layout.shards == ("a.safetensors", "b.safetensors")
    assert left_out(layout) == {"consolidated.safetensors"}
    assert any(INDEX in warning and "ignored" in warning for warning in layout.warnings)
    assert not any("\n" in warning for warning in layout.warnings)


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "no object 'weight_map'"),
        (b'{"weight_map":["a"]}', "no object 'weight_map'"),
        (b'{"weight_map":{"a":null}}', "not a string"),
        (b" " * (MAX_INDEX_BYTES + 1), "limit"),
    ],
)
def test_a_malformed_index_says_what_is_wrong(contents: bytes, said: str) -> None:
    with pytest.raises(MalformedIndexError, match=said):
        parse_index(contents)


def test_consolidated_shards_alone_are_the_model() -> None:
    name = "consolidated.safetensors.index.json"
    layout = only(name, "consolidated-1.safetensors", "consolidated-2.safetensors", "params.json")
    assert layout.shards == ("consolidated-1.safetensors", "consolidated-2.safetensors")
    assert layout.index_paths == (name,)
    assert only(name, INDEX, "consolidated.safetensors", "x.safetensors").index_paths == (INDEX,)


def test_a_file_too_large_for_an_index_is_not_asked_for() -> None:
    sizes = {"1.safetensors": 9, INDEX: MAX_INDEX_BYTES + 1}
    (layout,) = layouts([ModelFile(name, size) for name, size in sizes.items()])
    assert (layout.index_paths, layout.shards) == ((), ("1.safetensors",))
    assert f"{INDEX} is ignored: it has {MAX_INDEX_BYTES + 1} bytes" in layout.warnings[0]
    (layout,) = layouts([ModelFile(name, min(size, 99)) for name, size in sizes.items()])
    assert layout.index_paths == (INDEX,)


def test_small_files_are_in_the_order_in_which_they_are_read() -> None:
    wanted = (
        "config.json",
        INDEX,
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer_config.json",
        "tokenizer.json",
        "modeling_new.py",
        "NOTICE.txt",
        "README.md",
    )
    assert only(*sorted(wanted), "a.safetensors").small == wanted


def test_small_files_are_bounded() -> None:
    files = [ModelFile(f"{i}.json", 30 * MIB) for i in range(4)] + listing("a.safetensors")
    files += [ModelFile("config.json", 1), ModelFile("video.mp4", 2 * MIB)]
    (layout,) = layouts(files)
    assert layout.small == ("config.json", "0.json", "1.json")
    sizes = {file.path: file.size_bytes for file in files}
    assert sum(sizes[path] for path in layout.small) <= SMALL_TOTAL_BYTES
    texts = [f"{i}.txt" for i in range(2 * SMALL_COUNT)]
    (many,) = layouts(listing("a.safetensors", *texts))
    assert len(many.small) == SMALL_COUNT
    (heap,) = layouts(listing(*texts))
    assert heap.small == (), "which of them is read?"
    (few,) = layouts(listing(*texts[:SMALL_COUNT]))
    assert len(few.small) == SMALL_COUNT


def test_several_models_below_a_prefix() -> None:
    found = layouts(
        listing(
            "README.md",
            "llama/config.json",
            "llama/model.safetensors",
            "llama/original/consolidated.00.pth",
            "old/pytorch_model.bin",
            "old/consolidated.pth",
            "lora/adapter_config.json",
            "lora/adapter_model.safetensors",
            "lora/checkpoint-5/adapter_model.safetensors",
        )
    )
    assert [(layout.directory, layout.format, layout.shards) for layout in found] == [
        ("", "other", ()),
        ("llama", "safetensors", ("llama/model.safetensors",)),
        ("lora", "safetensors", ("lora/adapter_model.safetensors",)),
        ("lora/checkpoint-5", "safetensors", ("lora/checkpoint-5/adapter_model.safetensors",)),
        ("old", "pytorch", ("old/pytorch_model.bin",)),
    ]
    assert found[0].small == ("README.md",)
    assert found[2].small == ("lora/adapter_config.json",)
    assert left_out(found[1]) == {"llama/original/consolidated.00.pth"}
    assert left_out(found[4]) == {"old/consolidated.pth"}


def test_original_is_a_model_where_nothing_is_above_it() -> None:
    assert only("m/original/consolidated.00.pth").directory == "m/original"


def test_a_diffusers_pipeline() -> None:
    found = layouts(
        listing(
            "sd/model_index.json",
            "sd/v1-5-pruned.safetensors",
            "sd/v1-5-pruned.ckpt",
            "sd/scheduler/scheduler_config.json",
            "sd/tokenizer/vocab.json",
            "sd/vae/config.json",
            "sd/vae/diffusion_pytorch_model.safetensors",
            "sd/vae/diffusion_pytorch_model.fp16.safetensors",
            "sd/vae/diffusion_pytorch_model.bin",
            "sd/vae_decoder/model.onnx",
            "sd/vae_decoder/openvino_model.bin",
            "sd/unet/diffusion_pytorch_model-00001-of-00002.safetensors",
            "sd/unet/diffusion_pytorch_model-00002-of-00002.safetensors",
            "sd/unet/diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
            "sd/unet/diffusion_pytorch_model.non_ema.safetensors",
            "sd/text_encoder/model.fp16.safetensors",
        )
    )
    assert [layout.directory for layout in found] == ["sd", "sd/text_encoder", "sd/unet", "sd/vae"]
    root, text_encoder, unet, vae = found
    assert root.shards == ()
    assert root.small == (
        "sd/model_index.json",
        "sd/scheduler/scheduler_config.json",
        "sd/tokenizer/vocab.json",
    )
    assert left_out(root) == {
        "sd/v1-5-pruned.safetensors",
        "sd/v1-5-pruned.ckpt",
        "sd/vae_decoder/model.onnx",
        "sd/vae_decoder/openvino_model.bin",
    }
    assert text_encoder.shards == ("sd/text_encoder/model.fp16.safetensors",)
    assert [path.rpartition("model")[2] for path in unet.shards] == [
        "-00001-of-00002.safetensors",
        "-00002-of-00002.safetensors",
    ]
    assert len(left_out(unet)) == 2
    assert vae.shards == ("sd/vae/diffusion_pytorch_model.safetensors",)
    assert len(left_out(vae)) == 2


def test_a_copy_of_a_copy_is_left_out_with_it() -> None:
    paths = ("m/a.safetensors", "unet/e.onnx", "unet/original/a.safetensors")
    root, one = layouts(listing("model_index.json", *paths))
    assert one.shards == paths[:1]
    assert left_out(root) == set(paths[1:])


def test_gguf() -> None:
    split = tuple(f"q8-0000{i}-of-00003.gguf" for i in (1, 2, 3))
    layout = only(*reversed(split), "mmproj-f16.gguf", "config.json")
    assert (layout.format, layout.shards) == ("gguf", ("mmproj-f16.gguf", *split))
    several = only("q4.gguf", *split)
    assert several.shards == () and left_out(several) == {"q4.gguf", *split}


def test_plain_files_are_no_model() -> None:
    assert layouts([]) == ()
    layout = only("data/a.parquet", "data/b.txt")
    assert layout == ModelLayout("", "other", small=("data/b.txt",))
    for order in (("d/e/b.txt", "a.txt"), ("a.txt", "d/e/b.txt")):
        assert only(*order).small == ("a.txt", "d/e/b.txt")
    assert only("model.onnx", "model.onnx_data").shards == ("model.onnx", "model.onnx_data")


SHARDS = ("model-1.safetensors", "model-2.safetensors")
SECOND = ("consolidated-1.safetensors", "consolidated-2.safetensors")


@pytest.mark.parametrize(
    ("include", "included"),
    [
        (["model*", "consolidated*"], SECOND),
        (["*.safetensors"], ()),
        (["*"], ()),
        (["*.safetensors", "*.gguf"], ("q8.gguf",)),
        (["*.safetensors", "original/*", "consolidated-2*"], (SECOND[1], "original/a.pth")),
    ],
    ids=str,
)
def test_files_included_by_name_come_after_the_shards(
    include: list[str], included: tuple[str, ...]
) -> None:
    files = listing(*SECOND, *SHARDS, "q8.gguf", "original/a.pth", "config.json")
    (layout,) = layouts(files, include=include)
    assert layout.shards == SHARDS + included
    assert layout.included == included
    assert left_out(layout) == {*SECOND, "q8.gguf", "original/a.pth"} - set(included)


def test_a_pattern_of_several_gguf_models_does_not_say_which() -> None:
    files = listing("a.safetensors", "q4.gguf", "q8.gguf")
    (layout,) = layouts(files, include=["a*", "*.gguf"])
    assert layout.shards == ("a.safetensors",)
    (layout,) = layouts(files, include=["a*", "*.gguf", "q4*"])
    assert layout.shards == ("a.safetensors", "q4.gguf")
    (layout,) = layouts(listing("q4.gguf", "q8.gguf"), include=["q8*", "*.gguf"])
    assert layout.shards == ("q8.gguf",) and left_out(layout) == {"q4.gguf"}


def test_files_included_by_name_stay_if_other_weights_are_read() -> None:
    files = listing(*SECOND, *SHARDS, "a.gguf")
    (layout,) = layouts(files, include=["*.safetensors", "*.gguf"], read=[SECOND[0]])
    assert layout.shards == (*SECOND, "a.gguf") and left_out(layout) == set(SHARDS)
    (layout,) = layouts(files, include=["*.safetensors", "*.gguf"], read=["a.gguf"])
    assert layout.shards == ("a.gguf",) and layout.included == ()


def test_two_thousand_shards_and_a_hundred_thousand_files() -> None:
    names = [f"model-{i:05}-of-02000.safetensors" for i in range(1, 2001)]
    files = listing(*reversed(names), INDEX, *(f"set/{i % 997}/{i}.txt" for i in range(98_000)))
    found = layouts(files, indexes={INDEX: index(*names, *(f"gone-{i}" for i in range(50_000)))})
    assert [layout.shards for layout in found] == [tuple(names)]
    assert len(found[0].problems) == 1 and len(found[0].problems[0]) < 200


PARTS = st.sampled_from(
    ["m", "unet", "original", "onnx", "model_index.json", "config.json", INDEX, "optimizer.pt",
     "a.safetensors", "a.fp16.safetensors", "consolidated.safetensors", "a.bin", "b.pth", "c.gguf",
     "d-00001-of-00002.gguf", "e.onnx", "f"]
)  # fmt: skip
PATHS = st.lists(PARTS, min_size=1, max_size=4).map("/".join)


PATTERNS = st.sampled_from(["*", "*.gguf", "consolidated*", "*.fp16.*", "m/*", "original/*", "a*"])


@given(
    st.lists(PATHS, unique=True),
    st.lists(st.one_of(PARTS, st.text(max_size=4))),
    st.lists(PATTERNS),
    st.data(),
)
def test_every_file_of_a_listing_is_classified_once(
    paths: list[str], named: list[str], include: list[str], data: st.DataObject
) -> None:
    indexes = {path: index(*named) for path in paths if path.endswith(INDEX)}
    found = layouts(listing(*paths), indexes=indexes, include=include)
    again = listing(*data.draw(st.permutations(paths)))
    assert found == layouts(again, indexes=indexes, include=include)
    assert len({layout.directory for layout in found}) == len(found)
    told = [path for layout in found for path in (*layout.shards, *left_out(layout), *layout.small)]
    assert len(told) == len(set(told)) and set(told) <= set(paths)
    # No weights are lost, but for training state in a directory that holds nothing else.
    weights = (".safetensors", ".bin", ".pth", ".gguf", ".onnx")
    assert {path for path in paths if path.endswith(weights)} <= set(told)
    for layout in found:
        chosen = set(layout.shards).difference(layout.included)
        assert all(path.rpartition("/")[0] == layout.directory for path in chosen)
        assert layout.shards[len(chosen) :] == layout.included


@given(st.binary(max_size=60))
def test_any_bytes_as_an_index_do_no_harm(contents: bytes) -> None:
    try:
        names = parse_index(contents)
    except MalformedIndexError:
        return
    assert all(isinstance(name, str) for name in names)


def calls_for(listed: Sequence[ModelFile], read: Sequence[str]) -> int:
    """How many functions are called to sort a listing out."""
    count = 0

    def see(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event == "call"

    former = sys.getprofile()
    sys.setprofile(see)
    try:
        layouts(listed, read=read, include=["*.pt"])
    finally:
        sys.setprofile(former)
    return count


@pytest.mark.parametrize(
    "each",
    [
        ("x{0}q.safetensors",),
        ("x{0}q.safetensors", "x{0}q.bin"),
        ("config.json", "x{0}q.safetensors"),
        ("m{0}/config.json", "m{0}/model.safetensors"),
        ("model_index.json", "part{0}/model.safetensors", "part{0}/model.fp16.safetensors"),
        ("p{0}/model_index.json", "p{0}/unet/model.safetensors", "p{0}/vae/model.safetensors"),
    ],
)
def test_twice_the_files_take_no_more_than_twice_the_work(each: Sequence[str]) -> None:
    """A bucket may have 100,000 models, and one interpreter answers its readers, too."""

    def work(count: int) -> int:
        paths = {text.format(f"{i:04}") for i in range(count) for text in each}
        first = min(path for path in paths if path.endswith(".safetensors"))
        return calls_for(listing(*sorted(paths)), [first])

    assert work(400) < 2.3 * work(200)


@pytest.mark.parametrize(
    "encoder, model, expected",
    [
        ("models_t5_umt5-xxl-enc-bf16.pth", "diffusion_pytorch_model-0000{}-of-00002.safetensors",
         "safetensors"),
        ("text_encoder.onnx", "model-0000{}-of-00002.safetensors", "safetensors"),
    ],
)  # fmt: skip
def test_the_format_is_that_of_the_model_not_of_its_text_encoder(
    encoder: str, model: str, expected: str
) -> None:
    shards = [model.format(number) for number in (1, 2)]
    name = f"{shards[0].partition('-0000')[0]}.safetensors.index.json"
    found = only("config.json", encoder, name, *shards, indexes={name: index(*shards)})
    assert found.shards == (encoder, *shards)
    assert found.format == expected


def test_a_pipeline_comes_before_its_components_even_if_one_has_a_tokenizer() -> None:
    found = layouts(
        listing(
            "model_index.json", "image_encoder/model.safetensors",
            "text_encoder/config.json", "text_encoder/model.safetensors",
            "text_encoder/tokenizer.json", "unet/diffusion_pytorch_model.safetensors",
        ),
        indexes={"model_index.json": json.dumps({
            "_class_name": "P", "image_encoder": ["t", "I"], "text_encoder": ["t", "T"],
            "unet": ["d", "U"],
        }).encode()},
    )  # fmt: skip
    directories = ["", "image_encoder", "text_encoder", "unet"]
    assert [each.directory for each in found if each.paths] == directories


def wanted(*paths: str, opened: Sequence[str] = ()) -> list[str]:
    """The weights that are fetched after these files were opened or read."""
    found = layouts(listing(*paths), read=[path for path in opened if path.endswith(".gguf")])
    chosen = wanted_models(found, on_mount=True, opened=opened)
    return [path for each in chosen for path in each.shards]


def test_a_gguf_model_at_the_root_is_one_of_several_if_others_lie_below() -> None:
    assert wanted("q4.gguf", "Q8/q8.gguf") == []
    assert wanted("q4.gguf", "Q8/q8.gguf", opened=["q4.gguf"]) == ["q4.gguf"]
    assert wanted("model.safetensors", "config.json", "Q8/q8.gguf") == ["model.safetensors"]
    beside = "q4.gguf", "mmproj/mmproj-f16.gguf", "mmproj/README.md"
    assert wanted(*beside) == ["q4.gguf"], "a projector is no model"


def test_a_projector_that_is_read_says_nothing_about_the_models_beside_it() -> None:
    paths = "q4.gguf", "mmproj-f16.gguf", "Q8/q8.gguf"
    assert wanted(*paths, opened=["Q8/q8.gguf", "mmproj-f16.gguf"]) == ["Q8/q8.gguf"]


def test_further_directories_of_one_component_have_numbers() -> None:
    named = {"controlnet": ["m", "MultiControlNetModel"], "unet": ["d", "UNet2DConditionModel"]}
    found = layouts(
        listing(
            "model_index.json", "controlnet/a.safetensors", "controlnet_1/a.safetensors",
            "unet/a.safetensors", "unet_1/a.safetensors", "controlnet_x/a.safetensors",
        ),
        indexes={"model_index.json": json.dumps(named).encode()},
    )  # fmt: skip
    assert [path for each in found for path in each.shards] == [
        "controlnet/a.safetensors", "controlnet_1/a.safetensors", "unet/a.safetensors",
    ]  # fmt: skip
    assert [each.problems for each in found if each.problems] == []


def test_bin_files_are_data_of_onnx_models_only_if_nothing_else_explains_them() -> None:
    graph = ModelFile("model.onnx", MIB)

    def read(*others: ModelFile) -> set[str]:
        (found,) = layouts([ModelFile("config.json", 9), graph, *others])
        return set(found.shards)

    data = ModelFile("weights.bin", GB)
    assert read(data) == {"model.onnx", "weights.bin"}
    assert read(ModelFile("pytorch_model.bin", GB)) == {"pytorch_model.bin"}
    assert read(ModelFile("weights.bin", MIB // 2)) == {"weights.bin"}, "the graph has its own"
    assert "model.onnx" not in read(data, ModelFile("model.safetensors", GB))


def test_small_blobs_of_ollama_are_no_weights() -> None:
    large, small = (f"blobs/sha256-{digit * 64}" for digit in "ab")
    (found,) = layouts([ModelFile(large, GB), ModelFile(small, 500)])
    assert (found.format, found.shards, found.small) == ("gguf", (large,), (small,))


def test_a_loader_of_open_clips_copy_is_followed() -> None:
    files = listing("config.json", "model.safetensors", "open_clip_model.safetensors")
    (found,) = layouts(files, read=["open_clip_model.safetensors"])
    assert found.shards == ("open_clip_model.safetensors",)


def test_a_directory_is_a_part_of_the_model_above_only_if_a_file_says_so() -> None:
    def groups(*paths: str) -> set[str]:
        return {each.group for each in layouts(listing(*paths)) if each.shards}

    data = "m/manifest.ocdbt", "m/d/0", "m/ocdbt.process_1/manifest.ocdbt", "m/ocdbt.process_1/d/1"
    signs = [ModelFile(path, 100 if "manifest" in path else GB) for path in data]
    assert {each.group for each in layouts(signs) if each.shards} == {"m"}
    assert groups("m/config.json", "m/d/a.safetensors") == {"m/d"}
    modules = "m/0_A/model.safetensors", "m/2_B/model.safetensors"
    assert groups("m/modules.json", *modules) == {"m"}
    assert groups(*modules) == {"m/0_A", "m/2_B"}
