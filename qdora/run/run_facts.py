"""What is known of a run, from the files of its directory alone: the facts of its page, as JSON values."""

from __future__ import annotations

import re
import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from qdora.data.shown_examples import EXAMPLES_FILE
from qdora.errors import named
from qdora.evaluation.before_after import LossOrAccuracy, task_changes, tasks_of_other_examples
from qdora.files.json_file import read_json_object
from qdora.files.run_directory import FAILURE_MARK, PLAN_FILE, WARNING_MARK, RunDirectory, is_without_chats
from qdora.model.peft_config import sizes_in_words
from qdora.plan.plan_contents import CONSTANTS
from qdora.recipe.recipe_file import load_recipe
from qdora.recipe.settings import Recipe
from qdora.run.adapter_step import adapter_record
from qdora.run.start_checks import CHECKS_FILE
from qdora.run.trained_layers import TRAINED_FILE

_Value = TypeVar("_Value")
_LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ")
_FAILED = re.compile(rf"{FAILURE_MARK} (\w+): ")
_METRICS: tuple[LossOrAccuracy, ...] = ("nll_per_token", "acc")
_GUESSES = ("chance", "majority", "num_unparsable")

Facts = dict[str, Any]
Lines = Sequence[Mapping[str, Any]]


def run_facts(run: RunDirectory) -> Facts:
    """All facts of a run, finished or not. What its files do not say is None or empty.

    A file that is missing is no fault; one that cannot be read is a warning among the facts.

    Raises:
        UserError: recipe.yaml cannot be read.
    """
    recipe = load_recipe(run.recipe_file)
    reader = _Reader(run)
    metrics = run.metrics()
    steps = [line for line in metrics if "loss" in line]
    mix, texts = reader.json("mix.json"), _log_texts(run)
    status = _status(run, recipe, reader, mix, metrics)
    evaluations = _evaluations(reader, status["adapter_step"], [line["step"] for line in metrics if "eval" in line])
    return {
        "run": str(run.path),
        "name": run.path.resolve().name,
        "status": status | {"failure": _failure(texts)},
        "settings": _settings(recipe, reader.json("environment.json"), run.adapter),
        "data": mix,
        "examples": reader.json(EXAMPLES_FILE).get("examples", []),
        "evaluations": evaluations,
        "training_loss": _training_loss(steps),
        "memory": _memory(reader, metrics),
        "speed": _speed(steps),
        "time": _time(metrics, steps),
        "layers": reader.json(TRAINED_FILE).get("layers", []),
        "next": next_commands(run, recipe, status, bool(evaluations)),
        "checks": [each for group in reader.json(CHECKS_FILE).values() for each in group],
        "warnings": [*_warnings(texts), *dict.fromkeys(reader.faults)],
    }


