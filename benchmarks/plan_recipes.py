"""Plans of the recipes that are named for a card, from their configs alone.

    python benchmarks/plan_recipes.py [--out benchmarks/results/plan_recipes.json] [--smoke]

Each recipe as it ships, for the shape of its model, against the budget that it states, or 40 GB; and Llama-3.1-405B by
the recipe of the 70B model with all of its blocks in host memory. `cpu_seconds` is the time of a plan on one core.

Bars: every recipe fits in the card that it is named for; the 70B plan below 40 GiB and in less than 60 s of one core.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from measure import RESULTS, facts, write
from plan_shapes import SHAPES, llama
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from qdora.plan.memory_plan import plan
from qdora.recipe.recipe_file import load_recipe
from qdora.recipe.settings import Recipe

GIB = 2**30
CARD = "40GB"
"""Budget of the recipes that state none."""
# config.json of Llama-2-13b-hf.
LLAMA_13B = {
    "vocab_size": 32_000,
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "intermediate_size": 13_824,
    "tie_word_embeddings": False,
}
# config.json of Qwen2.5-32B-Instruct.
QWEN_32B = {
    "vocab_size": 152_064,
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "intermediate_size": 27_648,
    "tie_word_embeddings": False,
}
LARGEST = "Llama-3.1-405B"


def main() -> None:
    """All recipes, then the largest model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "plan_recipes.json")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: shows that it runs")
    args = parser.parse_args()
    configs: dict[str, PreTrainedConfig] = {
        "commonsense-8b-40gb": llama(SHAPES["Llama-3-8B"]),
        "commonsense-13b-40gb": LlamaConfig(**LLAMA_13B),
        "llama-8b-8gb": llama(SHAPES["Llama-3-8B"]),
        "qwen-32b-24gb": Qwen2Config(**QWEN_32B),
        "llama-70b-40gb": llama(SHAPES["Llama-3.3-70B"]),
    }
    if args.smoke:
        small = {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 128, "vocab_size": 512}
        configs = {name: LlamaConfig(**small, num_hidden_layers=24) for name in configs}
    plans = {name: planned(load_recipe(name), config) for name, config in configs.items()}
    if not args.smoke:
        every = ["model.source=meta-llama/Llama-3.1-405B-Instruct", "base.streamed_blocks=null"]
        plans[LARGEST] = planned(load_recipe("llama-70b-40gb", every), llama(SHAPES[LARGEST]))
    largest = plans["llama-70b-40gb"]
    result = {
        **facts("python benchmarks/plan_recipes.py"),
        "plans": plans,
        "passes": {
            "all fit": all(each["fits"] for each in plans.values()),
            "70B below 40 GiB": largest["peak_bytes"] < 40 * GIB,
            "70B in 60 s": largest["cpu_seconds"] < 60,
        },
    }
    write(args.out, result)


def planned(recipe: Recipe, config: PreTrainedConfig) -> dict[str, Any]:
    """The plan of a recipe, what it streams, and how long planning took."""
    began = time.process_time()
    found = plan(recipe, CARD if recipe.memory.budget is None else None, config=config).to_dict()
    streams = recipe.base.residency == "host"
    return {
        **found,
        "model": recipe.model.source,
        "budget": recipe.memory.budget or CARD,
        "residency": recipe.base.residency,
        "num_streamed": (recipe.base.streamed_blocks or config.num_hidden_layers) if streams else 0,
        "cpu_seconds": time.process_time() - began,
    }


if __name__ == "__main__":
    main()
