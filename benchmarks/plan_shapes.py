"""Plans of the large Llamas from their configs alone: by component, and whether they fit on one card without streaming.

    python benchmarks/plan_shapes.py [--out benchmarks/results/plan_shapes.json] [--smoke]

QDoRA of rank 16 on every linear layer, NF4 in blocks of 64 with double quantisation, bf16 adapters, 8-bit AdamW, one
sequence of 2,048 tokens, all of them labelled, checkpointing. The embeddings and the head stay in 16 bits, on the card,
as do the checkpoints. `cpu_seconds` is the time of a plan on one core, `seconds` the same by the clock, whatever else
runs on the machine.

Bar: a plan of the 70B model in less than 60 s of one core.
"""

from __future__ import annotations

import math
import time
from typing import Any

from measure import facts, parser_of, save, write
from transformers import LlamaConfig

from qdora.plan.memory_plan import plan
from qdora.recipe.recipe_file import recipe_from

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
    args = parser_of(__doc__, "plan_shapes", smoke="a tiny shape").parse_args()
    shapes = SMOKE if args.smoke else SHAPES
    found: dict[str, Any] = {}
    for name, sizes in shapes.items():
        found[name] = shape_result(name, sizes)
        save(args.out, result_of(found))  # a long call that is ended has its shapes
    write(args.out, result_of(found))


def result_of(shapes: dict[str, Any]) -> dict[str, Any]:
    """The file: the shapes so far."""
    return {
        **facts("python benchmarks/plan_shapes.py"),
        "num_tokens": NUM_TOKENS,
        "rank": 16,
        "budget": BUDGET,
        "shapes": shapes,
        "passes": {"70B in 60 s": shapes.get("Llama-3.3-70B", {"cpu_seconds": math.inf})["cpu_seconds"] < 60},
    }


def llama(sizes: dict[str, Any]) -> LlamaConfig:
    """A config of one of `SHAPES`."""
    return LlamaConfig(**_LLAMA_3, **sizes)


def shape_result(name: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """The plan of a shape, and how long it took."""
    recipe = recipe_from(
        {
            "model": {"source": f"shapes/{name}"},
            "data": {"mix": [{"source": "some/data"}], "max_length": NUM_TOKENS},
            "train": {"steps": 1, "tokens_per_step": NUM_TOKENS},
        }
    )
    config = llama(sizes)
    began, began_cpu = time.perf_counter(), time.process_time()
    found = plan(recipe, BUDGET, config=config, may_change=False)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    return {**found.to_dict(), "seconds": seconds, "cpu_seconds": cpu_seconds}


if __name__ == "__main__":
    main()