class _Reader:
    """Reads files of a run and keeps what is wrong with them."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.faults: list[str] = []

    def tried(self, name: str, read: Callable[[], _Value]) -> _Value | None:
        """What `read` returns; None, and a fault of the file `name`, if it does not have what a run writes."""
        try:
            return read()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self.faults.append(f"{name} is damaged: {named(error)}")
            return None

    def json(self, name: str) -> Facts:
        """The JSON object in a file; empty if the file is missing or damaged."""
        if not (self.run.path / name).is_file():
            return {}
        return self.tried(name, lambda: read_json_object(self.run.path / name)) or {}

    def names(self, folder: str, pattern: str) -> list[str]:
        """The files of a folder, by name."""
        return sorted(f"{folder}/{file.name}" for file in (self.run.path / folder).glob(pattern))


def _status(run: RunDirectory, recipe: Recipe, reader: _Reader, mix: Facts, metrics: Lines) -> Facts:
    """`state`: finished, stopped early, unfinished or not trained; and the steps done, planned and kept."""
    kept = run.checkpoint_steps()
    done = [line["step"] for line in metrics if "out_of_memory" not in line]  # that step was tried, not done
    num_done, num_steps = max([0, *done, *kept]), mix.get("num_steps")
    trained = reader.json(TRAINED_FILE).get("step", num_done)  # written with adapter/; the run may have gone on
    best = reader.tried("adapter/best.json", lambda: adapter_record(run))
    state = "unfinished"
    if recipe.adapter.kind == "none":
        state = "not trained"
    elif run.adapter.is_dir() and best is not None and num_done <= best["num_done"] < best["num_steps"]:
        state = "stopped early"
    elif run.adapter.is_dir() and num_steps is not None and min(num_done, trained) >= num_steps:
        state = "finished"
    return {
        "state": state,
        "num_done": num_done,
        "num_steps": num_steps,
        "adapter_step": None if not run.adapter.is_dir() else trained if best is None else best["step"],
        "adapter_is_best": best is not None,
        "newest_checkpoint": max(kept, default=None),
    }


def _settings(recipe: Recipe, environment: Facts, written: Path) -> dict[str, Any]:
    """The settings that a reader looks for first; `written` is the folder of the adapter that the run wrote."""
    adapter, base, train = recipe.adapter, recipe.base, recipe.train
    devices, has_rank = [each["name"] for each in environment.get("devices", [])], adapter.kind in ("lora", "dora")
    rank, alpha = sizes_in_words(written, adapter.rank, adapter.alpha)
    return {
        "base": recipe.model.source,
        "quantisation": base.quant_in_words,
        "trained part": environment.get("trained_part"),
        "adapter": adapter.kind,
        "starts from": adapter.start_in_words,
        "rank": rank if has_rank else None,
        "alpha": alpha if has_rank else None,
        "also trained": f"{', '.join(adapter.also_train)}, {adapter.also_train_rows} rows"
        if adapter.also_train
        else None,
        "new tokens": " ".join(recipe.model.add_tokens) or None,
        "optimizer": train.optimizer,
        "learning rate": train.lr,
        "loss on": recipe.data.loss_on,
        "max length": recipe.data.max_length,
        "machine": ", ".join(devices) or environment.get("cpu"),
        "qdora": environment.get("qdora"),
    }


def _evaluations(reader: _Reader, adapter_step: int | None, steps: Sequence[int]) -> list[Facts]:
    """Every evaluation of the trained state beside that of the base on the same data, with the change by task.

    First those of the run itself after `steps` (eval/step-N.json: of the step of adapter/, else of the last one), then
    those of `qdora eval` (eval/final-NAME.json and eval/base-NAME.json). Answers in words are evaluations of their own.
    """
    last = max(steps, default=0)
    after = adapter_step if adapter_step in steps else last or None
    found = []
    for end in ("", "-generated"):
        trained = None if after is None else f"eval/step-{after}{end}.json"
        found.append(_compared(reader, f"validation{end}", f"eval/step-0{end}.json", trained, after))
    for name in reader.names("eval", "final-*.json"):
        what = name.removeprefix("eval/final-").removesuffix(".json")
        found.append(_compared(reader, what, f"eval/base-{what}.json", name, reader.json(name).get("step")))
    return [each for each in found if each is not None]


def _compared(reader: _Reader, data: str, before: str, after: str | None, step: int | None) -> Facts | None:
    """The changes from the evaluation in file `before` to that in `after`; None if neither holds tasks."""
    old, new = ({} if name is None else _with_answers(reader.json(name)) for name in (before, after))
    if not (old or new):
        return None

    def compare() -> Facts | None:
        changes: Facts = {metric: list(map(asdict, task_changes(old, new, metric))) for metric in _METRICS}
        others = tasks_of_other_examples(old, new)
        if not any(changes.values()):  # of another program, such as lm-evaluation-harness
            return None
        tasks = (new or old)["tasks"]
        guesses = {task: {name: numbers.get(name) for name in _GUESSES} for task, numbers in tasks.items()}
        return {"data": data, "step": step if new else 0, **changes, "guesses": guesses, "other_examples": others}

    return reader.tried(after or before, compare)


def _with_answers(document: Facts) -> Facts:
    """An evaluation in which each generated answer has its `acc`, 1 for a right one; empty if it has no tasks."""
    if "tasks" not in document:
        return {}
    records = [
        record | {"acc": float(record["outcome"] == "right")} if "outcome" in record else record
        for record in document.get("per_example", [])
    ]
    return document | {"per_example": records}


def _training_loss(steps: Lines) -> list[Facts]:
    """Each task's mean training loss, nats per labelled token, over the first and last tenth of the logged steps."""
    tenth = max(1, len(steps) // 10)
    ends = steps[:tenth], steps[-tenth:]

    def mean(part: Lines, task: str) -> float | None:
        numbers = [line["tasks"][task] for line in part if task in line["tasks"]]
        count = sum(each["num_tokens"] for each in numbers)
        return sum(each["nll_sum"] for each in numbers) / count if count else None

    tasks = dict.fromkeys(task for line in steps for task in line["tasks"])
    return [{"task": task, "first": mean(ends[0], task), "last": mean(ends[1], task)} for task in tasks]


def _memory(reader: _Reader, metrics: Lines) -> Facts:
    """Bytes by component: planned at the planned peak, and held from step to step; and both peaks."""
    plan = reader.json(PLAN_FILE)
    peaks = [line["time"]["peak_memory_bytes"] for line in metrics if "peak_memory_bytes" in line.get("time", {})]
    on_gpu = bool(reader.json("environment.json").get("devices"))
    outside = CONSTANTS if on_gpu else ()
    return {
        "device": "cuda" if on_gpu else "cpu",
        "planned": {name: size for name, size in plan.get("components", {}).items() if name not in outside},
        "planned_peak": plan.get("tensor_bytes" if on_gpu else "peak_bytes"),
        "planned_in": plan.get("peak_in"),
        "held": reader.json(TRAINED_FILE).get("memory", {}),
        "measured_peak": max(peaks, default=None),
    }


def _speed(steps: Lines) -> Facts:
    """Medians over the logged steps; None without any."""
    seconds = [line["time"]["step_seconds"] for line in steps]
    rates = [line["num_tokens"] / line["time"]["step_seconds"] for line in steps]
    return {
        "num_logged_steps": len(steps),
        "step_seconds": statistics.median(seconds) if seconds else None,
        "tokens_per_second": statistics.median(rates) if rates else None,
        "num_tokens": sum(line["num_tokens"] for line in steps),
        "num_label_tokens": sum(line["num_label_tokens"] for line in steps),
    }


def _time(metrics: Lines, steps: Lines) -> dict[str, float]:
    """Seconds of each kind of work that was timed; without those that the run did not do."""
    others = {
        "evaluations": "evaluation_seconds",
        "generated answers": "generation_seconds",
        "interference": "interference_seconds",
    }
    seconds = [line["time"]["step_seconds"] for line in steps]
    num_done = steps[-1]["step"] if steps else 0
    if len(seconds) == num_done:
        found = {"training steps": sum(seconds)}
    else:
        found = {"training steps, estimated from those logged": sum(seconds) * num_done / max(len(seconds), 1)}
    for what, name in others.items():
        found[what] = sum(line.get("time", {}).get(name, 0.0) for line in metrics)
    return {what: seconds for what, seconds in found.items() if seconds}


def _log_texts(run: RunDirectory) -> list[str]:
    """The lines of log.txt without their times; those of tracebacks, which have none, are left out."""
    lines: list[str] = []
    with suppress(OSError):
        lines = run.log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line[match.end() :] for line in lines if (match := _LINE.match(line))]


