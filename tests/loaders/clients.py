"""Loads models as the users of a library do: `python clients.py CLIENT...`.

Imports what these clients import, once, and prints an empty line. Each line of standard input has
the name of one of them and a directory. Each load runs in a child, so that nothing of a former one
is left. It answers with a line of JSON: `load_s`, what the library took from its first look at the
directory until all is loaded, and `digest`, of all weights or of an answer. Runs in the clients'
environment.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Loaded = Callable[[], str]
CLIENTS: dict[str, tuple[Callable[[Path], Loaded], tuple[str, ...]]] = {}
PROMPT = "Paris is the capital"
TOKENS = 24


def client(
    *modules: str,
) -> Callable[[Callable[[Path], Loaded]], Callable[[Path], Loaded]]:
    """Register what loads a directory, and gives a function for the digest of what it has.

    Args:
        modules: what it imports, which is no part of a load.
    """

    def register(load: Callable[[Path], Loaded]) -> Callable[[Path], Loaded]:
        CLIENTS[load.__name__] = load, modules
        return load

    return register


def of_tensors(tensors: Iterable[tuple[str, Any]]) -> str:
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def of_answer(answer: object) -> str:
    return hashlib.sha256(repr(answer).encode()).hexdigest()


@client("transformers.models.llama.modeling_llama", "transformers.models.auto")
def transformers(directory: Path) -> Loaded:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(directory)(PROMPT)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    return lambda: str(words) + of_tensors(model.state_dict().items())


@client("peft", "transformers.models.llama.modeling_llama", "transformers.models.auto")
def peft(directory: Path) -> Loaded:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(directory.with_name("llm"), dtype="auto")
    model = PeftModel.from_pretrained(base, directory)
    return lambda: of_tensors(model.state_dict().items())


@client("safetensors.torch")
def safetensors(directory: Path) -> Loaded:
    from safetensors import safe_open

    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    return lambda: of_tensors(found.items())


@client("safetensors.torch")
def safetensors_pread(directory: Path) -> Loaded:
    from safetensors.torch import load

    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            parts = [
                os.pread(file.fileno(), min(1 << 20, size - at), at)
                for at in range(0, size, 1 << 20)
            ]
        found |= load(b"".join(parts))
    return lambda: of_tensors(found.items())


@client("runai_model_streamer")
def runai(directory: Path) -> Loaded:
    from runai_model_streamer import SafetensorsStreamer

    found = {}
    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(path) for path in sorted(directory.glob("*.safetensors"))])
        for name, tensor in streamer.get_tensors():
            found[name] = tensor.clone().detach()
    return lambda: of_tensors(found.items())


@client("fastsafetensors")
def fastsafetensors(directory: Path) -> Loaded:
    from fastsafetensors import fastsafe_open

    found = {}
    names = [str(path) for path in sorted(directory.glob("*.safetensors"))]
    with fastsafe_open(filenames=names, nogds=True, device="cpu") as file:
        for name in file.keys():  # noqa: SIM118
            found[name] = file.get_tensor(name).clone()
    return lambda: of_tensors(found.items())


@client("torch")
def torch_load(directory: Path) -> Loaded:
    import torch

    found = torch.load(directory / "pytorch_model.bin", weights_only=True)
    return lambda: of_tensors(found.items())


@client("torch")
def torch_load_mmap(directory: Path) -> Loaded:
    import torch

    found = torch.load(directory / "pytorch_model.bin", weights_only=True, mmap=True)
    found = {name: tensor.clone() for name, tensor in found.items()}
    return lambda: of_tensors(found.items())


@client("tensorizer")
def tensorizer(directory: Path) -> Loaded:
    from tensorizer import TensorDeserializer

    found = TensorDeserializer(str(directory / "model.tensors"), device="cpu")
    return lambda: of_tensors(found.items())


@client("diffusers.pipelines.deprecated.latent_diffusion_uncond.pipeline_latent_diffusion_uncond")
def diffusers(directory: Path) -> Loaded:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(directory)
    parts = [("unet", pipeline.unet), ("vqvae", pipeline.vqvae)]
    return lambda: of_tensors(
        (f"{part}.{name}", tensor)
        for part, model in parts
        for name, tensor in model.state_dict().items()
    )


@client("sentence_transformers")
def sentence_transformers(directory: Path) -> Loaded:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(directory), device="cpu")
    return lambda: hashlib.sha256(model.encode(["a lazy dog"]).tobytes()).hexdigest()


@client("gguf")
def gguf(directory: Path) -> Loaded:
    from gguf import GGUFReader

    reader = GGUFReader(next(directory.glob("*.gguf")))
    found = [(tensor.name, tensor.data.tobytes()) for tensor in reader.tensors]
    return lambda: of_answer([(name, hashlib.sha256(data).hexdigest()) for name, data in found])


def _llama_cpp(directory: Path, mode: str) -> Loaded:
    import xllamacpp

    wanted = xllamacpp.CommonParams()
    wanted.model.path = str(next(directory.glob("*.gguf")))
    wanted.load_mode = getattr(xllamacpp.llama_load_mode, f"LLAMA_LOAD_MODE_{mode}")
    wanted.n_ctx, wanted.n_parallel, wanted.cpuparams.n_threads = 128, 1, 1
    engine = xllamacpp.Server(wanted)
    asked = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    return lambda: of_answer(engine.handle_completions(asked)["choices"][0]["text"])


@client("xllamacpp")
def llama_cpp(directory: Path) -> Loaded:
    return _llama_cpp(directory, "MMAP")


@client("xllamacpp")
def llama_cpp_read(directory: Path) -> Loaded:
    return _llama_cpp(directory, "NONE")


@client("xllamacpp")
def llama_cpp_direct(directory: Path) -> Loaded:
    return _llama_cpp(directory, "DIRECT_IO")


@client("onnxruntime", "numpy")
def onnxruntime(directory: Path) -> Loaded:
    import numpy
    import onnxruntime as runtime

    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(
        directory / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    one = numpy.ones((1, 1024), numpy.float32)
    return lambda: hashlib.sha256(session.run(None, {"input": one})[0].tobytes()).hexdigest()


VLLM = ("vllm", "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker",
        "vllm.v1.worker.cpu_model_runner", "vllm.model_executor.models.llama")  # fmt: skip


def _vllm(directory: Path, lora: Path | None = None, **arguments: Any) -> Loaded:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(
        str(directory), enforce_eager=True, max_model_len=128, max_num_seqs=2, seed=0, **arguments
    )
    adapter = LoRARequest("adapter", 1, str(lora)) if lora else None

    def digest() -> str:
        greedy = SamplingParams(temperature=0, max_tokens=TOKENS)
        (answer,) = engine.generate([PROMPT], greedy, lora_request=adapter)
        return of_answer(list(answer.outputs[0].token_ids))

    return digest


@client(*VLLM)
def vllm(directory: Path) -> Loaded:
    return _vllm(directory)


@client(*VLLM)
def vllm_eager(directory: Path) -> Loaded:
    return _vllm(directory, safetensors_load_strategy="eager")


@client(*VLLM)
def vllm_prefetch(directory: Path) -> Loaded:
    return _vllm(directory, safetensors_load_strategy="prefetch")


@client(*VLLM)
def vllm_threads(directory: Path) -> Loaded:
    return _vllm(directory, model_loader_extra_config={"enable_multithread_load": True})


@client(*VLLM)
def vllm_bin(directory: Path) -> Loaded:
    return _vllm(directory)


@client(*VLLM, "vllm.model_executor.models.mixtral")
def vllm_moe(directory: Path) -> Loaded:
    return _vllm(directory)


@client(*VLLM)
def vllm_lora(directory: Path) -> Loaded:
    return _vllm(directory.with_name("llm"), directory, enable_lora=True, max_lora_rank=8)


@client(*VLLM, "runai_model_streamer")
def vllm_runai(directory: Path) -> Loaded:
    return _vllm(directory, load_format="runai_streamer")


def main() -> None:
    """Load what standard input names."""
    # Libraries print what they like: to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        for module in CLIENTS[name][1]:
            importlib.import_module(module)
    print(file=answers, flush=True)
    for line in sys.stdin:
        name, _, directory = line.strip().partition(" ")
        load, _ = CLIENTS[name]
        child = os.fork()
        if not child:
            status = 1
            try:
                began_s = time.monotonic()
                loaded = load(Path(directory))
                load_s = time.monotonic() - began_s
                print(json.dumps({"load_s": load_s, "digest": loaded()}), file=answers, flush=True)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{line.strip()}: failed")


if __name__ == "__main__":
    main()
