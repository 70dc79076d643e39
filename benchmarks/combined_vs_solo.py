"""One adapter for all data sets, or one for each? And which data set hurts or helps which?

    python benchmarks/combined_vs_solo.py DATA [--arms combined,solo,without] [--seconds 600]

DATA holds <task>/<split>.parquet in the schema of `qdora guide own-data`. SmolLM2-135M in NF4, the eight
commonsense tasks in equal shares, QLoRA and QDoRA. A cell is one training run, scored on validation examples:

    base            no training
    combined        all tasks
    solo TASK       TASK alone: as many steps, each with TASK's examples of a combined step, so the eight solo runs
                    together see the examples that the combined run sees, once each, in as many steps
    without TASK    all others: as many steps, each with the others' examples of a combined step

A finished cell is kept in the file of cells and not run again; several processes may work on one file. Learning rates
are chosen beforehand, for combined and solo runs each: --sweep 1e-3,2e-3 trains them with a seed of its own and scores
them on validation examples that are not used again.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from byte_tokenizer import byte_tokenizer
from combined_summary import best_rates, summary
from measure import RESULTS, facts, write
from mixed_data import TASKS, fitted, smoke_model
from rich.console import Console
from solo_recipes import leave_one_out_recipes, solo_recipes

from qdora.data.build_data import make_loader, read_data, tokenized_mix
from qdora.data.example import Example
from qdora.evaluation.suite import evaluate, spread
from qdora.files.atomic import atomic_write_text
from qdora.memory.allocator import keep_freed_memory
from qdora.model.build_model import choose_compute, find_model, put_adapters
from qdora.model.inject import adapter_parameters
from qdora.recipe.recipe_file import recipe_from, settings
from qdora.recipe.settings import Recipe
from qdora.run.load_base import load_base
from qdora.train.optimizer import AdapterOptimizer
from qdora.train.task_weights import task_weights

SWEEP_SEED = 100
SWEEP_TASKS = ("siqa", "hellaswag", "winogrande", "arc_e")
"""Solo runs of a sweep: four tasks cost half of eight."""
SMOKE_TASKS = ("demo/facts", "demo/odd", "demo/cause")


def main() -> None:
    """Cells that are missing, then the summary of those that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="not needed with --smoke")
    parser.add_argument("--out", type=Path, default=RESULTS / "combined_vs_solo.json")
    parser.add_argument("--arms", default="combined,solo", help="of combined, solo, without")
    parser.add_argument("--kinds", default="lora,dora")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--per-task", type=int, default=2, help="examples of a task in a combined step")
    parser.add_argument("--lr", default="combined=2e-3,solo=2e-3", help="of each way to train")
    parser.add_argument("--limit", type=int, default=48, help="validation examples of a task")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no cell after so many")
    parser.add_argument("--sweep", default="", help="learning rates to try before the comparison")
    parser.add_argument("--smoke", action="store_true", help="a random model and three tasks: shows that it runs")
    args = parser.parse_args()
    if not args.smoke and args.data is None:
        parser.error("DATA is missing")
    keep_freed_memory()
    until = time.monotonic() + args.seconds
    grid = Grid(args)
    for key in sweep_keys(args, grid.tasks) if args.sweep else grid_keys(args, grid.tasks):
        if time.monotonic() > until:
            break
        grid.run(key)
    command = f"python benchmarks/combined_vs_solo.py DATA --arms {args.arms} --kinds {args.kinds} --seeds {args.seeds}"
    command += f" --steps {args.steps} --per-task {args.per_task} --limit {args.limit} --lr {args.lr}"
    write(args.out, facts(command) | grid.result())


def grid_keys(args: argparse.Namespace, tasks: tuple[str, ...]) -> Iterator[str]:
    """kind:seed:arm:lr of every cell asked for; what one seed needs comes before the next seed."""
    rates = dict(item.split("=") for item in args.lr.split(","))
    yield "none:0:base:0"
    for seed in args.seeds.split(","):
        for way in args.arms.split(","):
            for kind in args.kinds.split(","):
                names = [way] if way == "combined" else [f"{way} {task}" for task in tasks]
                rate = rates["solo" if way == "solo" else "combined"]
                yield from (f"{kind}:{seed}:{name}:{rate}" for name in names)


def sweep_keys(args: argparse.Namespace, tasks: tuple[str, ...]) -> Iterator[str]:
    """The cells of the search for learning rates."""
    tried = [task for task in tasks if task in SWEEP_TASKS or args.smoke]
    names = {"combined": ["combined"], "solo": [f"solo {task}" for task in tried]}
    for rate in args.sweep.split(","):
        for way in args.arms.split(","):
            yield from (f"{args.kinds.split(',')[0]}:{SWEEP_SEED}:{name}:{rate}" for name in names[way])


