"""One adapter for all data sets, or one for each?

    python benchmarks/combined_vs_solo.py DATA [--processes 2] [--hours 2.4]

DATA holds <task>/<split>.parquet in the schema of `qdora guide own-data`. QDoRA on SmolLM2-135M in NF4, the
commonsense tasks but BoolQ. The combined run has all tasks in equal shares. The run of a task alone has as many steps,
each with the task's examples of a combined step: so every adapter is updated equally often, and all of them together
see as many examples as the combined run. A `qdora study` finds the learning rate of each run with seeds of its own, and
trains them. On a task's test examples the combined adapter is compared with the one of that task alone. The rules are
those of a study; what counts is the NLL of all tasks per answer token. Stopped, it goes on where it was; --resume-from
OUT goes on in a new --dir from what was kept there.
"""

from __future__ import annotations

import argparse
from typing import Any

from combined_summary import TOGETHER, summary
from measure import RESULTS, facts, parsed
from shared_study import (
    RATES,
    SMOKE_RATES,
    TRAINED_TASKS,
    common_settings,
    keep_scores,
    run_asked,
    study_parser,
)

NAME = "combined_vs_solo"
SMOKE_TASKS = ("demo/facts", "demo/odd")


def main() -> None:
    """The runs that are missing, and the comparison of those that are done."""
    parser = study_parser(__doc__, NAME, smoke="a random model and two tasks")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--per-task", type=int, default=2, help="examples of a task in a step")
    parser.add_argument("--limit", type=int, default=100, help="test examples of each task")
    args = parsed(parser)
    if args.smoke:
        args.steps, args.limit = 3, 4
    head = facts(
        f"python benchmarks/{NAME}.py DATA --steps {args.steps} --per-task {args.per_task} --limit {args.limit}"
    )
    args.dir.mkdir(parents=True, exist_ok=True)
    tasks = SMOKE_TASKS if args.smoke else TRAINED_TASKS
    args.batch = args.per_task * len(tasks)
    document = grid(args, tasks)
    if run_asked(args, document):
        default = args.dir / "report" if args.report or args.smoke else RESULTS / NAME
        keep_scores(args.dir, args.out or default, head | summary(args.dir, tasks))


def grid(args: argparse.Namespace, tasks: tuple[str, ...]) -> dict[str, Any]:
    """The study file. Its own comparisons are not made: runs that know one task have no scores of the others."""
    settings = common_settings(args, tasks)
    mix = settings.pop("data.mix")
    alone = {source["task"]: {"data.mix": [source], "train.batch": args.per_task} for source in mix}
    return {
        "recipe": "quickstart",
        "settings": {"adapter.kind": "dora", "adapter.rank": 16, "adapter.alpha": 32.0, **settings},
        "product": {"data": {TOGETHER: {"data.mix": mix}, **alone}},
        "seeds": [0, 1, 2],  # as many as in grids/compressed.yaml
        "rates": SMOKE_RATES if args.smoke else RATES,
        "bases": False,
        "compare": {
            "arm": "data",
            "reference": TOGETHER,
            "metric": "nll_per_token",
            "split": "test",
        },
    }


if __name__ == "__main__":
    main()
