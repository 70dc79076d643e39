"""Time to the first step of a run, what a step loses to its loader, and what packed rows gain."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from byte_tokenizer import write_model, write_sums
from frame import Column, bench, main, markdown, quartiles, table, tabulated
from measure import alone, in_turns, ratios, spread
from mixed_data import FixedSteps, fitted
from rich.console import Console

from qdora.data.build_data import make_loader, read_data, tokenized_mix
from qdora.data.loader import Step, StepLoader
from qdora.memory.allocator import keep_freed_memory
from qdora.model.build_model import choose_compute, find_model, put_adapters
from qdora.model.inject import adapter_parameters
from qdora.recipe.data_settings import COMMONSENSE_TASKS
from qdora.recipe.recipe_file import recipe_from
from qdora.recipe.settings import Recipe
from qdora.recipe.train_settings import TrainConfig
from qdora.run.base import load_base
from qdora.train.checks import packed_layout
from qdora.train.optimizer import AdapterOptimizer

WAYS = {"grouped": "in memory, grouped by length", "packed": "in memory, packed", "streamed": "streamed"}
STEP_TOKENS, ROW_TOKENS, BAR = 4096, 512, 0.02


@bench(smoke={"steps": 3, "limit": 20})
def data_loading(data: Path | None, steps: int = 12, limit: int = 400) -> dict[str, Any]:
    """Time to the first step of a run, and the share of a step's time in which the model waits for its data.

    QDoRA of rank 16 on SmolLM2-135M in NF4, the eight commonsense tasks in equal shares, steps of 4,096 tokens. DATA
    holds <task>/<split>.parquet; --limit: training examples of a task that is not streamed. Each way to load is a
    process of its own that does what `qdora train` does, in its order:

        grouped    examples in memory, padded and grouped by length
        packed     examples in memory, packed
        streamed   rows are read, tokenised and shuffled while the run goes on; padded and grouped by length

    The parts of the time to the first step follow each other, imports from the start of the process. In the steps after
    it, all that the loop asks of its loader is timed (the next step's micro-batches, and the state in case the step
    fails), against the whole step. Nothing is loaded ahead, so what the loader takes is lost. The bar: 2 % of a step.
    """
    with place_of(data) as place:
        ways = {way: alone(one_way, way, place, steps, limit, data is None) for way in WAYS}
    limits = {way: each["share_lost"]["median"] < BAR for way, each in ways.items()}
    sizes = {"step_tokens": STEP_TOKENS, "num_steps": steps, "limit": limit}
    return {**sizes, "ways": ways, "bar": BAR, "passes": limits}


@contextmanager
def place_of(data: Path | None) -> Iterator[str]:
    """The folder of the data, or a temporary one with a small model and sums."""
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            write_model(Path(folder, "model"))
            for name in ("first", "second"):
                write_sums(Path(folder, f"{name}.jsonl"))
        yield folder if data is None else str(data.resolve())


def recipe_of(way: str, data: str, num_steps: int, limit: int, smoke: bool) -> Recipe:
    """The run of a way."""
    if smoke:
        sources = [{"source": f"{data}/{name}.jsonl"} for name in ("first", "second")]
    elif way == "streamed":
        sources = [{"source": f"{data}/{task}"} for task in COMMONSENSE_TASKS]
    else:
        sources = [{"task": task, "path": f"{data}/{task}"} for task in COMMONSENSE_TASKS]
    more = {"stream": True} if way == "streamed" else {"limit": limit}
    mix = {"mix": [source | more for source in sources], "strategy": "equal", "packing": way == "packed"}
    tokens = 128 if smoke else STEP_TOKENS
    return recipe_from(
        {
            "model": {"source": f"{data}/model" if smoke else "builtin"},
            "data": {**mix, "max_length": ROW_TOKENS, "too_long": "drop"},
            "train": {"steps": num_steps, "tokens_per_step": tokens, "optimizer": "adamw"},
        }
    )


def one_way(way: str, data: str, num_steps: int, limit: int, smoke: bool) -> dict[str, Any]:
    """Seconds of each part until the first step is done, and of the loader and the whole in the steps after it."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    since_start = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    parts = {"imports": since_start}  # by the kernel's clock, in steps of a clock tick

    @contextmanager
    def part(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        parts[name] = time.perf_counter() - began

    recipe = recipe_of(way, data, num_steps, limit, smoke)
    keep_freed_memory()
    with part("tokenizer"):
        source, tokenizer = find_model(recipe)
    with part("data"):
        train, _ = read_data(recipe.data)
    with part("tokenise"):
        mix = tokenized_mix(recipe, tokenizer, train)
        loader = make_loader(recipe, mix, tokenizer)
        _ = loader.fingerprint
    with part("load base"):
        model = load_base(recipe, source, choose_compute("auto"))
    with part("adapters"):
        put_adapters(model, recipe)
        optimizer = AdapterOptimizer(adapter_parameters(model))
        if recipe.data.packing:
            loader.batching.packed = packed_layout(model)[0]
    timed = TimedLoader(loader)
    settings = TrainConfig(steps=num_steps, batch=1, lr=1e-4, schedule="constant", warmup=0)
    first, *later = fitted(model, optimizer, timed, settings)
    parts["first step"] = first["time"]["step_seconds"]
    steps, waits = [line["time"]["step_seconds"] for line in later], timed.seconds[1:num_steps]
    return {
        "num_examples": None if loader.streams else sum(map(len, train)),
        "seconds_to_first_step": parts,
        "total_seconds_to_first_step": sum(parts.values()),
        "step_seconds": steps,
        "loader_seconds": waits,
        "share_lost": spread([wait / step for wait, step in zip(waits, steps, strict=True)]),
        "share_of_all": sum(waits) / sum(steps),
        "examples_per_step": statistics.mean(line["num_examples"] for line in later),
    }


class TimedLoader:
    """A loader for the loop that keeps the seconds spent in it: of each step, with the state since the one before."""

    def __init__(self, loader: StepLoader) -> None:
        self.loader, self.batching = loader, loader.batching  # memory is never short here, so nothing changes it
        self.seconds: list[float] = []
        self._of_states = 0.0

    def next_step(self) -> Step:
        """The next step's micro-batches."""
        began = time.perf_counter()
        step = self.loader.next_step()
        self.seconds.append(self._of_states + time.perf_counter() - began)
        self._of_states = 0.0
        return step

    def state_dict(self) -> dict[str, Any]:
        """The state, in case the step fails."""
        began = time.perf_counter()
        state = self.loader.state_dict()
        self._of_states += time.perf_counter() - began
        return state


@table("data_loading")
def data_loading_table(result: Any) -> str:
    """Time to the first step by its parts, and what of a step is lost to loading."""
    parts = list(result["ways"]["grouped"]["seconds_to_first_step"])
    rows = []
    for way, found in result["ways"].items():
        seconds = [*found["seconds_to_first_step"].values(), found["total_seconds_to_first_step"]]
        lost = quartiles(found["share_lost"], ".3%", ".3%")
        rows.append([WAYS[way], *(f"{each:.1f}" for each in seconds), lost])
    header = ["examples", *(f"{part}, s" for part in parts), "to the end of the first step, s"]
    note = f"\nSteps of {result['step_tokens']:,} tokens; median and quartiles of {result['num_steps'] - 1} steps.\n"
    return markdown([*header, "share of a step lost to loading"], rows) + note


TITLES = {
    "arrival": "padded, in order of arrival",  # of results of an earlier version
    "grouped": "padded, grouped by length",
    "packed": "packed",
    "packed_to_max_length": f"packed, rows always {ROW_TOKENS} long",  # of results of an earlier version
}


@bench(smoke={"rounds": 2})
def packing(data: Path | None, rounds: int = 12) -> dict[str, Any]:
    """Packed rows against padded ones: the time of training steps on the same examples. Tests compare the losses.

    As `data_loading`, in turns. DATA holds <task>/<split>.parquet; OMP_NUM_THREADS=2.
    """
    keep_freed_memory()
    steps: dict[str, list[Step]] = {}
    with place_of(data) as place:
        for way in ("grouped", "packed"):
            recipe = recipe_of(way, place, 1, 400, data is None)
            source, tokenizer = find_model(recipe)
            loader = make_loader(recipe, tokenized_mix(recipe, tokenizer, read_data(recipe.data)[0]), tokenizer)
            loader.batching.packed = "rows" if way == "packed" else None
            steps[way] = [loader.next_step() for _ in range(rounds)]
        model = load_base(recipe, source, choose_compute("auto"))
    put_adapters(model, recipe)
    assert packed_layout(model)[0] == "rows"
    optimizer = AdapterOptimizer(adapter_parameters(model))
    settings, quiet = TrainConfig(steps=1, batch=1, lr=1e-4, schedule="constant", warmup=0), Console(quiet=True)
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    for number in range(rounds):
        loaders = {way: FixedSteps([found[number]]) for way, found in steps.items()}
        turns = {way: partial(fitted, model, optimizer, each, settings, console=quiet) for way, each in loaders.items()}
        for way, found in in_turns(turns, 1, warmup=int(number == 0), start=number).items():
            seconds[way] += found
    tokens = [step.num_tokens for step in steps["packed"]]
    assert tokens == [step.num_tokens for step in steps["grouped"]]
    batches = {way: [batch for step in found for batch in step.micro_batches] for way, found in steps.items()}
    speeds = {way: [n / s for n, s in zip(tokens, found, strict=True)] for way, found in seconds.items()}
    time = {
        "num_steps": rounds,
        "seconds": seconds,
        "tokens": tokens,
        "micro_batches_per_step": {way: len(found) / rounds for way, found in batches.items()},
        "padding_share": {
            way: 1 - sum(tokens) / sum(batch.input_ids.numel() for batch in found) for way, found in batches.items()
        },
        "tokens_per_second": {way: spread(found) for way, found in speeds.items()},
        "ratios": ratios(seconds, ["grouped / packed"]),
    }
    return {"step_tokens": STEP_TOKENS, "max_length": ROW_TOKENS, "time": time}


@table("packing")
def packing_table(result: Any) -> str:
    """Padding, real tokens a second and time of each way to make micro-batches."""
    found = result["time"]
    columns: dict[str, Column] = {
        "micro-batches": lambda way: TITLES[way],
        "padding %": lambda way: f"{100 * found['padding_share'][way]:.1f}",
        "micro-batches a step": lambda way: f"{found['micro_batches_per_step'][way]:.1f}",
        "real tokens/s": lambda way: quartiles(found["tokens_per_second"][way], ".0f", ".0f"),
        "time, packed = 1": lambda way: (
            "1" if way == "packed" else quartiles(found["ratios"][f"{way} / packed"], ".2f")
        ),
    }
    note = f"\n{found['num_steps']} steps of {result['step_tokens']:,} tokens in turns, median and quartiles.\n"
    return tabulated(found["padding_share"], columns) + note


if __name__ == "__main__":
    main()
