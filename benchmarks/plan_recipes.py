"""Plans of the recipes that are named for a card, from the stored shapes of their models.

    python benchmarks/plan_recipes.py [--out benchmarks/results/plan_recipes.json] [--smoke]

Each recipe as it ships, for the shape of its model, against the budget that it states, or 40 GB: a card of those that a
recipe is named for, and `ways` are the ways to hold the base on so many. Then Llama-3.1-405B by the recipe of the 70B
model with all of its blocks in host memory. `cpu_seconds` is the time of a plan on one core.

Bars: every recipe fits in the card that it is named for; the 70B plan below 40 GiB and in less than 60 s of one core.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from measure import facts, parser_of, write
from transformers import LlamaConfig, MixtralConfig, PreTrainedConfig

from qdora.plan.division import num_sharing, process_plans, whole_plans
from qdora.plan.memory_plan import plan
from qdora.plan.public_shapes import public_shapes
from qdora.recipe.recipe_file import load_recipe
from qdora.recipe.settings import Recipe

GIB = 2**30
CARD = "40GB"
"""Budget of the recipes that state none."""
MIXTURES = ("qwen3-30b-a3b-24gb", "gpt-oss-20b-24gb", "qwen3-30b-a3b-8gb")
STREAMED = ("llama-8b-8gb", "qwen-32b-24gb", "llama-70b-40gb")
RECIPES = ("commonsense-8b-40gb", "commonsense-13b-40gb", *MIXTURES, *STREAMED)
SEVERAL = {"llama-70b-2x24gb": 2, "llama-405b-8x80gb": 8}
"""Cards of the recipes for several, which are one machine."""
LARGEST = "Llama-3.1-405B"


def main() -> None:
    """All recipes, then the largest model."""
    args = parser_of(__doc__, "plan_recipes", smoke="tiny shapes").parse_args()
    configs = {name: public_shapes()[load_recipe(name).model.source].config() for name in (*RECIPES, *SEVERAL)}
    if args.smoke:
        small = {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 128, "vocab_size": 512}
        of = {name: MixtralConfig if name in MIXTURES else LlamaConfig for name in configs}
        configs = {name: of[name](**small, num_hidden_layers=48) for name in configs}
    plans = {name: planned(load_recipe(name), configs[name]) for name in RECIPES}
    if not args.smoke:
        source = f"meta-llama/{LARGEST}-Instruct"
        every = [f"model.source={source}", "base.streamed_blocks=null"]
        plans[LARGEST] = planned(load_recipe("llama-70b-40gb", every), public_shapes()[source].config())
    # Behind another model, whose plan they cannot take their steps from
    plans |= {name: planned(load_recipe(name), configs[name], num_cards) for name, num_cards in SEVERAL.items()}
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


def planned(recipe: Recipe, config: PreTrainedConfig, num_cards: int = 1) -> dict[str, Any]:
    """The plan of a recipe on each of its cards, what it streams, and how long planning took."""
    began = time.process_time()
    budget = recipe.memory.budget or CARD
    plan_of = partial(plan, budget=budget, config=config, num_processes=num_cards)
    found = plan_of(recipe, num_sharing=num_sharing(recipe, num_cards, num_cards)).to_dict()
    streams = recipe.base.residency == "host"
    ways = process_plans(whole_plans(recipe, partial(plan_of, may_change=False)), num_cards) if num_cards > 1 else []
    return {
        **found,
        "num_cards": num_cards,
        "parallel": recipe.train.parallel,
        "ways": [each.to_dict() for each in ways],
        "model": recipe.model.source,
        "budget": budget,
        "residency": recipe.base.residency,
        "num_streamed": (recipe.base.streamed_blocks or config.num_hidden_layers) if streams else 0,
        "cpu_seconds": time.process_time() - began,
    }


if __name__ == "__main__":
    main()
