"""A tokenizer with a token for each byte, and a tiny model with it: text of any kind, without a download."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast


def byte_tokenizer() -> Any:
    """Byte-level BPE without merges; <pad> is token 0 and <end> token 1."""
    tokens = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")


def write_sums(file: Path, sums: Iterable[tuple[int, int]] = tuple(product(range(6), range(5)))) -> None:
    """Sums, by default thirty, as rows of a prompt and a completion."""
    rows = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a, b in sums]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(directory: Path, seed: int = 0) -> str:
    """A random Llama of two blocks with that tokenizer, in place of the builtin model; returns the directory."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(directory)
    AutoModelForCausalLM.from_config(small_config(len(tokenizer))).save_pretrained(directory)
    return str(directory)


def small_config(vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
