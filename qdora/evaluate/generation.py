"""Accuracy by generation: the model answers in its own words, and the answer is read from them.

The protocol of the DoRA paper's commonsense table (arXiv 2402.09353, sec. 5.1; LLM-Adapters, arXiv 2304.01933): an
instruction, up to 32 new tokens, the first answer name that occurs counts ("answer2", "true"). The published script
searches with 4 beams; here decoding is greedy. Outputs without a name are counted separately.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
from rich.table import Table
from torch import Tensor, nn
from transformers import GenerationConfig

from qdora.adapter.product import decoding
from qdora.data.example import Example
from qdora.data.tokenize import encode_batch, special_prefix, with_prefix
from qdora.evaluate import spans
from qdora.evaluate.intervals import mean_stderr
from qdora.evaluate.spans import head_input, length_batches, padded, pads_left, results_of, scoring
from qdora.evaluate.suite import Cell, Result, average_of, conditions, estimated, percent, results_table, spread
from qdora.files.console import Progress
from qdora.model.attention import context_length
from qdora.model.tokens import stop_ids_of_model

MAX_NEW_TOKENS = 32  # as in the published evaluation


@dataclass(frozen=True, kw_only=True)
class GeneratedResult:
    """Counts of one task, or of all. num_right + num_wrong + num_unparsable = num_examples."""

    num_examples: int
    num_right: int
    num_wrong: int
    num_unparsable: int
    acc: float  # num_right / num_examples; in the average the mean over tasks
    acc_stderr: float | None
    chance: float  # expected accuracy of a random choice
    num_truncated: int
    num_new_tokens: int


GenerationResult = Result[GeneratedResult]


def evaluate_generated(
    model: nn.Module,
    tokenizer: Any,
    examples_by_task: Mapping[str, Sequence[Example]],
    *,
    limit: int | None = None,
    block: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Progress | None = None,
) -> GenerationResult:
    """Let the model answer every task's examples; count right, wrong and unparsable answers."""
    began = time.perf_counter()
    stop_ids = stop_ids_of_model(model, tokenizer)
    tasks: dict[str, GeneratedResult] = {}
    records: list[dict[str, Any]] = []
    for task, examples in examples_by_task.items():
        chosen = spread(examples, limit, block)
        names = [answer_names(example.choices) for example in chosen]
        prompts, cut = _prompts(tokenizer, chosen, context_length(model), max_new_tokens)
        generated = decode_greedily(
            model, prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids, progress=progress
        )
        own: list[dict[str, Any]] = []
        for example, choices, ids, num_truncated in zip(chosen, names, generated, cut, strict=True):
            output = tokenizer.decode(ids, skip_special_tokens=True)
            answer = first_mention(output, choices)
            record = {"task": task, "id": example.id, "gold": example.gold, "output": output, "answer": answer}
            outcome = "unparsable" if answer is None else "right" if answer == example.gold else "wrong"
            own.append(
                record | {"num_new_tokens": len(ids), "num_truncated": num_truncated, "outcome": outcome}
            )
        tasks[task] = _counted(own, [len(choices) for choices in names])
        records += own
    asked = {"method": "generate", "limit": limit, "block": block, "max_new_tokens": max_new_tokens}
    return GenerationResult(tasks, average_of(list(tasks.values())), asked | conditions(model, began), records)


def generation_faults(examples_by_task: Mapping[str, Sequence[Example]]) -> list[str]:
    """Why tasks cannot be evaluated by generation."""
    faults = []
    for task, examples in examples_by_task.items():
        wrong = next((each.id for each in examples if not answer_names(each.choices)), None)
        if wrong is not None:
            what = f"needs choices that differ in one word, unlike example {wrong} of task {task}"
            faults.append(
                f"eval.method: generate {what}. Fix: for the eight tasks set format: commonsense170k."
            )
    return faults


def generation_table(results: Mapping[str, GenerationResult]) -> Table:
    """A row per task and, per label, accuracy in % ± standard error, and right / wrong / unparsable."""
    shared: dict[str, Cell] = {
        "n": lambda each: str(each.num_examples),
        "chance": lambda each: percent(each.chance),
    }
    own: dict[str, Cell] = {
        "acc %": lambda each: percent(each.acc, each.acc_stderr, each.num_examples),
        "right / wrong / unparsable": lambda each: (
            f"{each.num_right} / {each.num_wrong} / {each.num_unparsable}"
        ),
    }
    return results_table("answers generated", results, shared, own)


