"""What file names in model repositories mean. Pure. Names come without directories."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from posixpath import splitext
from types import MappingProxyType
from typing import Literal, TypeAlias

# `other`: of an engine, a checkpoint or a tool of its own. `export`: of another framework, into
# which publishers convert whole models.
Format: TypeAlias = Literal["safetensors", "pytorch", "gguf", "onnx", "other", "export"]

# A file below this size is small, whatever its name.
SMALL_FILE_BYTES = 1 << 20

_FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        ".safetensors": "safetensors",
        ".bin": "pytorch",
        ".pt": "pytorch",
        ".pth": "pytorch",
        ".ckpt": "pytorch",
        ".gguf": "gguf",
        ".onnx": "onnx",
        ".onnx_data": "onnx",
        ".distcp": "other",  # torch.distributed.checkpoint
        ".engine": "other",  # TensorRT
        ".plan": "other",
        ".tensors": "other",  # tensorizer
        ".nemo": "other",
        ".npy": "other",
        ".npz": "other",
        ".litertlm": "other",
        ".task": "other",
        ".pte": "other",  # ExecuTorch
        ".pdiparams": "other",  # Paddle
        ".keras": "other",
        ".h5": "export",
        ".mlmodel": "export",
        ".msgpack": "export",
        ".ot": "export",
        ".tflite": "export",
    }
)
# Names whose suffix has a number: ONNX's external data, ServerlessLLM, TensorFlow's variables.
_NUMBERED: Sequence[tuple[re.Pattern[str], Format]] = (
    (re.compile(r".+\.onnx([._]data|\.data)([._-]?\d+)?$"), "onnx"),
    (re.compile(r".+\.data_\d+$"), "other"),
    (re.compile(r".+\.data-\d+-of-\d+$"), "other"),
)
# If a model is there in several formats, loaders read the first of these.
FORMAT_ORDER: Sequence[Format] = ("safetensors", "pytorch", "gguf", "onnx", "other", "export")
PYTORCH_ORDER = (".bin", ".pt", ".pth", ".ckpt")
# Directories in which publishers put copies of the model in the parent directory.
COPY_DIRECTORIES = frozenset(
    {"coreml", "flax", "metal", "onnx", "openvino", "original", "tf", "tflite"}
)
# Files that are large and never weights, so that a model's unknown weights are told from them.
_NO_WEIGHTS = re.compile(
    r".*\.(?:7z|arrow|avi|bmp|bz2|csv|db|flac|gif|gz|html|ipynb|jpe?g|jsonl?|log|md|mov|mp3|mp4|"
    r"mlpackage|ogg|parquet|pdf|png|rar|rst|sh|so|sql|sqlite|svg|tar|tfrecord|tgz|tiff|tsv|txt|"
    r"wav|webm|webp|whl|xml|xz|zip|zst)$",
    re.IGNORECASE,
)
# Files of the transformers Trainer (see vLLM's filter_files_not_needed_for_inference), of DeepSpeed
# and of Megatron.
TRAINING_STATE = re.compile(
    r"(training_args\.bin|optimizer([-_.]\d+-of-\d+)?\.(bin|pt|safetensors)|scheduler\.pt|scaler\.pt|"
    r"rng_state.*\.pth|.+_optim_states\.pt|distrib_optim\.pt)$"
)
# llama.cpp's importance matrix, which llama-quantize reads.
IMATRIX = re.compile(r".*imatrix.*\.(dat|gguf|gguf_file)$|.*\.imatrix$", re.IGNORECASE)
# What `hf download` leaves in a folder: huggingface_hub/_local_folder.py and file_download.py.
# And what macOS puts beside each file on a disk that is not its own (AppleDouble).
LEFTOVER = re.compile(r".+\.(lock|metadata|incomplete)$|\._.+")
# The same of directories; Jupyter copies what it opens into the second one.
LEFTOVER_DIRECTORY = re.compile(r"(^|/)(\.cache/huggingface|\.ipynb_checkpoints|\.git)(/|$)")
# A file of the cache of huggingface_hub, which `snapshots/` shows under its name.
BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

# A file of the store of Ollama, whose manifests name it: a GGUF model or projector if it is large.
OLLAMA_BLOB = re.compile(r"sha256-[0-9a-f]{64}")

# Names that loaders know, whatever the framework: all of them are the model itself.
_MODEL_STEMS = frozenset(
    {
        "consolidated", "diffusion_flax_model", "diffusion_pytorch_model", "flax_model", "model",
        "open_clip_model", "open_clip_pytorch_model", "openvino_model", "pytorch_model",
        "pytorch_model_fsdp", "rust_model", "tf_model",
    }
)  # fmt: skip
MODEL = "model"
PART = re.compile(r"[-_.](?P<number>\d{1,6})-of-(?P<count>\d{1,6})$")
# A number without a count: parts only if all numbers from 0 or 1 on are there.
NUMBER = re.compile(r"[-.](?P<number>\d{1,5})$")
_VARIANT = re.compile(r"(?P<stem>.+)\.(?P<variant>bf16|fp16|fp32|fp8|ema|non_ema)$")
# As optimum, transformers.js and onnxruntime name them.
_ONNX_VARIANT = re.compile(
    r"(?P<stem>.+?)[._-](?P<variant>(?:bf16|fp16|fp32|u?int8|int4|q4f16|q4|q8f16|q8|bnb4|quantized"
    r"|optimized|O[1-4]|qu?int8)(?:[._-]\w+)?)$"
)

_SMALL_SUFFIXES = frozenset(
    {".jinja", ".json", ".model", ".py", ".spm", ".tiktoken", ".txt", ".yaml", ".yml"}
)
# Configuration that says that what lies in a directory is one model.
_CONFIGURATION = re.compile(
    r"(\w*config\w*|params|hparams|hyperparams|modules|\w*tokenizer\w*|vocab|\w*processor\w*"
    r"|model_index|tekken|\w*tensor_index)\.(json|txt|model|pbtxt)$"
    r"|.*\.index(\.\w+)?\.json$|.*\.ya?ml$|.*\.(spm|tiktoken)$|\.metadata$"
    r"|manifest\.ocdbt$|\.zarray$"
)
_TOKENIZER = re.compile(r"(tokenizer|tekken|vocab|merges)\b|.*\.(tiktoken|spm)$")


def is_small(name: str, size_bytes: int) -> bool:
    """Whether a file, which has no weights, is configuration, a tokenizer or similar."""
    return size_bytes < SMALL_FILE_BYTES or suffix_of(name) in _SMALL_SUFFIXES


def may_be_weights(name: str, size_bytes: int) -> bool:
    """Whether a file of no known format may hold weights."""
    return not is_small(name, size_bytes) and not _NO_WEIGHTS.fullmatch(name)


def is_configuration(name: str) -> bool:
    """Whether a file configures the model in its directory."""
    return _CONFIGURATION.fullmatch(name) is not None


def is_consolidated(name: str) -> bool:
    """Whether a file belongs to Mistral's second copy of its models."""
    return name.startswith("consolidated")


