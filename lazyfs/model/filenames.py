"""What file names in model repositories mean. Pure. Names come without directories."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from posixpath import splitext
from types import MappingProxyType
from typing import Literal, TypeAlias

Format: TypeAlias = Literal["safetensors", "gguf", "pytorch", "other"]

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
        ".h5": "other",
        ".mlmodel": "other",
        ".msgpack": "other",
        ".onnx": "other",
        ".onnx_data": "other",
        ".ot": "other",
        ".tflite": "other",
    }
)
# If there are several formats, or several suffixes of PyTorch, loaders read the first of these.
FORMAT_ORDER: Sequence[Format] = ("safetensors", "pytorch", "gguf", "other")
PYTORCH_ORDER = (".bin", ".pt", ".pth", ".ckpt")
# Directories in which publishers put copies of the model in the parent directory.
COPY_DIRECTORIES = frozenset(
    {"coreml", "flax", "metal", "onnx", "openvino", "original", "tf", "tflite"}
)
# Files of the transformers Trainer; see vLLM's filter_files_not_needed_for_inference.
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
    """Whether a file, which has no weights, is configuration, a tokenizer or similar."""
    return size_bytes < SMALL_FILE_BYTES or suffix_of(name) in _SMALL_SUFFIXES


def small_rank(name: str) -> int:
    """Position of a small file in the order in which a loader opens them."""
    for rank, pattern in enumerate(_SMALL_ORDER):
        if pattern.match(name):
            return rank
    return len(_SMALL_ORDER)


def is_consolidated(name: str) -> bool:
    """Whether a file belongs to Mistral's second copy of its models."""
    return name.startswith("consolidated")


def natural_order(name: str) -> tuple[tuple[str | tuple[int, str], ...], str]:
    """A sort key that orders numbers by value, without converting long ones to integers."""
    parts = re.split(r"([0-9]+)", name)
    values: list[str | tuple[int, str]] = []
    for index, part in enumerate(parts):
        digits = part.lstrip("0")
        values.append((len(digits), digits) if index % 2 else part)
    return tuple(values), name


def family_of(name: str) -> str:
    """The name without part numbers: `consolidated.safetensors` for all parts of one model."""
    return re.sub(r"[-.][0-9]+(-of-[0-9]+)?(?=\.\w+$)", "", name)


def suffix_of(name: str) -> str:
    """The suffix, with its dot."""
    return splitext(name)[1]


def stem_of(name: str) -> str:
    """The name without its suffix."""
    return splitext(name)[0]


def format_of(name: str) -> Format | None:
    """The format of a weights file; None for any other file."""
    if name.startswith("openvino") and name.endswith(".bin"):
        return "other"
    return _FORMATS.get(suffix_of(name))