def _failure(texts: Sequence[str]) -> str | None:
    """The error that ended the last start; None if training has logged more. Other verbs log nothing but failures."""
    for text in reversed(texts):
        failed = _FAILED.match(text)
        if failed is None:
            return None
        if failed[1] == "train":
            return text[failed.end() :]
    return None


def _warnings(texts: Sequence[str]) -> list[str]:
    """The warnings of log.txt, each once, in their order."""
    counts = Counter(text.removeprefix(f"{WARNING_MARK} ") for text in texts if text.startswith(f"{WARNING_MARK} "))
    return [text if number == 1 else f"{text} ({number} times)" for text, number in counts.items()]


def next_commands(
    run: RunDirectory, recipe: Recipe, status: Mapping[str, Any], is_evaluated: bool
) -> list[dict[str, str]]:
    """`command` and `why` of what can be done with the run now."""
    path = shlex.quote(str(run.path))
    resumed = f"qdora train {shlex.quote(str(run.recipe_file))} --run-dir {path} --resume"
    if status["state"] == "unfinished":
        step = status["newest_checkpoint"]
        if step is None:
            found = [(resumed, "Start the run again: it has saved no checkpoint")]
        else:
            found = [(resumed, "Continue the run from its newest checkpoint")]
            found.append((f"qdora eval {path} --step {step}", "Evaluate the newest checkpoint"))
        return [{"command": command, "why": why} for command, why in found]
    found = [] if is_evaluated else [(f"qdora eval {path} --base", "Evaluate the base, to compare with")]
    if status["state"] != "not trained":
        out = shlex.quote(f"{run.path}-merged")
        epochs, steps = recipe.train.epochs, status["num_steps"] or status["num_done"]
        raw = " --raw" if is_without_chats(run.path) else ""
        audit = " --audit" if recipe.adapter.kind in ("lora", "dora") else ""
        more = f"train.steps={2 * steps}" if epochs is None else f"train.epochs={2 * epochs:g}"
        found += [
            (f"qdora eval {path}", "Evaluate the adapter"),
            (f"qdora generate {path}{raw} --prompt '...'", "Let it answer"),
            (
                f"qdora export {path} {out}{audit}",
                f"Write the merged model and check it{' and compare all forms' if audit else ''}",
            ),
        ]
        if status["state"] == "finished":
            found.append((f"{resumed} -s {more}", "Train on, to twice the length"))
        elif status["state"] == "stopped early":
            found.append((f"{resumed} -s eval.patience=null", f"Train on to step {steps:,}, without stopping early"))
    return [{"command": command, "why": why} for command, why in found]
