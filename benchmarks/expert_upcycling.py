"""A mixture made from SmolLM2-135M, then QDoRA on its experts, on its attention, and on both: answer NLL on test.

    OMP_NUM_THREADS=1 python benchmarks/expert_upcycling.py DATA [--dir runs/studies/expert_upcycling] [--seconds 3600]

The default sizes are small: the mixture takes 19 minutes of one core to train, each of 12 adapters about 2.

DATA holds <task>/<split>.parquet in the schema of `qdora guide own-data`. Every MLP is divided into a shared expert and
four others, of which a router chooses two for each token (upcycled_mixture.py). MLPs and routers are trained on the
texts of one half of the training examples and saved as a Qwen2-MoE checkpoint. qdora loads it in NF4 and trains
adapters on the other half:

    experts      rank 8 on all stacks of experts; the shared experts stay frozen
    attention    rank 16 on q, k, v and o, which is nearly as many parameters
    both

Every arm is trained at each rate with the first seed. The rate of the lowest NLL on validation examples is kept and
trained with the other seeds; a seed gives all arms the same examples in the same order. Test examples are scored once
for each arm and seed. Every step that is done is kept in --dir: the same call resumes, and once the mixture is there,
several processes may work on one --dir, each with --arms of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import write_model
from expert_upcycling_summary import summary
from measure import facts, parsed, parser_of, write
from mixed_data import fitted
from rich.console import Console
from upcycled_mixture import expert_load, rows_of_text, trained, upcycled

from qdora.data.build_data import make_loader, read_data, run_examples, tokenized_mix
from qdora.data.example import Example
from qdora.evaluation.perplexity import text_perplexity
from qdora.evaluation.suite import evaluate, spread
from qdora.files.atomic import atomic_write_json
from qdora.memory.allocator import keep_freed_memory
from qdora.model.build_model import choose_compute, describe_adapters, find_model, put_adapters, write_adapter
from qdora.model.inject import adapter_parameters
from qdora.model.load import load_model
from qdora.model.source import load_tokenizer, resolve
from qdora.recipe.data_settings import COMMONSENSE_TASKS
from qdora.recipe.recipe_file import recipe_from
from qdora.recipe.settings import Recipe
from qdora.run.load_base import load_base
from qdora.train.optimizer import AdapterOptimizer

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ARMS = {"experts": ["experts"], "attention": ATTENTION, "both": ["experts", *ATTENTION]}
RANK, EXPERT_RANK, SCALING = 16, 8, 2.0
CALIBRATION_ROWS = 8
SMOKE_TASKS = ("demo/facts", "demo/odd")
SIZES = ("per_task", "row_tokens", "rows", "mixture_steps", "mixture_lr", "steps", "batch", "rates", "seeds")
SIZES += ("limit", "test_limit")
SMOKE = {
    "per_task": 40,
    "row_tokens": 64,
    "rows": 2,
    "mixture_steps": 3,
    "steps": 2,
    "batch": 4,
    "rates": "1e-3,3e-3",
    "seeds": "0,1",
    "limit": 4,
    "test_limit": 6,
}


def main() -> None:
    """The steps that are missing, and the result if none is left."""
    parser = parser_of(__doc__, "expert_upcycling", smoke="a random model and two tasks", data=True)
    parser.add_argument("--dir", type=Path, default=Path("runs/studies/expert_upcycling"))
    parser.add_argument("--per-task", type=int, default=400, help="training examples of a task, half for each stage")
    parser.add_argument("--row-tokens", type=int, default=128)
    parser.add_argument("--rows", type=int, default=1, help="of a step of the mixture")
    parser.add_argument("--mixture-steps", type=int, default=200)
    parser.add_argument("--mixture-lr", type=float, default=2e-4)
    parser.add_argument("--steps", type=int, default=10, help="of an adapter")
    parser.add_argument("--batch", type=int, default=8, help="examples of a step of an adapter")
    parser.add_argument("--rates", default="2e-3,5e-3")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--limit", type=int, default=8, help="validation examples of a task")
    parser.add_argument("--test-limit", type=int, default=12, help="test examples of a task")
    parser.add_argument("--arms", default=",".join(ARMS), help="the result is written by a call for all of them")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no step after so many")
    args = parsed(parser)
    vars(args).update(SMOKE if args.smoke else {"data": args.data.resolve()})
    keep_freed_memory()
    study = Upcycling(args)
    arms = args.arms.split(",")
    cells = study.cells(arms)
    if set(arms) != {*ARMS}:
        return
    sizes = {name: getattr(args, name) for name in SIZES}
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in sizes.items())
    head = facts(f"python benchmarks/expert_upcycling.py DATA {options}") | {"settings": sizes}
    write(args.out, head | {"mixture": study.mixture} | summary(cells, study.tasks))


class Upcycling:
    """The mixture and the adapters on it, with what they share: examples, tokenizer, the base in NF4."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.until = args, time.monotonic() + args.seconds
        self.tasks = SMOKE_TASKS if args.smoke else COMMONSENSE_TASKS
        args.dir.mkdir(parents=True, exist_ok=True)
        asked = {name: getattr(args, name) for name in SIZES}
        if self.once("sizes.json", lambda: asked) != asked:
            raise SystemExit(f"{args.dir} holds a study of other sizes. Fix: give another --dir.")

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The JSON value of a file of --dir, made if it is not there; ends the program if it is too late for that."""
        file = self.args.dir / name
        if not file.exists():
            if time.monotonic() > self.until:
                sys.exit(f"no time left for {name}: call again to resume")
            began = time.perf_counter()
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_json(file, make())
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        return json.loads(file.read_text(encoding="utf-8"))

    def recipe(self, arm: str, seed: int, lr: float) -> Recipe:
        """QDoRA of an arm on the mixture."""
        args = self.args
        places = [
            {"task": task} if args.smoke else {"task": task, "path": str(args.data / task)} for task in self.tasks
        ]
        adapter: dict[str, Any] = {"rank": RANK, "alpha": SCALING * RANK, "targets": ARMS[arm]}
        if "experts" in ARMS[arm]:
            adapter |= {"experts": {"rank": EXPERT_RANK}, "same_scaling": True}
        return recipe_from(
            {
                "model": {"source": str(args.dir.resolve() / "mixture")},
                "adapter": adapter,
                "data": {
                    "mix": [{**place, "limit": args.per_task} for place in places],
                    "strategy": "equal",
                    "max_length": 256,
                    "too_long": "drop",
                    "seed": seed,
                },
                "train": {
                    "steps": args.steps,
                    "batch": args.batch,
                    "lr": lr,
                    "warmup": 0.1,
                    "optimizer": "adamw",
                    "seed": seed,
                },
                "memory": {"checkpointing": False},
            }
        )

    @cached_property
    def examples(self) -> dict[str, list[list[Example]]]:
        """Split -> examples of each task; the training examples are in two halves, mixture and adapters."""
        recipe = self.recipe("both", 0, 1.0)
        train, validation = read_data(recipe.data)
        test = run_examples(recipe, "test")
        limits = {"validation": self.args.limit, "test": self.args.test_limit}
        found = {"mixture": [list(part)[0::2] for part in train], "adapters": [list(part)[1::2] for part in train]}
        for split, each in (("validation", validation), ("test", test)):
            found[split] = [spread(each[task], limits[split]) for task in self.tasks]
        return found

    @cached_property
    def mixture(self) -> dict[str, Any]:
        """The mixture, made, trained and saved; what it and the dense model make of text."""
        return self.once("mixture.json", self._make_mixture)

    def _make_mixture(self) -> dict[str, Any]:
        args, folder = self.args, self.args.dir / "mixture"
        source = resolve(write_model(args.dir / "dense") if args.smoke else "builtin")
        tokenizer = load_tokenizer(source)
        texts = [f"{example.prompt}{example.answer}" for part in self.examples["validation"] for example in part]
        held_out, rows = (
            rows_of_text(tokenizer, [*chain(*self.examples[part])], args.row_tokens, seed=0)
            for part in ("validation", "mixture")
        )

        def nll(model: Any) -> float:
            found = text_perplexity(model, tokenizer, texts, window=args.row_tokens)
            return found.nll_sum / found.num_tokens

        dense = load_model(source, quant="none", compute_dtype=torch.float32)
        model = upcycled(dense, rows[:CALIBRATION_ROWS])
        before = copy.deepcopy(model).bfloat16()
        found: dict[str, Any] = {"nll": {"dense": nll(dense.bfloat16()), "untrained": nll(before)}}
        found["load"] = {"untrained": expert_load(before, held_out)}
        del dense, before
        began = time.perf_counter()
        found["losses"] = trained(model, rows, steps=args.mixture_steps, rows_per_step=args.rows, lr=args.mixture_lr)
        found["train_seconds"] = time.perf_counter() - began
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found["load"]["trained"] = expert_load(model, held_out)
        found["nll"] |= {"trained": nll(model), "trained_nf4": nll(self.base)}
        found["num_parameters"] = model.num_parameters()
        found["num_tokens"] = args.mixture_steps * args.rows * args.row_tokens
        return found | {"passes": found["num_tokens"] / rows.numel(), "num_validation_texts": len(texts)}

    @cached_property
    def found(self) -> tuple[Any, Any]:
        """Source and tokenizer of the mixture."""
        return find_model(self.recipe("both", 0, 1.0))

    @cached_property
    def base(self) -> Any:
        """The mixture in NF4, as `qdora train` loads it."""
        recipe = self.recipe("both", 0, 1.0)
        return load_base(recipe, self.found[0], choose_compute(recipe.model.dtype))

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the mixture."""
        return self.found[1]

    def cells(self, names: list[str]) -> dict[str, Any]:
        """The base's scores on test, and of each arm its rates and its runs at the chosen rate, by seed."""
        rates = self.args.rates.split(",")
        first, *others = (int(seed) for seed in self.args.seeds.split(","))
        _ = self.mixture
        arms: dict[str, Any] = {}
        for arm in names:
            tried = {}
            for rate in rates:
                self.train(arm, first, rate)
                tried[rate] = self.score(arm, first, rate, "validation")["nll_per_token"]
            arms[arm] = {"rates": tried, "lr": min(tried, key=tried.__getitem__)}
        for seed in (first, *others):
            for arm, found in arms.items():
                run = self.train(arm, seed, found["lr"])
                run["test"] = self.score(arm, seed, found["lr"], "test")
                found.setdefault("runs", {})[str(seed)] = run
        return {"base": self.once("base/test.json", lambda: self._scores(self.base, "test")), "arms": arms}

    def train(self, arm: str, seed: int, rate: str) -> dict[str, Any]:
        """Train an arm, unless that is done; what it trained on, and its losses."""
        name = f"{arm}-seed{seed}-lr{rate}"
        return self.once(f"{name}/training.json", lambda: self._train(self.recipe(arm, seed, float(rate)), name))

    def _train(self, recipe: Recipe, name: str) -> dict[str, Any]:
        model, began = copy.deepcopy(self.base), time.perf_counter()
        put_adapters(model, recipe)
        mix = tokenized_mix(recipe, self.tokenizer, self.examples["adapters"])
        optimizer = AdapterOptimizer(adapter_parameters(model), name=recipe.train.optimizer)
        loader, console = make_loader(recipe, mix, self.tokenizer), Console(quiet=True)
        lines = fitted(model, optimizer, loader, recipe.train, console=console)
        write_adapter(model, recipe, self.args.dir / name / "adapter")
        totals = {each: sum(line[each] for line in lines) for each in ("num_tokens", "num_examples")}
        about = describe_adapters(model) | {"seconds": time.perf_counter() - began}
        return totals | about | {"losses": [round(line["loss"], 4) for line in lines]}

    def score(self, arm: str, seed: int, rate: str, split: str) -> dict[str, Any]:
        """Score a trained arm, unless that is done."""
        name = f"{arm}-seed{seed}-lr{rate}"

        def make() -> dict[str, Any]:
            model = copy.deepcopy(self.base)
            put_adapters(model, self.recipe(arm, seed, float(rate)), self.args.dir / name / "adapter")
            return self._scores(model, split)

        return self.once(f"{name}/{split}.json", make)

    def _scores(self, model: Any, split: str) -> dict[str, Any]:
        """NLL per answer token, macro, and of every task the NLL and the answer tokens of each example."""
        by_task = {
            task: [replace(example, choices=(), gold=None) for example in part]  # the right answer alone is scored
            for task, part in zip(self.tasks, self.examples[split], strict=True)
        }
        result = evaluate(model.eval(), self.tokenizer, by_task)
        scores: dict[str, dict[str, list[Any]]] = {task: {"nll": [], "tokens": []} for task in self.tasks}
        for record in result.per_example:
            scores[record["task"]]["nll"].append(record["nll"])
            scores[record["task"]]["tokens"].append(record["num_answer_tokens"])
        return {"nll_per_token": result.average.nll_per_token, "scores": scores}


if __name__ == "__main__":
    main()