def _prompts(
    tokenizer: Any, examples: Sequence[Example], context: int | None, max_new_tokens: int
) -> tuple[list[list[int]], list[int]]:
    """Ids of each prompt, and how many were cut from its left."""
    prefix = special_prefix(tokenizer)
    encoded = [
        with_prefix(ids, prefix) for ids in encode_batch(tokenizer, [example.prompt for example in examples])
    ]
    room = None if context is None else context + 1 - max_new_tokens  # the last new token is never fed
    cut = [0 if room is None else max(len(ids) - room, 0) for ids in encoded]
    return [[*prefix, *ids[len(prefix) + num_cut :]] for ids, num_cut in zip(encoded, cut, strict=True)], cut


def _counted(records: Sequence[Mapping[str, Any]], num_choices: Sequence[int]) -> GeneratedResult:
    outcomes = [record["outcome"] for record in records]
    return GeneratedResult(
        num_examples=len(records),
        num_right=outcomes.count("right"),
        num_wrong=outcomes.count("wrong"),
        num_unparsable=outcomes.count("unparsable"),
        **estimated("acc", mean_stderr([outcome == "right" for outcome in outcomes])),
        chance=float(np.mean([1.0 / count for count in num_choices])),
        num_truncated=sum(record["num_truncated"] > 0 for record in records),
        num_new_tokens=sum(record["num_new_tokens"] for record in records),
    )


_NAME = re.compile(r"[^\W_][\w'-]*")


def answer_names(choices: Sequence[str]) -> tuple[str, ...]:
    """The one word of each choice in which the choices differ, without a full stop; empty where they differ in more.

    ("the correct answer is answer1", "the correct answer is answer2") -> ("answer1", "answer2").
    """
    words = [choice.split() for choice in choices]
    while all(len(each) > 1 for each in words) and len({each[0] for each in words}) == 1:
        words = [each[1:] for each in words]
    while all(len(each) > 1 for each in words) and len({each[-1] for each in words}) == 1:
        words = [each[:-1] for each in words]
    names = tuple(each[0].rstrip(".") for each in words if len(each) == 1)
    differ = len({name.casefold() for name in names}) == len(choices) > 1
    return names if differ and all(map(_NAME.fullmatch, names)) else ()


def first_mention(text: str, names: Sequence[str]) -> int | None:
    """Index of the name that stands first in the text.

    Unlike in the published evaluation a name is a whole word in any case, and one of this question.
    """
    ordered = sorted(names, key=len, reverse=True)  # "well-being" before "well"
    listed = "|".join(f"({re.escape(name)})" for name in ordered)
    found = re.search(rf"(?<!\w)(?:{listed})(?!\w)", text, re.IGNORECASE)
    return names.index(ordered[found.lastindex - 1]) if found and found.lastindex else None


def decode_greedily(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    progress: Progress | None = None,
) -> list[list[int]]:
    """The new ids of every prompt, up to the first of `stop_ids`. New ones count as tokens of a batch."""
    can_pad = pads_left(model)

    def fits(batch: list[int]) -> bool:
        longest, shortest = len(prompts[batch[0]]), len(prompts[batch[-1]])
        return len(batch) * (longest + max_new_tokens) <= spans.BATCH_TOKENS and (
            can_pad or shortest == longest
        )

    def compute(batch: list[int]) -> list[list[int]]:
        ids, mask = padded([prompts[index] for index in batch], left=True)
        options = {
            "max_new_tokens": max_new_tokens,
            "eos_token_id": sorted(stop_ids) or None,
            "do_sample": False,
        }
        new = generate(model, ids, mask, **options)[:, ids.shape[1] :].tolist()
        return [list(takewhile(lambda token: token not in stop_ids, row)) for row in new]

    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    batches = list(length_batches(order, lambda index: len(prompts[index]), fits))
    found = results_of(model, batches, compute, progress)
    return [found[index] for index in range(len(prompts))]


def generate(model: Any, ids: Tensor, mask: Tensor, **settings: Any) -> Tensor:
    """transformers' `generate` with these settings alone, not those of the model's config; (rows, prompt + new tokens).

    `ids` and `mask` are (rows, length) int64, padded on the left.
    """
    device = next(model.parameters()).device
    own, model.generation_config = model.generation_config, GenerationConfig()
    settings |= {"attention_mask": mask.to(device), "max_length": None, "use_cache": True, "pad_token_id": 0}
    try:
        with scoring(model), decoding(), head_input(model, lambda hidden: hidden[:, -1:]):
            tokens: Tensor = model.generate(ids.to(device), **settings)
    finally:
        model.generation_config = own
    return tokens
