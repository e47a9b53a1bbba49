"""The order in which loaders read the files of a model, as sort keys. Pure.

Small files come first, in the order in which transformers and vLLM open them. Weights follow: text
encoders, the set that an index names, or that is called `model`, and other components; in each set
the shards by their numbers, unless an index has them in another order (`indexes.py`). `layout.py`
orders directories.
"""

from __future__ import annotations

import re
from posixpath import basename, dirname

_SMALL_ORDER = (
    re.compile(r"(model_index|config|params|adapter_config)\.json$"),
    re.compile(r".*\.index(\.\w+)?\.json$"),
    re.compile(r"\w*(generation|quant|processor|scheduler)\w*\.json$"),
    re.compile(r"tokenizer_config\.json$"),
    re.compile(r"(tokenizer|tekken|vocab|special_tokens_map|added_tokens|merges)\b|.*\.tiktoken$"),
    re.compile(r".*\.(json|jinja|py)$"),
    re.compile(r".*\.(txt|model|spm|ya?ml)$"),
)
# Wan's loader reads the text encoder first.
_TEXT_ENCODER = re.compile(r"(^|[-_.])(u?mt5|t5|text[-_]?encoder)[-_.]", re.IGNORECASE)


def small_file_order(path: str, directory: str) -> tuple[int, bool, str]:
    """A sort key for small files.

    Args:
        directory: that of the model; its own files come before those below it.
    """
    name = basename(path)
    matching = (rank for rank, pattern in enumerate(_SMALL_ORDER) if pattern.match(name))
    return next(matching, len(_SMALL_ORDER)), dirname(path) != directory, path


def weight_set_order(first: str, *, is_main: bool) -> tuple[int, object]:
    """A sort key for sets of weights.

    Args:
        first: the name of its first file.
        is_main: an index names it, or it is called `model`.
    """
    rank = 1 if is_main else 0 if _TEXT_ENCODER.search(first) else 2
    return rank, natural_order(first)


def natural_order(name: str) -> tuple[tuple[str | tuple[int, str], ...], str]:
    """A sort key that orders numbers by value, without converting long ones to integers."""
    parts = re.split(r"([0-9]+)", name)
    values: list[str | tuple[int, str]] = []
    for index, part in enumerate(parts):
        digits = part.lstrip("0")
        values.append((len(digits), digits) if index % 2 else part)
    return tuple(values), name
