"""Cost of one adapted layer against the rank and against the number of tokens.

    OMP_NUM_THREADS=2 python benchmarks/layer_cost.py [--out benchmarks/results/layer_cost.json] [--smoke]

Forward and backward in bf16 on one 2048 x 2048 NF4 weight, in turns: ranks 8 to 512 at 1,024 tokens, and rank 16 at 256
to 8,192 tokens. A figure of the same name as --out is drawn beside it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from contenders import random_base
from layer_time import step
from measure import facts, in_turns, parser_of, ratio, spread, write

from qdora.files.svg_figure import svg_file
from qdora.memory.allocator import keep_freed_memory

RANKS = (8, 16, 32, 64, 128, 256, 512)
TOKENS = (256, 512, 1024, 2048, 4096, 8192)
RANK, NUM_TOKENS, FEATURES, REPEATS = 16, 1024, 2048, 9
LABELS = {
    "frozen": "frozen NF4 layer",
    "own_lora": "qdora QLoRA",
    "own_dora": "qdora QDoRA",
    "own_dora_new_norm": "qdora QDoRA, norm computed",
    "peft_lora": "PEFT QLoRA",
    "peft_dora_addmm": "PEFT QDoRA, norm by addmm",
}
COLORS = {
    "frozen": "0.6",
    "own_lora": "tab:blue",
    "own_dora": "tab:red",
    "own_dora_new_norm": "tab:orange",
    "peft_lora": "tab:green",
    "peft_dora_addmm": "tab:purple",
}
RATIOS = (
    ("own_dora", "own_lora"),
    ("own_dora", "peft_lora"),
    ("own_dora_new_norm", "own_lora"),
    ("peft_dora_addmm", "peft_lora"),
)


def main() -> None:
    """Both sweeps, the result file and the figure."""
    args = parser_of(__doc__, "layer_cost", smoke="a tiny layer and two rounds").parse_args()
    keep_freed_memory()
    features, repeats = (32, 2) if args.smoke else (FEATURES, REPEATS)
    ranks, tokens = (RANKS[:2], TOKENS[2:4]) if args.smoke else (RANKS, TOKENS)
    base = random_base(features, features)

    def sweep(settings: dict[int, tuple[int, int]]) -> list[dict[str, Any]]:
        rows = []
        for value, (rank, num_tokens) in settings.items():
            found = in_turns({name: step(name, base, rank, num_tokens) for name in LABELS}, repeats)
            rows.append(
                {
                    "value": value,
                    "seconds": {name: spread(each) for name, each in found.items()},
                    "ratios": {f"{a} / {b}": ratio(found[a], found[b]) for a, b in RATIOS},
                }
            )
        return rows

    by_rank = sweep({rank: (rank, NUM_TOKENS) for rank in ranks})
    by_tokens = sweep({num: (RANK, num) for num in tokens})
    result = facts("python benchmarks/layer_cost.py") | {
        "features": features,
        "repeats": repeats,
        "by_rank": by_rank,
        "by_tokens": by_tokens,
    }
    draw(result, args.out.with_suffix(".svg"))
    write(args.out, result)


def draw(result: dict[str, Any], out: Path) -> None:
    """Milliseconds over the rank, and over the tokens on logarithmic axes."""
    with svg_file(out, 10, 4) as figure:
        axes = figure.subplots(1, 2)
        panels = (
            ("by_rank", "rank", f"{NUM_TOKENS:,} tokens", partial(axes[0].set_xscale, "log", base=2)),
            ("by_tokens", "tokens", f"rank {RANK}", lambda: axes[1].loglog(base=2)),
        )
        for axis, (rows, what, title, scale) in zip(axes, panels, strict=True):
            scale()
            values = [row["value"] for row in result[rows]]
            for name, label in LABELS.items():
                times = [1e3 * row["seconds"][name]["median"] for row in result[rows]]
                axis.plot(values, times, "o-", ms=3, color=COLORS[name], label=label)
            axis.set(xlabel=what, ylabel="ms, forward and backward", title=title)
            axis.set_xticks(values, [f"{value:,}" for value in values], minor=False)
            axis.grid(alpha=0.3)
        axes[0].set_ylim(bottom=0)
        axes[0].legend(fontsize=8)
        size = f"{result['features']} x {result['features']}"
        figure.suptitle(f"One {size} layer, NF4, bf16, {result['num_threads']} threads")


if __name__ == "__main__":
    main()
