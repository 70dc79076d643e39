"""Time to the first step of a run, and the share of a step's time in which the model waits for its data.

    python benchmarks/data_loading.py DATA [--steps 12] [--limit 400] [--smoke]

QDoRA of rank 16 on SmolLM2-135M in NF4, the eight commonsense tasks in equal shares, steps of 4,096 tokens. DATA holds
<task>/<split>.parquet. Each way to load is a process of its own that does what `qdora train` does, in its order:

    grouped    examples in memory, padded and grouped by length
    packed     examples in memory, packed
    streamed   rows are read, tokenised and shuffled while the run goes on; padded and grouped by length

The parts of the time to the first step follow each other, imports from the start of the process. In the steps after it,
all that the loop asks of its loader is timed (the next step's micro-batches, and the state in case the step fails),
against the whole step. Nothing is loaded ahead, so what the loader takes is lost. The bar: 2 % of a step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import write_model, write_sums
from measure import facts, fresh, parsed, parser_of, spread, write

from qdora.data.build_data import make_loader, read_data, tokenized_mix
from qdora.data.loader import Step, StepLoader
from qdora.memory.allocator import keep_freed_memory
from qdora.model.build_model import choose_compute, find_model, put_adapters
from qdora.model.inject import adapter_parameters
from qdora.recipe.data_settings import COMMONSENSE_TASKS
from qdora.recipe.recipe_file import recipe_from
from qdora.recipe.settings import Recipe
from qdora.recipe.train_settings import TrainConfig
from qdora.run.load_base import load_base
from qdora.train.hooks import Hooks
from qdora.train.interrupt import StopRequest
from qdora.train.loop import fit
from qdora.train.optimizer import AdapterOptimizer
from qdora.train.packed_attention import packed_layout
from qdora.train.progress import TrainingProgress

WAYS = ("grouped", "packed", "streamed")
STEP_TOKENS, BAR = 4096, 0.02


def main() -> None:
    """All ways, or one of them."""
    parser = parser_of(__doc__, "data_loading", smoke="a random model and data of its own", data=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--limit", type=int, default=400, help="training examples of each task that is not streamed")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parsed(parser)
    if args.way is not None:
        print(json.dumps(one_way(recipe(args), args.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.smoke:
            args.data, args.steps, args.limit = Path(folder), 3, 20
            write_model(args.data / "model")
            for name in ("first", "second"):
                write_sums(args.data / f"{name}.jsonl")
        options = [str(args.data.resolve()), "--steps", str(args.steps), "--limit", str(args.limit)]
        options += ["--smoke"] if args.smoke else []
        ways = {way: fresh(__file__, *options, "--way", way) for way in WAYS}
    result = facts("python benchmarks/data_loading.py DATA") | {
        "step_tokens": STEP_TOKENS,
        "num_steps": args.steps,
        "limit": args.limit,
        "ways": ways,
        "bar": BAR,
        "passes": {way: each["share_lost"]["median"] < BAR for way, each in ways.items()},
    }
    write(args.out, result)


def recipe(args: argparse.Namespace) -> Recipe:
    """The run of one way."""
    streamed = args.way == "streamed"
    if args.smoke:
        sources = [{"source": str(args.data / f"{name}.jsonl")} for name in ("first", "second")]
    elif streamed:
        sources = [{"source": str(args.data / task)} for task in COMMONSENSE_TASKS]
    else:
        sources = [{"task": task, "path": str(args.data / task)} for task in COMMONSENSE_TASKS]
    more = {"stream": True} if streamed else {"limit": args.limit}
    data = {"mix": [source | more for source in sources], "strategy": "equal", "max_length": 512, "too_long": "drop"}
    return recipe_from(
        {
            "model": {"source": str(args.data / "model") if args.smoke else "builtin"},
            "data": data | {"packing": args.way == "packed"},
            "train": {"steps": args.steps, "tokens_per_step": 128 if args.smoke else STEP_TOKENS, "optimizer": "adamw"},
        }
    )


def one_way(settings: Recipe, num_steps: int) -> dict[str, Any]:
    """Seconds of each part until the first step is done, and of the loader and the whole in the steps after it."""
    parts = {"imports": seconds_since_start()}

    @contextmanager
    def part(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        parts[name] = time.perf_counter() - began

    keep_freed_memory()
    with part("tokenizer"):
        source, tokenizer = find_model(settings)
    with part("data"):
        train, _ = read_data(settings.data)
    with part("tokenise"):
        mix = tokenized_mix(settings, tokenizer, train)
        loader = make_loader(settings, mix, tokenizer)
        _ = loader.fingerprint
    with part("load base"):
        model = load_base(settings, source, choose_compute("auto"))
    with part("adapters"):
        put_adapters(model, settings)
        optimizer = AdapterOptimizer(adapter_parameters(model))
        if settings.data.packing:
            loader.batching.packed = packed_layout(model)[0]
    timed = TimedLoader(loader)
    lines: list[dict[str, Any]] = []
    with TrainingProgress(num_steps) as progress:
        fit(
            model,
            optimizer,
            timed,  # type: ignore[arg-type]
            TrainConfig(steps=num_steps, batch=1, lr=1e-4, schedule="constant", warmup=0),
            Hooks(
                write_metrics=lambda line: lines.append(line | {"loader": timed.taken()}),
                save=lambda _step: Path(),
                keep_batch=lambda _bad: Path(),
            ),
            num_steps=num_steps,
            device=torch.device("cpu"),
            progress=progress,
            stop=StopRequest(),
        )
    parts["first step"] = lines[0]["time"]["step_seconds"]
    steps = [line["time"]["step_seconds"] for line in lines[1:]]
    waits = [line["loader"] for line in lines[1:]]
    return {
        "num_examples": None if loader.streams else sum(map(len, train)),
        "seconds_to_first_step": parts,
        "total_seconds_to_first_step": sum(parts.values()),
        "step_seconds": steps,
        "loader_seconds": waits,
        "share_lost": spread([wait / step for wait, step in zip(waits, steps, strict=True)]),
        "share_of_all": sum(waits) / sum(steps),
        "examples_per_step": statistics.mean(line["num_examples"] for line in lines[1:]),
    }


def seconds_since_start() -> float:
    """Of this process, by the kernel's clock; in steps of a clock tick."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


class TimedLoader:
    """A loader for the loop that counts the seconds spent in it."""

    def __init__(self, loader: StepLoader) -> None:
        self.loader, self.seconds = loader, 0.0
        self.batching = loader.batching  # memory is never short here, so nothing changes it

    def next_step(self) -> Step:
        """The next step's micro-batches."""
        began = time.perf_counter()
        step = self.loader.next_step()
        self.seconds += time.perf_counter() - began
        return step

    def state_dict(self) -> dict[str, Any]:
        """The state, in case the step fails."""
        began = time.perf_counter()
        state = self.loader.state_dict()
        self.seconds += time.perf_counter() - began
        return state

    def taken(self) -> float:
        """Seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


if __name__ == "__main__":
    main()
