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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from frame import markdown, table
from measure import RESULTS, facts, parsed
from shared_study import RATES, SMOKE_RATES, TRAINED_TASKS, common_settings, keep_scores, run_asked, study_parser
from tables.table import compared, interval

from qdora.evaluate.example_intervals import weighted_mean
from qdora.recipe.section import with_settings
from qdora.study.compare import Arm, Results, comparisons, find_arms
from qdora.study.grid import Study
from qdora.study.scores import CellScores, Part
from qdora.study.study_directory import StudyDirectory, read_index

NAME, SMOKE_TASKS = "combined_vs_solo", ("demo/facts", "demo/odd")
TOGETHER, ALONE, WHOLE = "combined", "alone", "all tasks"
MEASURES = ("nll_per_token", "acc", "acc_norm")


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


class _Joined(Results):
    """Results in which the runs of single tasks with one seed are one cell, and in which only some tasks count.

    Args:
        together: The combined runs.
        alone: Task -> its arm; only these tasks count.
    """

    def __init__(self, store: StudyDirectory, study: Study, together: Arm, alone: dict[str, Arm]) -> None:
        super().__init__(store, study)
        self.together, self.alone = together, alone

    def _keys(self, key: str) -> list[str]:
        """The cells of which `key`, a cell or a seed, consists."""
        known = [arm.seeds[key] for arm in self.alone.values() if key in arm.seeds]
        return known or [key]

    def diverged(self, key: str) -> bool:
        return any(super(_Joined, self).diverged(each) for each in self._keys(key))

    def scores(self, key: str, part: Part | None = None) -> CellScores:
        found = [super(_Joined, self).scores(each, part) for each in self._keys(key)]
        measures = {measure for each in found for measure in each}
        return {
            measure: {
                task: scores for each in found for task, scores in each.get(measure, {}).items() if task in self.alone
            }
            for measure in measures
        }

    def _worst(self, key: str, measure: str) -> float:
        """Of runs of single tasks the diverged ones alone have the worst score."""
        keys, whole = self._keys(key), self.together.seeds.get(key)
        if keys == [key] or whole is None or super().diverged(whole):
            return super()._worst(keys[0], measure)
        tasks = {}
        for task, cell in ((task, arm.seeds[key]) for task, arm in self.alone.items()):
            is_lost = super().diverged(cell)
            found = super().scores(whole if is_lost else cell)[measure][task]
            tasks[task] = replace(found, values=super()._worst(cell, measure) * found.weights) if is_lost else found
        return weighted_mean(tasks, self.weighting(measure))


def summary(directory: Path, tasks: Sequence[str]) -> dict[str, Any]:
    """The comparison on all tasks, which is the primary one, and those on single tasks; scores; rates; costs.

    A positive improvement says that the combined adapter is better. The scores are means over seeds.
    """
    index, store = read_index(directory), StudyDirectory(directory, makes=False)
    study = with_settings(Study.model_validate(index["study"]), compare={"reference": ALONE})
    arms = {arm.name: arm for arm in find_arms(index["cells"], Results(store, study))}
    missing = [name for name in (TOGETHER, *tasks) if name not in arms]
    if missing:
        raise SystemExit(f"no run is finished, or every learning rate diverged, for: {', '.join(missing)}")
    together, alone = arms[TOGETHER], {task: arms[task] for task in tasks}

    def compared(names: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Rows of the comparison on these tasks, and the mean scores of both sides."""
        parts = {task: alone[task] for task in names}
        both, joined = (together, _joined_arm(list(parts.values()))), _Joined(store, study, together, parts)
        rows = comparisons(both, joined, MEASURES, index["cells"])
        shared = [seed for seed in together.seeds if seed in both[1].seeds]
        means = {
            arm.name: {
                each: float(np.mean([joined.mean(arm.seeds[seed], each) for seed in shared])) for each in MEASURES
            }
            for arm in both
        }
        return rows, means

    whole, of_tasks = compared(tasks), {task: compared([task]) for task in tasks}
    for rows, _ in of_tasks.values():
        for row in rows:
            row |= {"role": "exploratory", "winner": "", "verdict": "exploratory"}
    return {
        "tasks": list(tasks),
        "comparisons": {WHOLE: whole[0]} | {task: rows for task, (rows, _) in of_tasks.items()},
        "scores": {WHOLE: whole[1]} | {task: means for task, (_, means) in of_tasks.items()},
        "rates": {
            name: {"rate": arms[name].rate, "is_interior": arms[name].is_interior} for name in (TOGETHER, *tasks)
        },
        "costs": {name: [_costs(store, key) for key in arms[name].seeds.values()] for name in (TOGETHER, *tasks)},
    }


def _joined_arm(arms: Sequence[Arm]) -> Arm:
    """The arms of single tasks as one, whose cell of a seed is named by the seed."""
    shared = [seed for seed in arms[0].seeds if all(seed in arm.seeds for arm in arms)]
    return Arm(
        context={},
        name=ALONE,
        kind="trained",
        rate="",
        is_interior=all(arm.is_interior for arm in arms),
        seeds={seed: seed for seed in shared},
        num_missing=sum(arm.num_missing for arm in arms),
        base_key=None,
        dense_key=None,
    )


def _costs(store: StudyDirectory, key: str) -> dict[str, Any]:
    result = store.result(key)
    assert result is not None, key
    return {name: result.get(name) for name in ("num_steps", "seconds")}


@table("combined_vs_solo/run")
def combined_vs_solo_table(result: Any) -> str:
    """NLL and accuracy of both on each task, and what the combined adapter gains."""

    def gain(task: str, measure: str, scale: float = 100.0, form: str = "+.1f") -> str:
        (row,) = (each for each in result["comparisons"][task] if each["measure"] == measure)
        return interval(*(scale * row[name] for name in ("improvement", "lower", "upper")), form=form)

    rows = []
    for task in (*result["tasks"], WHOLE):
        alone, combined = (result["scores"][task][side] for side in (ALONE, TOGETHER))
        row = [task, *(f"{each['nll_per_token']:.3f}" for each in (alone, combined))]
        row += [gain(task, "nll_per_token", 1.0, "+.3f"), *(f"{100 * each['acc']:.1f}" for each in (alone, combined))]
        rows.append([*row, gain(task, "acc"), result["rates"][task]["rate"] if task in result["rates"] else "–"])
    header = ["task", "NLL alone", "combined", "lower by", "accuracy % alone", "combined", "higher by", "rate alone"]
    (row,) = (each for each in result["comparisons"][WHOLE] if each["role"] == "primary")
    seconds = {name: sum(each["seconds"] for each in runs) / len(runs) for name, runs in result["costs"].items()}
    solo = sum(seconds[task] for task in result["tasks"])
    so_far = f"So far {result['cells_done']} of {result['cells']} runs are done. "
    return markdown(header, rows) + (
        f"\nThe combined adapter against those of single tasks, NLL of all tasks lower by {compared(row)} "
        f"({row['num_seeds']} seeds). A difference of less than {row['zone']:g} counts as none. Accuracy of all tasks "
        f"by likelihood per character: higher by {gain(WHOLE, 'acc_norm')} points. Learning rate of the combined runs: "
        f"{result['rates'][TOGETHER]['rate']}. {so_far if result['cells_done'] < result['cells'] else ''}"
        f"All runs of single tasks of a seed together took {solo / seconds[TOGETHER]:.1f} times as long.\n"
    )


if __name__ == "__main__":
    main()
