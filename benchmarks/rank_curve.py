"""How low can the rank be? NLL against rank, for LoRA and for DoRA.

    python benchmarks/rank_curve.py DATA [--ranks 16,2,1] [--processes 2] [--hours 2.4]

DATA holds <task>/<split>.parquet in the schema of `qdora guide own-data`. SmolLM2-135M in NF4, the commonsense
tasks but BoolQ in equal shares, alpha twice the rank. A `qdora study` finds the learning rate of each kind and rank
with seeds of its own, then compares each rank with the first one of --ranks. Stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from measure import facts
from shared_study import RATES, SEEDS, SMOKE_RATES, add_run_options, common_settings, run_and_keep

from qdora.memory.allocator import keep_freed_memory


def main() -> None:
    """The study, and the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="not needed with --smoke")
    add_run_options(parser, "rank_curve")
    parser.add_argument("--ranks", default="16,2,1", help="the first one is the one to be compared with")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--limit", type=int, default=100, help="test examples of each task")
    parser.add_argument("--smoke", action="store_true", help="a random model and two steps: shows that it runs")
    args = parser.parse_args()
    if not args.smoke and args.data is None:
        parser.error("DATA is missing")
    if args.smoke:
        args.ranks, args.steps, args.batch, args.limit = "4,1", 2, 4, 4
    options = f"--ranks {args.ranks} --steps {args.steps} --batch {args.batch} --limit {args.limit}"
    head = facts(f"python benchmarks/rank_curve.py DATA {options}")
    keep_freed_memory()
    args.dir.mkdir(parents=True, exist_ok=True)
    run_and_keep(args, grid(args), head, "rank_curve")


def grid(args: argparse.Namespace) -> dict[str, Any]:
    """The study file."""
    ranks = [int(rank) for rank in args.ranks.split(",")]
    arms = {f"rank {rank}": {"adapter.rank": rank, "adapter.alpha": 2.0 * rank} for rank in ranks}
    kinds = {kind: {"adapter.kind": kind} for kind in ("lora", "dora")}
    return {
        "recipe": "quickstart",
        "settings": {"base.quant": "nf4", **common_settings(args)},
        "product": {"adapter": kinds, "rank": arms},
        "seeds": list(SEEDS),
        "rates": SMOKE_RATES if args.smoke else RATES,
        "compare": {
            "arm": "rank",
            "reference": next(iter(arms)),
            "metric": "nll_per_token",
            "split": "test",
        },
    }


if __name__ == "__main__":
    main()
