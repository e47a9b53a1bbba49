"""Makes small real models, one for each loader: `python models.py DIRECTORY [--only NAME]...`.

With random weights, but in the layout that the loader's own library writes, and with a trained
tokenizer. Runs in the clients' environment (`install`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

TEXT = [
    "A mount shows a model as files, and a loader reads them in its own order.",
    "The quick brown fox jumps over the lazy dog while weights are on their way.",
    "Paris is the capital of France; Berlin is the capital of Germany.",
    "Each block is fetched once, from the store or from a disk of the node.",
]
VOCABULARY = 600
HIDDEN, LAYERS, HEADS, GROUPS, WIDE = 768, 8, 12, 4, 2048


def tokenizer(directory: Path) -> None:
    """A byte-pair tokenizer, trained on a few sentences."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        TEXT * 50, vocab_size=VOCABULARY, special_tokens=["<s>", "</s>", "<unk>"]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
    ).save_pretrained(directory)


def llm(directory: Path) -> torch.nn.Module:
    """A Llama in shards of safetensors with an index."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=WIDE,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=GROUPS,
        max_position_embeddings=512, bos_token_id=0, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="30MB")
    tokenizer(directory)
    return model


def moe(directory: Path) -> None:
    """A Mixtral: four experts, of which each word goes through two."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(6)
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=512, bos_token_id=0, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    model = MixtralForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="30MB")
    tokenizer(directory)


def pickled(directory: Path, model: torch.nn.Module) -> None:
    """The same as `pytorch_model.bin`."""
    model.config.save_pretrained(directory)
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    tokenizer(directory)


def adapter(directory: Path, model: torch.nn.Module) -> None:
    """A LoRA adapter of it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(directory)


def pipeline(directory: Path) -> None:
    """A diffusion pipeline: `model_index.json` and two components."""
    from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel

    torch.manual_seed(3)
    unet = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, block_out_channels=(128, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vqvae = VQModel(block_out_channels=(64,), latent_channels=3)
    LDMPipeline(vqvae=vqvae, unet=unet, scheduler=DDIMScheduler()).save_pretrained(directory)


def sentences(directory: Path) -> None:
    """A sentence transformer: a small BERT and its pooling."""
    from sentence_transformers import SentenceTransformer
    from transformers import BertConfig, BertModel

    torch.manual_seed(4)
    inside = directory.with_name("bert")
    BertModel(
        BertConfig(vocab_size=VOCABULARY, hidden_size=512, num_hidden_layers=6,
                   num_attention_heads=8, intermediate_size=2048)
    ).save_pretrained(inside)  # fmt: skip
    tokenizer(inside)
    SentenceTransformer(str(inside), device="cpu").save(str(directory))


def gguf(directory: Path, model: torch.nn.Module, source: Path) -> None:
    """The Llama as llama.cpp reads it."""
    from gguf import GGUFWriter, TokenType

    vocabulary = json.loads((source / "tokenizer.json").read_text())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].__getitem__)
    trained = len(tokens)
    tokens += [f"[unused{number}]" for number in range(trained, VOCABULARY)]
    writer = GGUFWriter(str(directory / "model-F16.gguf"), "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(1)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    normal = [TokenType.NORMAL] * (trained - 3)
    unused = [TokenType.UNUSED] * (VOCABULARY - trained)
    writer.add_token_types([TokenType.CONTROL] * 3 + normal + unused)
    merges = vocabulary["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    parts = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for number in range(LAYERS):
        for theirs, ours in parts.items():
            names[f"model.layers.{number}.{theirs}.weight"] = f"blk.{number}.{ours}.weight"
    for name, tensor in model.state_dict().items():
        array = tensor.to(torch.float32).numpy()
        if tensor.dim() == 1:
            writer.add_tensor(names[name], array)
        else:
            writer.add_tensor(names[name], array.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def onnx_model(directory: Path) -> None:
    """A chain of matrices, whose data lies beside it."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(5)
    nodes, weights, last = [], [], "input"
    for number in range(12):
        weight = random.standard_normal((1024, 1024), dtype=np.float32) / 32
        weights.append(numpy_helper.from_array(weight, f"w{number}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{number}"], [f"x{number}"]))
        last = f"x{number}"
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1024])
        for name in ("input", last)
    ]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(
        model, directory / "model.onnx", save_as_external_data=True, location="model.onnx_data"
    )


def tensors(directory: Path, model: torch.nn.Module) -> None:
    """The Llama as one file of tensorizer."""
    from tensorizer import TensorSerializer

    serializer = TensorSerializer(str(directory / "model.tensors"))
    serializer.write_module(model)
    serializer.close()


def main() -> None:
    """Each in a directory of its name."""
    makes = {
        "llm": lambda at, model: None,
        "moe": lambda at, model: moe(at),
        "bin": pickled,
        "gguf": lambda at, model: gguf(at, model, at.with_name("llm")),
        "tensorizer": tensors,
        "pipeline": lambda at, model: pipeline(at),
        "sentences": lambda at, model: sentences(at),
        "onnx": lambda at, model: onnx_model(at),
        "lora": adapter,  # changes the model: last
    }
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("directory", type=Path)
    arguments.add_argument("--only", action="append", choices=makes)
    given = arguments.parse_args()
    model = None
    for name, make in makes.items():
        if name == "llm" or name in (given.only or makes):
            (given.directory / name).mkdir(parents=True)
            if model is None:
                model = llm(given.directory / name)
            make(given.directory / name, model)


if __name__ == "__main__":
    main()
