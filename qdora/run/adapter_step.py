"""Which step of a run adapter/ holds, in words too, and the evaluations that the run kept of it and of the base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qdora.errors import UserError
from qdora.evaluate.before_after import tasks_of_other_examples
from qdora.evaluate.suite import EvaluationResult
from qdora.files.run_directory import RunDirectory
from qdora.run.trained_layers import TRAINED_FILE

BEST_FILE = "best.json"
"""In adapter/ if a best step was chosen: which step, and by which metric."""


def adapter_record(run: RunDirectory) -> dict[str, Any] | None:
    """The content of adapter/best.json; None if adapter/ holds the last step.

    Raises:
        UserError: The file is damaged.
    """
    file = run.adapter / BEST_FILE
    try:
        found: dict[str, Any] = json.loads(file.read_bytes())
        return found | {"step": int(found["step"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: is damaged: {type(error).__name__}.") from None


def adapter_step(run: RunDirectory) -> int | None:
    """The step that adapter/ holds: the best one, or the last before it was written."""
    record = adapter_record(run)
    if record is not None:
        return int(record["step"])
    file = run.path / TRAINED_FILE
    try:  # the run may have gone on since
        return int(json.loads(file.read_bytes())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return run.last_step()


def state_step(run: RunDirectory, state: str) -> int | None:
    """The step of a state of a run: "base", "step-120", or "final" for adapter/."""
    if state == "base":
        return 0
    return adapter_step(run) if state == "final" else int(state.removeprefix("step-"))


def best_in_words(state: Mapping[str, Any]) -> str:
    """'step 6, the best by macro nll_per_token (1.234)', from the state of a `BestSoFar`."""
    question = state["question"]
    return f"step {state['step']}, the best by {question['best_by']} {question['best_metric']} ({state['value']:.4g})"


def adapter_in_words(run: RunDirectory) -> str:
    """Which step adapter/ holds: 'final' for the last one."""
    record = adapter_record(run)
    if record is None:
        return "final"
    stopped = ", stopped early" if record["num_done"] < record["num_steps"] else ""
    return f"{best_in_words(record)} of {record['num_done']} steps{stopped}"


def stored_results(run: RunDirectory, start: str, step: int | None = None) -> dict[str, EvaluationResult]:
    """The evaluations that a run kept: before step 1, and after `step` (None: the step of adapter/).

    The first one is called `start` (of the recipe: `adapter.start_label`), the other one "adapter".
    Only "adapter" if the two have different tasks or examples, since they cannot be compared.
    """
    step = adapter_step(run) if step is None else step
    found = {
        label: read_result(run.evaluation_file(number))
        for label, number in ((start, 0), ("adapter", step or None))
        if number is not None and run.evaluation_file(number).is_file()
    }
    if len(found) == 2:
        sizes = [{task: result.num_examples for task, result in each.tasks.items()} for each in found.values()]
        documents = (each.to_dict(per_example=True) for each in found.values())
        if sizes[0] != sizes[1] or tasks_of_other_examples(*documents):
            del found[start]
    return found


def read_result(file: Path) -> EvaluationResult:
    """Read an evaluation that a run wrote."""
    return EvaluationResult.from_dict(json.loads(file.read_text(encoding="utf-8")))
