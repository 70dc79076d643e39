"""Tasks of lm-evaluation-harness (extra `lm-eval`) on a model in memory: with its adapter, or merged, or bare."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.errors import UserError


def find_harness_tasks(asked: Sequence[str], include: Path | None = None) -> dict[str, Any]:
    """Look up names or patterns (`mmlu_*`) of tasks, groups or tags; `include` is a folder of tasks in YAML.

    Returns the `tasks` and the `task_manager` of lm_eval.simple_evaluate.
    """
    if find_spec("lm_eval") is None:
        raise UserError("--harness: lm-evaluation-harness is not installed. Fix: pip install 'qdora[lm-eval]'")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include is None else str(include))
    found = {name: sorted(manager.match_tasks([name])) for name in asked}
    if missing := [name for name, names in found.items() if not names]:
        raise UserError(f"--harness: no task, group or tag {', '.join(missing)}.")
    return {"tasks": list(dict.fromkeys(itertools.chain(*found.values()))), "task_manager": manager}


def as_lm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model, not copied, as an lm_eval.models.huggingface.HFLM."""
    from lm_eval.models.huggingface import HFLM

    # HFLM ties the weights again, but a trained, adapted or quantised part of a pair is no parameter to tie
    model.tie_weights = lambda: None
    try:
        # The logits of a batch exist all at once, in float32
        return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=8)
    finally:
        del model.tie_weights


def evaluate_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: dict[str, Any],
    *,
    limit: int | None = None,
) -> dict[str, Any]:
    """Run tasks of `find_harness_tasks` with their own shots. Returns JSON values: the version of lm_eval, and of every
    task and group the `metrics`, `num_examples` and `num_fewshot` (null for groups)."""
    import lm_eval

    lm = as_lm(model, tokenizer)
    result = lm_eval.simple_evaluate(model=lm, **tasks, limit=limit, log_samples=False)
    found = {}
    for name, numbers in result["results"].items():
        found[name] = {
            "metrics": {
                key.removesuffix(",none"): float(value) if isinstance(value, int | float) else None
                for key, value in numbers.items()
                if "," in key
            },
            "num_examples": result["n-samples"].get(name, {}).get("effective"),
            "num_fewshot": result["n-shot"].get(name),
        }
    return {"lm_eval": lm_eval.__version__, "tasks": found}


def harness_table(result: dict[str, Any]) -> Table:
    """The numbers of `evaluate_harness`, a row for each metric."""
    table = Table("task", "metric", "n", "value", title="lm-evaluation-harness", title_justify="left")
    for task, found in result["tasks"].items():
        for name, value in found["metrics"].items():
            table.add_row(
                task, name, str(found["num_examples"] or "–"), "–" if value is None else f"{value:.4f}"
            )
    return table
