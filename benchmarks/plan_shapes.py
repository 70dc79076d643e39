"""Plans of the large Llamas from their configs alone: by component, and whether they fit on one card without streaming.

    python benchmarks/plan_shapes.py [--out benchmarks/results/plan_shapes.json] [--smoke]

QDoRA of rank 16 on every linear layer, NF4 in blocks of 64 with double quantisation, bf16 adapters, 8-bit AdamW, one
sequence of 2,048 tokens, all of them labelled, checkpointing. The embeddings and the head stay in 16 bits, on the card,
as do the checkpoints. `seconds` is the time of the first plan of a recipe (CPU time beside it), `seconds_with_changes`
includes the plans of all changes that were tried to keep to the budget.

Bar: a plan of the 70B model in less than 60 s.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from measure import RESULTS, facts, write
from transformers import LlamaConfig

from qdora.recipe_file import recipe_from
from qdora.verbs.plan_memory import plan

GIB = 2**30
NUM_TOKENS = 2048
BUDGET = "40GiB"
# config.json of Meta-Llama-3-8B, Llama-3.3-70B and Llama-3.1-405B.
_LLAMA_3 = {"vocab_size": 128_256, "num_key_value_heads": 8, "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3-8B": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 14_336,
    },
    "Llama-3.3-70B": {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "intermediate_size": 28_672,
    },
    "Llama-3.1-405B": {
        "hidden_size": 16_384,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "intermediate_size": 53_248,
    },
}
SMOKE = {"tiny": {"hidden_size": 64, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 128}}


def main() -> None:
    """All shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "plan_shapes.json")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape: shows that it runs")
    args = parser.parse_args()
    found = {name: shape_result(name, sizes) for name, sizes in (SMOKE if args.smoke else SHAPES).items()}
    result = {
        **facts("python benchmarks/plan_shapes.py"),
        "num_tokens": NUM_TOKENS,
        "rank": 16,
        "budget": BUDGET,
        "shapes": found,
    }
    if not args.smoke:
        result["passes"] = {"70B in 60 s": found["Llama-3.3-70B"]["seconds"] < 60}
    write(args.out, result)


def shape_result(name: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """The plan of a shape, and how long it took."""
    recipe = recipe_from(
        {
            "model": {"source": f"shapes/{name}"},
            "data": {"mix": [{"source": "some/data"}], "max_length": NUM_TOKENS},
            "train": {"steps": 1, "tokens_per_step": NUM_TOKENS},
        }
    )
    config = LlamaConfig(**_LLAMA_3, **sizes)
    began, began_cpu = time.perf_counter(), time.process_time()
    first = plan(recipe, config=config)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    began = time.perf_counter()
    found = plan(recipe, BUDGET, config=config)
    assert found.components == first.components
    return {
        **found.to_dict(),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "seconds_with_changes": time.perf_counter() - began,
    }


if __name__ == "__main__":
    main()
