"""Tasks of lm-evaluation-harness (extra `lm-eval`) on a model in memory: with its adapter, or merged, or bare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.errors import UserError, nearest

INSTALL = "lm-evaluation-harness is not installed. Fix: pip install 'qdora[lm-eval]'"


@dataclass(frozen=True)
class HarnessTasks:
    """Names of tasks, groups and tags that exist, and the lm_eval.tasks.TaskManager that knows them."""

    names: tuple[str, ...]
    manager: Any


def find_harness_tasks(asked: Sequence[str], include: Path | None = None) -> HarnessTasks:
    """Look tasks up without loading data or a model.

    Where `include` has all of them, the thousands that ship with the harness are not read, which would take seconds.
    Task files may name Python functions, which then run: include only files that you trust.

    Args:
        asked: Names or patterns (`mmlu_*`) of tasks, groups or tags.
        include: Folder of further tasks in YAML.
    Raises: UserError: The harness is not installed, `include` is no folder, or nothing bears a name.
    """
    if find_spec("lm_eval") is None:
        raise UserError(f"--harness: {INSTALL}")
    if include is not None and not include.is_dir():
        raise UserError(f"--harness-include: {include} must be a folder of task files (*.yaml).")
    from lm_eval.tasks import TaskManager

    path = None if include is None else str(include)
    manager = TaskManager(include_path=path, include_defaults=include is None)
    found = {name: sorted(manager.match_tasks([name])) for name in asked}
    if include is not None and not all(found.values()):
        manager = TaskManager(include_path=path)
        found = {name: sorted(manager.match_tasks([name])) for name in asked}
    missing = [name for name, names in found.items() if not names]
    if missing:
        known = list(manager.task_index)
        must = "--harness: must be a task, group or tag of lm-evaluation-harness or of --harness-include"
        raise UserError(*(f"{must}, got {name!r}.{nearest(name, known)}" for name in missing))
    return HarnessTasks(tuple(dict.fromkeys(name for names in found.values() for name in names)), manager)


def as_lm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 8) -> Any:
    """The model as the harness takes it, an lm_eval.models.huggingface.HFLM; the model itself is not copied.

    Args:
        batch_size: Sequences of a forward pass, whose logits exist all at once in float32.
    Raises: UserError: The harness is not installed.
    """
    if find_spec("lm_eval") is None:
        raise UserError(INSTALL)
    from lm_eval.models.huggingface import HFLM

    # HFLM ties the weights again, by the config: a trained, adapted or quantised part of a pair is no parameter to tie.
    model.tie_weights = lambda: None
    try:
        return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    finally:
        del model.tie_weights


def evaluate_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: HarnessTasks,
    *,
    limit: int | None = None,
) -> dict[str, Any]:
    """Run tasks; the shots are those of each task, the metrics those of the harness.

    Returns: JSON values: lm_eval (its version), and for every task and group `metrics` (name -> number; the filter is
        part of the name where there is one; null where the harness gives none), `num_examples` and `num_fewshot` (null
        for groups).
    """
    lm = as_lm(model, tokenizer)
    import lm_eval

    result = lm_eval.simple_evaluate(
        model=lm, tasks=list(tasks.names), task_manager=tasks.manager, limit=limit, log_samples=False
    )
    shots, sizes = result["n-shot"], result["n-samples"]
    return {
        "lm_eval": lm_eval.__version__,
        "tasks": {
            name: {
                "metrics": _metrics(numbers),
                "num_examples": sizes[name]["effective"] if name in sizes else None,
                "num_fewshot": shots.get(name),
            }
            for name, numbers in result["results"].items()
        },
    }


def harness_table(result: dict[str, Any]) -> Table:
    """The numbers of `evaluate_harness`, a row for each metric."""
    table = Table(title="lm-evaluation-harness", title_justify="left")
    for name in ("task", "metric", "n", "value", "stderr"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for task, found in result["tasks"].items():
        metrics = found["metrics"]
        for name, value in metrics.items():
            metric, comma, filter_ = name.partition(",")
            if not metric.endswith("_stderr"):
                stderr = metrics.get(f"{metric}_stderr{comma}{filter_}")
                size = "–" if found["num_examples"] is None else f"{found['num_examples']:,}"
                table.add_row(task, name, size, _shown(value), _shown(stderr))
    return table


def _metrics(numbers: dict[str, Any]) -> dict[str, float | None]:
    """{"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": "x"} -> {"acc": 0.5, "acc_stderr": None}."""
    given = {key.removesuffix(",none"): value for key, value in numbers.items() if "," in key}
    return {key: float(value) if isinstance(value, int | float) else None for key, value in given.items()}


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
