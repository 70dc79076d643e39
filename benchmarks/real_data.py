"""LoRA and DoRA on the combined commonsense data with SmolLM2-135M in NF4: answer NLL and accuracy before and after.

DATA holds <task>/<split>.parquet in the schema of `qdora guide own-data`. Arms and seeds run in processes of one thread
each, as many at once as there are cores. Nothing is chosen by a score: learning rate and length of the runs are fixed
beforehand, validation is shown, and test is scored once, after the last step.
"""

from __future__ import annotations

import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from byte_tokenizer import write_model
from frame import bench, main, markdown, table
from measure import OFFLINE, ONE_THREAD, alone
from tables.table import percent

from qdora.recipe.data_settings import COMMONSENSE_TASKS
from qdora.recipe.recipe_file import recipe_from
from qdora.run.evaluate import EvalOptions, evaluate_target
from qdora.run.run import train_run

KEPT = ("num_examples", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "chance", "majority", "nll", "nll_stderr")
KEPT += ("nll_per_token", "nll_per_token_stderr", "num_answer_tokens")


@bench(smoke={"steps": 2, "batch": 4, "limit": 4, "test_limit": 4})
def real_data(
    data: Path | None,
    *,
    runs: str = "runs/real_data",
    arms: str = "lora,dora",
    seeds: str = "0",
    steps: int = 200,
    batch: int = 16,
    lr: float = 5e-4,
    limit: int = 100,
    test_limit: int = 250,
) -> dict[str, Any]:
    """A run for each arm and seed; one that was interrupted resumes."""
    folder = Path(runs) if data else Path(tempfile.mkdtemp())
    source = "builtin" if data else write_model(folder / "model")
    mix = [{"task": task, "path": str(data.resolve() / task)} for task in COMMONSENSE_TASKS] if data else []
    document = {
        "model": {"source": source},
        "base": {"quant": "nf4"},
        "adapter": {"kind": "lora|dora", "rank": 16, "alpha": 32.0},
        "data": {"mix": mix or [{"task": "demo/facts"}], "strategy": "equal", "max_length": 512, "too_long": "drop"},
        "train": {"steps": steps, "batch": batch, "lr": lr, "schedule": "linear", "warmup": min(10, steps)},
        "eval": {"limit": limit},
        "memory": {"checkpointing": False},
    }
    document["train"] |= {"optimizer": "adamw", "checkpoint_every": 25}

    def run(job: tuple[str, str]) -> Any:
        return alone(run_arm, document, *job, str(folder), test_limit, variables=ONE_THREAD | OFFLINE)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = list(pool.map(run, [(kind, seed) for seed in seeds.split(",") for kind in arms.split(",")]))
    document["data"]["mix"] = [source | {"path": "DATA"} for source in mix]
    return {"num_training_examples": steps * batch, "settings": document, "arms": found}


def run_arm(document: dict[str, Any], kind: str, seed: str, folder: str, test_limit: int) -> dict[str, Any]:
    """Train one arm in this process, then score the test split once, base and adapter."""
    directory = Path(folder) / f"{kind}-seed{seed}"
    document["adapter"]["kind"] = kind
    for section in ("data", "train"):
        document[section]["seed"] = int(seed)
    started = time.perf_counter()
    summary = train_run(recipe_from(document), directory, resume=(directory / "recipe.yaml").exists())
    seconds = time.perf_counter() - started

    def short(evaluation: dict[str, Any]) -> dict[str, Any]:
        rows = {**evaluation["tasks"], "average": evaluation["average"]}
        return {task: {name: row[name] for name in KEPT} for task, row in rows.items()}

    def tested(*, base_only: bool) -> dict[str, Any]:
        options = EvalOptions(split="test", limit=test_limit, base_only=base_only)
        return short(evaluate_target(str(directory), options)["evaluation"])

    test = {"adapter": tested(base_only=False)}
    return {
        "kind": kind,
        "seed": int(seed),
        "train_seconds": seconds,
        "final_loss": summary["final_loss"],
        "num_trainable": summary["num_trainable"],
        "validation": {label: short(found) for label, found in summary["evaluations"].items()},
        "test": test | ({"base": tested(base_only=True)} if (kind, seed) == ("lora", "0") else {}),  # the same for all
    }


@table("real_data")
def real_data_table(result: Any) -> str:
    """Validation and test NLL and accuracy of both arms, mean over seeds."""
    arms = result["arms"]
    kinds = list(dict.fromkeys(arm["kind"] for arm in arms))
    test = next(arm["test"]["base"] for arm in arms if "base" in arm["test"])
    validation = arms[0]["validation"]["base"]
    names = ["val NLL base", *(f"val {kind}" for kind in kinds), "test NLL base", *(f"test {kind}" for kind in kinds)]
    names += ["test acc % base", *(f"acc {kind}" for kind in kinds), "chance"]
    rows = []
    for task, base in test.items():
        row = [task, f"{validation[task]['nll_per_token']:.3f}"]
        row += [_mean([arm["validation"]["adapter"][task] for arm in arms if arm["kind"] == kind]) for kind in kinds]
        row.append(f"{base['nll_per_token']:.3f}")
        own = [[arm["test"]["adapter"][task] for arm in arms if arm["kind"] == kind] for kind in kinds]
        row += [*map(_mean, own), percent(base["acc"], base["acc_stderr"]), *(_mean(each, "acc") for each in own)]
        rows.append([*row, percent(base["chance"])])
    seeds = sorted({arm["seed"] for arm in arms})
    note = (
        f"\n{result['num_training_examples']:,} training examples per run, seeds {', '.join(map(str, seeds))}; "
        "± is the standard error over examples for one seed, and over examples and seeds in the mean of several.\n"
    )
    return markdown(["task", *names], rows) + note


def _mean(rows: list[dict[str, Any]], name: str = "nll_per_token") -> str:
    """Mean over the seeds of an arm, with sqrt(examples' variance + variance between seeds / seeds)."""
    values = [row[name] for row in rows]
    mean = sum(values) / len(values)
    between = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1) / len(values)
    error = (sum(row[f"{name}_stderr"] ** 2 for row in rows) / len(rows) + between) ** 0.5
    return percent(mean, error) if name == "acc" else f"{mean:.3f} ± {error:.3f}"


if __name__ == "__main__":
    main()
