"""The evaluations inside a run: measured, kept in the run directory, and held against the untrained base."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel

from qdora.data.example import Example
from qdora.evaluation.generation import evaluate_generated, generation_table
from qdora.evaluation.suite import EvaluationResult, evaluate, worse_than_base
from qdora.files.console import suite_bar
from qdora.files.run_directory import RunDirectory
from qdora.recipe.settings import Recipe
from qdora.run.evaluate import read_result

logger = logging.getLogger("qdora")


class RunValidation:
    """What the first process of a run evaluates on, and what has come of it so far.

    Args:
        recipe, run, model, tokenizer: Of the run.
        examples: Validation examples of each task that is evaluated, perhaps of none.
        console: Where progress is shown.

    Attributes:
        results: "base" before the first step, and "adapter" last.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunDirectory,
        model: PreTrainedModel,
        tokenizer: Any,
        examples: Mapping[str, Sequence[Example]],
        console: Console,
    ) -> None:
        self.recipe, self.run, self.model, self.tokenizer = recipe, run, model, tokenizer
        self.examples, self.console = examples, console
        self.results: dict[str, EvaluationResult] = {}

    def take_back(self, label: str, step: int) -> None:
        """Take the evaluation after `step` steps from the run directory, where it is there."""
        file = self.run.evaluation_file(step)
        if file.is_file():
            self.results[label] = read_result(file)

    def measure(self, step: int, label: str = "adapter") -> dict[str, Any]:
        """Evaluate the model after `step` steps and keep the result; returns its part of a line of metrics."""
        with suite_bar(self.console, f"evaluating, step {step}") as progress:
            result = evaluate(
                self.model,
                self.tokenizer,
                self.examples,
                limit=self.recipe.eval.limit,
                per_example=True,
                progress=progress,
            )
        self.results[label] = result
        self.run.write_json(f"eval/{self.run.evaluation_file(step).name}", result.to_dict(per_example=True))
        metrics = {task: asdict(numbers) for task, numbers in result.tasks.items()}
        if self.recipe.eval.method == "generate":
            for task, numbers in self._generate(step).items():
                metrics[task]["generated"] = numbers
        return {"eval": metrics, "average": asdict(result.average)} | self._against_base(step, result)

    def _against_base(self, step: int, result: EvaluationResult) -> dict[str, Any]:
        """The tasks that are worse than before training while the average is better, for the metrics; warns of them."""
        base = self.results.get("base")
        worse = [] if step == 0 or base is None else worse_than_base(base, result)
        for each in worse:
            logger.warning("Step %d: %s.", step, each.in_words())
        return {"worse_than_base": [asdict(each) for each in worse]} if worse else {}

    def _generate(self, step: int) -> dict[str, Any]:
        """Let the model answer, keep the answers beside the log-likelihoods; the counts per task."""
        with suite_bar(self.console, f"answers, step {step}") as progress:
            result = evaluate_generated(
                self.model, self.tokenizer, self.examples, limit=self.recipe.eval.limit, progress=progress
            )
        self.run.write_json(f"eval/step-{step}-generated.json", result.to_dict(per_example=True))
        self.console.print(generation_table({f"step {step}": result}))
        numbers = result.to_dict()["tasks"]
        return {
            task: {key: value for key, value in each.items() if key != "unparsable"} for task, each in numbers.items()
        }
