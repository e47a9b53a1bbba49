"""Makes a small real model: `python models.py DIRECTORY`.

With random weights, but in the layout that the loader's own library writes, and with a trained
tokenizer. Runs in the clients' environment (`install`).
"""

from __future__ import annotations

import sys
from pathlib import Path

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


def main() -> None:
    """In a directory of its name."""
    directory = Path(sys.argv[1]) / "llm"
    directory.mkdir(parents=True)
    llm(directory)


if __name__ == "__main__":
    main()
