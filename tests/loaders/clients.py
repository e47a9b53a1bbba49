"""Loads a model as a user of its library does: `python clients.py CLIENT DIRECTORY`.

Prints JSON: `load_s`, how long the library took from its first look at the directory, and `digest`,
of all weights or of the answer. Runs in the clients' environment.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Loaded = Callable[[], str]
CLIENTS: dict[str, Callable[[Path], Loaded]] = {}


def client(load: Callable[[Path], Loaded]) -> Callable[[Path], Loaded]:
    """Register what loads a directory, and gives a function for the digest of what it has."""
    CLIENTS[load.__name__] = load
    return load


def of_tensors(tensors: Iterable[tuple[str, Any]]) -> str:
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@client
def transformers(directory: Path) -> Loaded:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(directory)("Paris is the capital")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    return lambda: str(words) + of_tensors(model.state_dict().items())


@client
def safetensors(directory: Path) -> Loaded:
    from safetensors import safe_open

    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return lambda: of_tensors(found.items())


@client
def safetensors_read(directory: Path) -> Loaded:
    from safetensors.torch import load

    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load(path.read_bytes())
    return lambda: of_tensors(found.items())


@client
def runai(directory: Path) -> Loaded:
    from runai_model_streamer import SafetensorsStreamer

    found = {}
    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(path) for path in sorted(directory.glob("*.safetensors"))])
        for name, tensor in streamer.get_tensors():
            found[name] = tensor.clone().detach()
    return lambda: of_tensors(found.items())


def main() -> None:
    """Load, and say how long it took."""
    name, directory = sys.argv[1], Path(sys.argv[2])
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)
    # What a library imports is no part of a load: once on nothing, then on the model.
    if name != "none":
        _import(name)
    began = time.monotonic()
    loaded = CLIENTS[name](directory)
    load_s = time.monotonic() - began
    print(json.dumps({"load_s": load_s, "digest": loaded()}))


def _import(name: str) -> None:
    import importlib

    modules = {
        "transformers": ("transformers.models.llama.modeling_llama", "transformers.models.auto"),
        "runai": ("runai_model_streamer",),
        "safetensors_read": ("safetensors.torch",),
    }
    for each in modules.get(name, (name,)):
        importlib.import_module(each)


if __name__ == "__main__":
    main()
