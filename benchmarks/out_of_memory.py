"""A run whose allocator fails goes on with smaller micro-batches: does it train the same?

    python benchmarks/out_of_memory.py DATA [--out benchmarks/results/out_of_memory.json] [--smoke]

DATA holds <task>/<split>.parquet. QDoRA on SmolLM2-135M in NF4 without dropout, the eight tasks in equal shares. Each
run is done twice: with memory enough, and with an allocator that fails in the backward pass of each micro-batch of more
tokens than `--room`. The losses of the same steps are compared: in float32 they differ by the order of sums, in bf16 by
its rounding.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from byte_tokenizer import write_model
from measure import facts, parsed, parser_of, write
from rich.console import Console
from torch import Tensor

from qdora.files.run_directory import RunDirectory
from qdora.recipe.data_settings import COMMONSENSE_TASKS
from qdora.recipe.recipe_file import recipe_from
from qdora.recipe.settings import Recipe
from qdora.run.train import train_run
from qdora.train import passes


def main() -> None:
    """Both dtypes."""
    parser = parser_of(__doc__, "out_of_memory", smoke="a random model and two steps", data=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--room", type=int, default=300, help="most tokens of a micro-batch for which there is memory")
    args = parsed(parser)
    if args.smoke:
        args.steps, args.batch, args.room = 2, 8, 400
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = write_model(root / "model") if args.smoke else "builtin"
        runs = {dtype: compared(root, recipe(args, model, dtype), args.room) for dtype in ("float32", "bfloat16")}
    command = f"python benchmarks/out_of_memory.py DATA --steps {args.steps} --batch {args.batch} --room {args.room}"
    write(args.out, facts(command) | {"num_steps": args.steps, "room_tokens": args.room, "runs": runs})


def recipe(args: argparse.Namespace, model: str, dtype: str) -> Recipe:
    """The run."""
    if args.smoke:
        mix: list[dict[str, Any]] = [{"task": "demo/facts"}, {"task": "demo/odd"}]
    else:
        mix = [{"task": task, "path": str(args.data.resolve() / task), "limit": 200} for task in COMMONSENSE_TASKS]
    return recipe_from(
        {
            "model": {"source": model, "dtype": dtype},
            "adapter": {"kind": "dora", "rank": 16, "alpha": 32.0},
            "data": {"mix": mix, "strategy": "equal", "max_length": 256, "too_long": "drop"},
            "train": {"steps": args.steps, "batch": args.batch, "lr": 1e-3, "optimizer": "adamw"},
            "eval": {"at_start": False, "at_end": False},
            "memory": {"checkpointing": False},
        }
    )


def compared(root: Path, settings: Recipe, room: int) -> dict[str, Any]:
    """The same run with and without memory enough."""
    dtype = settings.model.dtype
    whole, short = root / f"{dtype}-whole", root / f"{dtype}-short"
    train_run(settings, whole, console=Console(quiet=True))
    with little_memory(room):
        train_run(settings, short, console=Console(quiet=True))
    steps = {run: [line for line in RunDirectory(run).metrics() if "loss" in line] for run in (whole, short)}
    losses = [[line["loss"] for line in lines] for lines in steps.values()]
    tokens = [[line["num_tokens"] for line in lines] for lines in steps.values()]
    return {
        "losses": losses[0],
        "losses_with_little_memory": losses[1],
        "largest_relative_difference": max(abs(one - other) / one for one, other in zip(*losses, strict=True)),
        "same_tokens": tokens[0] == tokens[1],
        "backoffs": [line["out_of_memory"] for line in RunDirectory(short).metrics() if "out_of_memory" in line],
    }


@contextmanager
def little_memory(room: int) -> Iterator[None]:
    """While active, the backward pass of a micro-batch of more than `room` tokens fails as CUDA's allocator does."""
    real = passes.batch_loss

    def fail(_gradient: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def hungry(model: Any, input_ids: Tensor, *rest: Any, **options: Any) -> Any:
        result = real(model, input_ids, *rest, **options)
        if input_ids.numel() > room:
            result.nll_sum.register_hook(fail)
        return result

    with mock.patch.object(passes, "batch_loss", hungry):
        yield


if __name__ == "__main__":
    main()
