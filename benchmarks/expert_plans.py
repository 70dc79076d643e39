"""Plans of mixtures of experts from their stored shapes: what fits on cards of 24 and 40 GB, with blocks in host
memory where it must.

    python benchmarks/expert_plans.py [--out benchmarks/results/expert_plans.json] [--only NAME] [--smoke]

QDoRA on every linear layer but the routers, of rank 4 on the experts and 16 elsewhere, NF4 in blocks of 64 with double
quantisation, bf16 adapters, 8-bit AdamW, checkpointing, micro-batches of 2,048 labelled tokens, 16 to a step. A plan is
for the worse of two routings: nearly all tokens to the same experts, or tokens that divide evenly
(`even_routing_bytes`). Blocks are moved to host memory until the plan fits. `cpu_seconds` is the time of the first plan
on one core. With --only one shape is planned, and the others stay as they are in the file.

The linear attention of Qwen3-Next is planned as transformers computes it without flash-linear-attention.

Bar: a plan of each shape in less than 120 s of one core.
"""

from __future__ import annotations

import json
import math
import time
from typing import Any

from measure import facts, parser_of, save, write
from transformers import AutoConfig, PreTrainedConfig

from qdora.plan.memory_plan import plan
from qdora.plan.public_shapes import public_shapes
from qdora.recipe.byte_size import parse_size
from qdora.recipe.recipe_file import recipe_from
from qdora.recipe.settings import Recipe

NUM_TOKENS, STEP_TOKENS = 2048, 32_768
RANK, EXPERT_RANK = 16, 4
CARDS = ("24 GB", "40 GB")
BAR_SECONDS = 120
SHAPES = (
    "Qwen/Qwen3-30B-A3B",
    "openai/gpt-oss-20b",
    "mistralai/Mixtral-8x7B-v0.1",
    "Qwen/Qwen3-Next-80B-A3B-Instruct",
)
SMOKE = {
    "model_type": "mixtral",
    "hidden_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 512,
}


def main() -> None:
    """All shapes."""
    parser = parser_of(__doc__, "expert_plans", smoke="a tiny shape")
    parser.add_argument("--only", help="the shape of this name alone")
    args = parser.parse_args()
    configs: dict[str, PreTrainedConfig] = {name: public_shapes()[name].config() for name in SHAPES}
    if args.smoke:
        configs = {"random/tiny": AutoConfig.for_model(**SMOKE)}
    found: dict[str, Any] = {}
    if args.only:
        found = json.loads(args.out.read_text(encoding="utf-8"))["shapes"] if args.out.exists() else {}
        configs = {name: config for name, config in configs.items() if name.endswith(f"/{args.only}")}
    for name, config in configs.items():
        found[name.rpartition("/")[2]] = shape_result(name, config, ("630MiB",) if args.smoke else CARDS)
        save(args.out, result_of(found))
    write(args.out, result_of(found))


def result_of(shapes: dict[str, Any]) -> dict[str, Any]:
    """The file: the shapes so far, in the order of `SHAPES`."""
    order = [name.rpartition("/")[2] for name in SHAPES]
    shapes = dict(sorted(shapes.items(), key=lambda each: order.index(each[0]) if each[0] in order else 0))
    return {
        **facts("python benchmarks/expert_plans.py"),
        "num_tokens": NUM_TOKENS,
        "rank": RANK,
        "expert_rank": EXPERT_RANK,
        "shapes": shapes,
        "passes": {f"a plan in {BAR_SECONDS} s": all(each["cpu_seconds"] < BAR_SECONDS for each in shapes.values())},
    }


def recipe_of(name: str, num_streamed: int) -> Recipe:
    """The recipe of a shape with some of its blocks in host memory."""
    base: dict[str, Any] = {"residency": "host", "streamed_blocks": num_streamed} if num_streamed else {}
    return recipe_from(
        {
            "model": {"source": name, "dtype": "bfloat16"},
            "base": base,
            "adapter": {"rank": RANK, "experts": {"rank": EXPERT_RANK}},
            "data": {"mix": [{"source": "some/data"}], "max_length": NUM_TOKENS},
            "train": {"steps": 1, "tokens_per_step": STEP_TOKENS, "micro_batch_tokens": NUM_TOKENS},
        }
    )


def shape_result(name: str, config: PreTrainedConfig, cards: tuple[str, ...]) -> dict[str, Any]:
    """The plan of a shape whose blocks are all on the card, and what each card needs to be enough."""
    began = time.process_time()
    whole = plan(recipe_of(name, 0), config=config).to_dict()
    seconds = time.process_time() - began
    return {**whole, "cpu_seconds": seconds, "cards": {card: fitted(name, config, whole, card) for card in cards}}


def fitted(name: str, config: PreTrainedConfig, whole: dict[str, Any], card: str) -> dict[str, Any]:
    """The plan with the fewest blocks in host memory that fits a card, or with all of them there if none does."""
    found, streamed, limit = whole, 0, parse_size(card)
    while found["peak_bytes"] > limit and streamed < whole["num_blocks"]:
        more = math.ceil((found["peak_bytes"] - limit) / whole["block_bytes"])
        # Two blocks' bytes stay on the card, as the slots.
        streamed = min(whole["num_blocks"], streamed + max(1, more + (0 if streamed else 2)))
        found = plan(recipe_of(name, streamed), config=config).to_dict()
    names = ("peak_bytes", "even_routing_bytes", "host_bytes", "step_seconds", "components", "peak_in")
    return {"fits": found["peak_bytes"] <= limit, "num_streamed": streamed, **{each: found[each] for each in names}}


if __name__ == "__main__":
    main()