def is_tokenizer(name: str) -> bool:
    """Whether a small file belongs to a tokenizer."""
    return _TOKENIZER.match(name) is not None


def is_projector(name: str) -> bool:
    """Whether a GGUF file is a projector (llama.cpp), which goes with any of the models."""
    return "mmproj" in name


def suffix_of(name: str) -> str:
    """The suffix, with its dot."""
    return splitext(name)[1]


def stem_of(name: str) -> str:
    """The name without its suffix. That of ONNX's external data is the name of its model.

    >>> stem_of("model_fp16.onnx_data_1"), stem_of("model.safetensors")
    ('model_fp16', 'model')
    """
    before, found, _ = name.rpartition(".onnx")
    return before if found else splitext(name)[0]


def identity_of(stem: str) -> str:
    """The same for all copies of a model: `model` for all names that loaders know.

    >>> identity_of("pytorch_model"), identity_of("models_t5")
    ('model', 'models_t5')
    """
    return MODEL if stem in _MODEL_STEMS else stem


def split_variant(stem: str, form: Format) -> tuple[str, str]:
    """A stem without its variant, and the variant; empty: there is none.

    >>> split_variant("model.fp16", "safetensors"), split_variant("model_q4", "onnx")
    (('model', 'fp16'), ('model', 'q4'))
    """
    found = (_ONNX_VARIANT if form == "onnx" else _VARIANT).fullmatch(stem)
    return (found["stem"], found["variant"]) if found else (stem, "")


def format_of(name: str) -> Format | None:
    """The format of a weights file; None for any other file."""
    if name.startswith("openvino") and name.endswith(".bin"):
        return "export"
    if found := _FORMATS.get(suffix_of(name)):
        return found
    if OLLAMA_BLOB.fullmatch(name):
        return "gguf"
    return next((form for pattern, form in _NUMBERED if pattern.fullmatch(name)), None)
