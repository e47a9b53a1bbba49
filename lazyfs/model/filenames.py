"""What the names of files say in repositories of models. Pure; names are without directories."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from posixpath import splitext
from types import MappingProxyType
from typing import Literal, TypeAlias

Format: TypeAlias = Literal["safetensors", "gguf", "pytorch", "other"]

# A file below this is small whatever its name.
SMALL_FILE_BYTES = 1 << 20

_FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        ".safetensors": "safetensors",
        ".bin": "pytorch",
        ".pt": "pytorch",
        ".pth": "pytorch",
        ".ckpt": "pytorch",
        ".gguf": "gguf",
        ".h5": "other",
        ".mlmodel": "other",
        ".msgpack": "other",
        ".onnx": "other",
        ".onnx_data": "other",
        ".ot": "other",
        ".tflite": "other",
    }
)
# Which format is read where several are, and which of PyTorch's suffixes.
FORMAT_ORDER: Sequence[Format] = ("safetensors", "pytorch", "gguf", "other")
PYTORCH_ORDER = (".bin", ".pt", ".pth", ".ckpt")
# Directories in which publishers put copies of the model above.
COPY_DIRECTORIES = frozenset(
    {"coreml", "flax", "metal", "onnx", "openvino", "original", "tf", "tflite"}
)
# What the transformers Trainer leaves beside a model; vLLM's filter_files_not_needed_for_inference.
TRAINING_STATE = re.compile(
    r"(training_args\.bin|optimizer\.(bin|pt)|scheduler\.pt|scaler\.pt|rng_state.*\.pth)$"
)
VARIANT = re.compile(r"(?P<stem>.+)\.(bf16|fp16|fp32|fp8|ema|non_ema)(?P<part>-\d+-of-\d+)?$")
PART = re.compile(r"-\d+-of-\d+$")

_SMALL_SUFFIXES = frozenset(
    {".jinja", ".json", ".model", ".py", ".spm", ".tiktoken", ".txt", ".yaml", ".yml"}
)
# In the order in which transformers and vLLM open them.
_SMALL_ORDER = (
    re.compile(r"(model_index|config|params|adapter_config)\.json$"),
    re.compile(r".*\.index(\.\w+)?\.json$"),
    re.compile(r"\w*(generation|quant|processor|scheduler)\w*\.json$"),
    re.compile(r"tokenizer_config\.json$"),
    re.compile(r"(tokenizer|tekken|vocab|special_tokens_map|added_tokens|merges)\b|.*\.tiktoken$"),
    re.compile(r".*\.(json|jinja|py)$"),
    re.compile(r".*\.(txt|model|spm|ya?ml)$"),
)


def is_small(name: str, size_bytes: int) -> bool:
    """Whether a file that is no weights is configuration, a tokenizer or the like."""
    return size_bytes < SMALL_FILE_BYTES or suffix_of(name) in _SMALL_SUFFIXES


def small_rank(name: str) -> int:
    """A number that is smaller the sooner a loader opens a small file."""
    for rank, pattern in enumerate(_SMALL_ORDER):
        if pattern.match(name):
            return rank
    return len(_SMALL_ORDER)


def is_consolidated(name: str) -> bool:
    """Whether it is of Mistral's second copy of its models."""
    return name.startswith("consolidated")


def natural_order(name: str) -> tuple[tuple[str | tuple[int, str], ...], str]:
    """A key that sorts numbers by value without making them integers, however long they are."""
    parts = re.split(r"([0-9]+)", name)
    values: list[str | tuple[int, str]] = []
    for index, part in enumerate(parts):
        digits = part.lstrip("0")
        values.append((len(digits), digits) if index % 2 else part)
    return tuple(values), name


def family_of(name: str) -> str:
    """What the parts of one model have in common, as `consolidated` and `.safetensors`."""
    return re.sub(r"[-.][0-9]+(-of-[0-9]+)?(?=\.\w+$)", "", name)


def suffix_of(name: str) -> str:
    """What begins with the last dot."""
    return splitext(name)[1]


def stem_of(name: str) -> str:
    """All before the last dot."""
    return splitext(name)[0]


def format_of(name: str) -> Format | None:
    """The format of a file of weights; None for any other file."""
    if name.startswith("openvino") and name.endswith(".bin"):
        return "other"
    return _FORMATS.get(suffix_of(name))
