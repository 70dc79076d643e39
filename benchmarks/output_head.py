"""The output head's share of an evaluation: given the slice that transformers makes, and given a flat copy of it.

    python benchmarks/output_head.py [--gemma FILE] [--examples 12] [--rounds 5] [--out FILE]

SmolLM2-135M-Instruct (`builtin`, 49,152 words) and, if a GGUF file of Gemma 3 270M (262,144 words) is given, that; with
--smoke a small random model. The test examples of the demo tasks, in turns: `sliced` without the hook that makes the
head's input contiguous, `flat` with it. Two cases: the choices of each question (SmolLM2 runs their shared prefix once,
Gemma's sliding windows do not allow that), and the right answers alone, each run whole.

The floor of a call of the head is one read of its weight; `sliced` reads it once a row.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from byte_tokenizer import byte_tokenizer, small_config
from measure import alternating, facts, parser_of, ratio, spread, write
from transformers import AutoModelForCausalLM

from qdora.data.build_data import task_examples
from qdora.data.example import Example
from qdora.evaluation import forward_path
from qdora.evaluation.suite import evaluate
from qdora.evaluation.suite import spread as spread_evenly
from qdora.memory.allocator import keep_freed_memory
from qdora.recipe.data_settings import DEMO_TASKS

ARMS = ("sliced", "flat")


def main() -> None:
    """Measure every model and case, write the figures."""
    parser = parser_of(__doc__, "output_head", smoke="a random model and two rounds")
    parser.add_argument("--gemma", type=Path, help="GGUF file of Gemma 3 270M")
    parser.add_argument("--examples", type=int, default=12, help="of each of the five demo tasks")
    parser.add_argument("--rounds", type=int, default=5)
    settings = parser.parse_args()
    if settings.smoke:
        settings.examples, settings.rounds = 2, 2
    keep_freed_memory()
    sources = {"small": ""} if settings.smoke else {"SmolLM2-135M": "builtin"}
    if settings.gemma is not None:
        sources["Gemma 3 270M"] = str(settings.gemma)
    cases = [
        {"model": name, **case}
        for name, source in sources.items()
        for case in measured(*load(source), settings.examples, settings.rounds)
    ]
    command = f"python benchmarks/output_head.py --examples {settings.examples} --rounds {settings.rounds}"
    command += " --gemma FILE" if settings.gemma is not None else ""
    write(settings.out, {**facts(command), "examples": len(DEMO_TASKS) * settings.examples, "cases": cases})


def measured(model: Any, tokenizer: Any, num_examples: int, rounds: int) -> Iterator[dict[str, Any]]:
    """A result for the choices, and one for the answers alone."""
    by_task = {task: task_examples(task, split="test", data=None) for task in DEMO_TASKS}
    choices = {task: spread_evenly(examples, num_examples) for task, examples in by_task.items()}
    answers = {task: [replace(each, choices=(), gold=None) for each in some] for task, some in choices.items()}
    for case, examples in (("choices", choices), ("answers", answers)):
        found = alternating({arm: partial(reading, model, tokenizer, examples, arm) for arm in ARMS}, rounds)
        seconds = {arm: [each["seconds"] for each in found[arm]] for arm in ARMS}
        head = {arm: [each["head"] for each in found[arm]] for arm in ARMS}
        differences = np.abs(found["flat"][0]["nll"] - found["sliced"][0]["nll"])
        yield {
            "case": case,
            "dtype": str(model.dtype).removeprefix("torch."),
            "head": list(model.get_output_embeddings().weight.shape),
            "seconds": {arm: spread(seconds[arm]) for arm in ARMS},
            "head_share": {
                arm: spread([part / whole for part, whole in zip(head[arm], seconds[arm], strict=True)]) for arm in ARMS
            },
            "sliced / flat": ratio(seconds["sliced"], seconds["flat"]),
            "head, sliced / flat": ratio(head["sliced"], head["flat"]),
            "equal_scores": int((differences == 0).sum()),
            "largest_difference": float(differences.max()),
        }


def reading(model: Any, tokenizer: Any, examples: dict[str, list[Example]], arm: str) -> dict[str, Any]:
    """Seconds of one evaluation and of its output head, and the NLL of every example."""
    with timed_head(model) as head, sliced_input() if arm == "sliced" else nullcontext():
        began = time.perf_counter()
        result = evaluate(model, tokenizer, examples)
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "head": sum(head), "nll": np.array([each["nll"] for each in result.per_example])}


@contextmanager
def timed_head(model: Any) -> Iterator[list[float]]:
    """The seconds of every call of the head, its hook included in neither arm."""
    head, seconds = model.get_output_embeddings(), []
    forward = head.forward

    def timed(hidden: torch.Tensor) -> torch.Tensor:
        began = time.perf_counter()
        logits: torch.Tensor = forward(hidden)
        seconds.append(time.perf_counter() - began)
        return logits

    head.forward = timed
    try:
        yield seconds
    finally:
        head.forward = forward


@contextmanager
def sliced_input() -> Iterator[None]:
    """Evaluation without the hook."""
    hook = forward_path.contiguous_input
    forward_path.contiguous_input = lambda _head, _args: None
    try:
        yield
    finally:
        forward_path.contiguous_input = hook


def load(source: str) -> tuple[Any, Any]:
    """A model as it is read, without quantisation, and its tokenizer; a small random one for ''."""
    if not source:
        return small()
    from qdora.model.build_model import choose_compute
    from qdora.model.load import load_model
    from qdora.model.source import load_tokenizer, resolve

    found = resolve(source)
    return load_model(found, quant="none", compute_dtype=choose_compute("auto").dtype).eval(), load_tokenizer(found)


def small() -> tuple[Any, Any]:
    """A random model on bytes."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = small_config(len(tokenizer))
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval(), tokenizer


if __name__ == "__main__":
    main()
