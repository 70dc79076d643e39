"""How low can the rank be? NLL against rank, for LoRA and for DoRA.

    python benchmarks/rank_curve.py DATA [--dir runs/studies/rank_curve] [--ranks 16,2,1]

DATA holds <task>/<split>.parquet in the schema of `qdora guide own-data`. SmolLM2-135M in NF4, the commonsense
tasks in equal shares, alpha twice the rank. A `qdora study` in two passes: every learning rate with the first seed;
then, at the rate that the choosing half of the validation examples prefers for each kind and rank, the other seeds.
Each rank is compared with the first one of --ranks. Stopped, it goes on where it was; cells with the settings of
`benchmarks/study.py` are the same in its directory.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from measure import RESULTS, facts
from two_passes import RATES, SEEDS, common_settings, keep, two_passes

from qdora.memory.allocator import keep_freed_memory
from qdora.study.runner import study_run


def main() -> None:
    """Both passes of the study, and the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="not needed with --smoke")
    parser.add_argument("--dir", type=Path, default=Path("runs/studies/rank_curve"))
    parser.add_argument("--out", type=Path, default=RESULTS / "rank_curve")
    parser.add_argument("--ranks", default="16,2,1", help="the first one is the one to be compared with")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--limit", type=int, default=24, help="validation examples of each task")
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
    two_passes(grid(args), args.dir, study_run)
    keep(args.dir, args.out, head)


def grid(args: argparse.Namespace) -> dict[str, Any]:
    """The first pass as a study file."""
    ranks = [int(rank) for rank in args.ranks.split(",")]
    arms = {f"rank {rank}": {"adapter.rank": rank, "adapter.alpha": 2.0 * rank} for rank in ranks}
    kinds = {kind: {"adapter.kind": kind} for kind in ("lora", "dora")}
    return {
        "recipe": "quickstart",
        "settings": {"base.quant": "nf4", **common_settings(args)},
        "product": {"adapter": kinds, "rank": arms, "train.lr": list(RATES), "train.seed": [SEEDS[0]]},
        "compare": {
            "arm": "rank",
            "choose": ["train.lr"],
            "seed": "train.seed",
            "reference": next(iter(arms)),
            "metric": "nll_per_token",
        },
    }


if __name__ == "__main__":
    main()
