"""A recipe on a tiny random model with a tokenizer and data of its own: a whole run in a second or two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from qdora.recipe.recipe_file import recipe_from
from qdora.recipe.settings import Recipe
from tests import tiny_adapted, tiny_tokenizer


def write_model(directory: Path, **sizes: int) -> Path:
    """A random Llama of two blocks, or other `sizes`, with its tokenizer, as safetensors."""
    torch.manual_seed(0)
    own = {"tie_word_embeddings": True, "hidden_size": 64, "vocab_size": 400}
    config = LlamaConfig(**(tiny_adapted.SIZES | own | sizes))
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tiny_tokenizer.make().save_pretrained(directory)
    return directory


def one_layer_recipe(root: Path, **changes: Any) -> Recipe:
    """`recipe` with one block, and one adapter in it: its memory is planned in half a second."""
    if not (root / "model").exists():
        write_model(root / "model", num_hidden_layers=1)
    return recipe(root, **{"adapter__targets": ["q_proj"]} | changes)


def write_data(directory: Path) -> tuple[Path, Path]:
    """Two sources: a sum to complete, and a letter to choose."""
    directory.mkdir(parents=True, exist_ok=True)
    sums, letters = directory / "sums.jsonl", directory / "letters.jsonl"
    rows = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(6) for b in range(5)]
    sums.write_text("".join(json.dumps(row) + "\n" for row in rows))
    alphabet = "abcdefghijklmnopqrstuvwx"
    choices = [
        {
            "task": "letters",
            "id": str(index),
            "context": "",
            "question": f"Which letter follows {letter}?",
            "choices": [alphabet[index + 1], alphabet[index]],
            "answer": 0,
        }
        for index, letter in enumerate(alphabet[:-1])
    ]
    letters.write_text("".join(json.dumps(row) + "\n" for row in choices))
    return sums, letters


def recipe(root: Path, **changes: Any) -> Recipe:
    """NF4, DoRA of rank 4 with dropout, two sources, six steps; `changes` are dotted settings with _ for the dot."""
    model = root / "model"
    if not model.exists():
        write_model(model)
    sums, letters = write_data(root / "data")
    document: dict[str, Any] = {
        "model": {"source": str(model), "dtype": "float32"},
        "adapter": {"rank": 4, "alpha": 8.0, "dropout": 0.1},
        "data": {"mix": [{"source": str(sums)}, {"source": str(letters)}], "max_length": 96},
        "train": {"steps": 6, "batch": 4, "lr": 1e-3, "warmup": 0.3, "optimizer": "adamw", "checkpoint_every": 2},
        "eval": {"limit": 4},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        document.setdefault(section, {})[key] = value
    for section in document.values():
        for key in [key for key, value in section.items() if value is ...]:
            del section[key]
    return recipe_from(document)