class Grid:
    """The cells, and what all of them share: base, tokenizer, data of each seed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tasks = SMOKE_TASKS if args.smoke else TASKS
        self.path = args.out.with_name(f"{args.out.stem}_cells.json")
        self.data_of = lru_cache(maxsize=1)(self._data_of)
        recipe = self.recipe("lora", 0, 1.0)
        if args.smoke:
            self.tokenizer: Any = byte_tokenizer()
            self.base = smoke_model(vocabulary=len(self.tokenizer))
        else:
            source, self.tokenizer = find_model(recipe)
            self.base = load_base(recipe, source, choose_compute(recipe.model.dtype))
        asked = {"steps": args.steps, "per_task": args.per_task, "limit": args.limit, "smoke": args.smoke}
        with self._cells_file() as document:
            if document.setdefault("settings", asked) != asked:
                raise SystemExit(
                    f"{self.path} has cells of other settings: {document['settings']}. Give another --out."
                )

    def recipe(self, kind: str, seed: int, lr: float, data: Path | None = None) -> Recipe:
        """The combined run."""
        args, limit = self.args, self.args.steps * self.args.per_task
        place = data or args.data
        mix = [
            {"task": task, "limit": limit} | ({} if args.smoke else {"path": str(place / task)}) for task in self.tasks
        ]
        return recipe_from(
            {
                "model": {"source": "builtin"},
                "adapter": {"kind": kind, "rank": 16, "alpha": 32.0},
                "data": {
                    "mix": mix,
                    "strategy": "equal",
                    "max_length": 256,
                    "too_long": "truncate",
                    "seed": seed,
                },
                "train": {
                    "steps": args.steps,
                    "batch": args.per_task * len(mix),
                    "lr": lr,
                    "warmup": 0.1,
                    "optimizer": "adamw",
                    "seed": seed,
                },
                "memory": {"checkpointing": False},
            }
        )

    def _data_of(self, seed: int) -> tuple[dict[str, list[Example]], dict[str, list[Example]]]:
        """Training and validation examples of every task; a sweep has validation examples of its own."""
        train, validation = read_data(self.recipe("lora", seed, 1.0).data)
        first = 1 if seed == SWEEP_SEED else 0
        scored = {task: spread(examples[first::2], self.args.limit) for task, examples in validation.items()}
        return dict(zip(self.tasks, train, strict=True)), scored

    def run(self, key: str) -> None:
        """Train and score a cell, unless that is done."""
        with self._cells_file() as document:
            if key in document["cells"]:
                return
        began = time.perf_counter()
        kind, seed, name, lr = key.split(":")
        train, validation = self.data_of(int(seed))
        way, _, task = name.partition(" ")
        combined = self.recipe("lora" if kind == "none" else kind, int(seed), float(lr) or 1.0)
        shares = [1.0] * len(self.tasks)
        found: dict[str, Any] = {}
        model = copy.deepcopy(self.base)
        if way != "base":
            parts = {"solo": solo_recipes, "without": leave_one_out_recipes}
            recipe = parts[way](combined, shares)[task] if task else combined
            found = self._train(model, recipe, [train[source.label] for source in recipe.data.mix])
        scored = {task: validation[task]} if way == "solo" else validation
        result = evaluate(model, self.tokenizer, scored, per_example=True)
        scores: dict[str, dict[str, list[Any]]] = {}
        for record in result.per_example:
            columns = scores.setdefault(record["task"], {"nll": [], "acc": [], "tokens": []})
            for column, value in zip(columns.values(), _scores(record), strict=True):
                column.append(value)
        found |= {"seconds": round(time.perf_counter() - began, 1), "scores": scores}
        with self._cells_file() as document:
            document["cells"][key] = found
        print(key, found["seconds"], round(result.average.nll_per_token, 4), result.average.acc, flush=True)

    def _train(self, model: Any, recipe: Recipe, examples: list[list[Example]]) -> dict[str, Any]:
        """Train the recipe on the examples of its sources; how many it saw, and its losses."""
        put_adapters(model, recipe)
        loader = make_loader(recipe, tokenized_mix(recipe, self.tokenizer, examples), self.tokenizer)
        optimizer = AdapterOptimizer(adapter_parameters(model), name=recipe.train.optimizer, lr=recipe.train.lr)
        weights, console = task_weights(recipe, loader), Console(quiet=True)
        lines = fitted(model, optimizer, loader, recipe.train, console=console, task_weights=weights)
        totals = {
            name: sum(line[name] for line in lines) for name in ("num_tokens", "num_label_tokens", "num_examples")
        }
        return totals | {"num_steps": len(lines), "losses": [round(line["loss"], 4) for line in lines]}

    def result(self) -> dict[str, Any]:
        """The settings and what the cells say."""
        with self._cells_file() as document:
            cells = document["cells"]
        recipe = self.recipe("lora", 0, 1.0, data=Path("/DATA"))
        shown = settings(recipe)
        for source in shown["data"]["mix"]:
            source.pop("path", None)
        return {
            "settings": document["settings"],
            "recipe": shown,
            **summary({key: cell for key, cell in cells.items() if f":{SWEEP_SEED}:" not in key}, self.tasks),
            "sweep": best_rates({key: cell for key, cell in cells.items() if f":{SWEEP_SEED}:" in key}),
        }

    @contextmanager
    def _cells_file(self) -> Iterator[dict[str, Any]]:
        """The file of cells, for this process alone, written again if it was changed."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            before = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
            document = json.loads(before) if before else {"cells": {}}
            yield document
            lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(cell)}" for key, cell in document["cells"].items())
            text = f'{{"settings": {json.dumps(document["settings"])},\n"cells": {{\n{lines}\n}}}}\n'
            if text != before:
                atomic_write_text(self.path, text)
        finally:
            os.close(folder)


def _scores(record: dict[str, Any]) -> tuple[float, float, int]:
    return round(record["nll"], 5), record.get("acc", 0.0), record["num_answer_tokens"]


if __name__ == "__main__":
    main()
