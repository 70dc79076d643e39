"""What the cases mutate: a tiny random model, its data, a run with checkpoints, and other stored files, made once."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import byte_tokenizer, write_sums
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig

from qdora.model.load import Quantization, load_model
from qdora.model.packed_base import BaseCache
from qdora.model.source import resolve
from qdora.recipe.recipe_file import recipe_from
from qdora.recipe.settings import Recipe
from qdora.run.train import train_run

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


@dataclass(frozen=True)
class Material:
    """Where the unmutated things are; `root` holds them all."""

    root: Path
    model: Path
    sums: Path
    letters: Path
    held_out: Path


def make(root: Path) -> Material:
    """Write the model and its data below `root`."""
    torch.manual_seed(0)
    model = root / "model"
    config = LlamaConfig(**SIZES, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(model, max_shard_size="60KB")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(model)
    sums, letters = root / "sums.jsonl", root / "letters.jsonl"
    write_sums(sums)
    alphabet = "abcdefghijklmnopqrstuvwx"
    choices = [
        {"question": f"Which letter follows {a}?", "choices": [b, a], "answer": 0} for a, b in pairwise(alphabet)
    ]
    letters.write_text("".join(json.dumps(row) + "\n" for row in choices))
    held_out = root / "held-out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in choices[:5]))
    return Material(root, model, sums, letters, held_out)


@dataclass(frozen=True)
class StoredMaterial:
    """What a run and the bases leave on disk: a finished run, one that stopped after step 4, a cache."""

    root: Path
    model: Path
    recipe: Recipe
    whole: Path
    halfway: Path
    cache: Path


def make_stored(material: Material) -> StoredMaterial:
    """Train a run of six steps, take it back to step 4, and write the model as a base cache."""
    quiet = Console(quiet=True)
    recipe = recipe_from(
        {
            "model": {"source": str(material.model), "dtype": "float32"},
            "adapter": {"rank": 4, "alpha": 8.0, "dropout": 0.1},
            "data": {"mix": [{"source": str(material.sums)}, {"source": str(material.letters)}], "max_length": 96},
            "train": {
                "steps": 6, "batch": 4, "lr": 1e-3, "warmup": 0.3, "optimizer": "adamw", "checkpoint_every": 2,
                "keep_checkpoints": 9,
            },
            "eval": {"at_start": False, "at_end": False},
        }
    )  # fmt: skip
    root = material.root / "stored"
    whole, halfway, cache = root / "whole", root / "halfway", root / "cache"
    train_run(recipe, whole, console=quiet)
    shutil.copytree(whole, halfway)
    shutil.rmtree(halfway / "adapter")
    shutil.rmtree(halfway / "checkpoints" / "step-6")
    load_model(
        resolve(str(material.model)),
        quant="nf4",
        compute_dtype=torch.float32,
        reader=BaseCache(cache, Quantization("nf4", 64, True, ("lm_head",)), torch.device("cpu")),
    )
    return StoredMaterial(root, material.model, recipe, whole, halfway, cache)
