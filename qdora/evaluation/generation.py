"""Accuracy by generation: the model answers in its own words, and the answer is read from them.

The protocol of the DoRA paper's commonsense table (arXiv 2402.09353, sec. 5.1), which is that of LLM-Adapters (arXiv
2304.01933): an instruction, up to 32 new tokens, the first answer name that occurs counts. One thing differs: decoding
is greedy, where the published script searches with 4 beams. An output without any of the names is no right answer, and
is counted by itself: a model that does not keep to the format is another matter than one that errs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich.table import Table
from torch import nn

from qdora.data.encode import encode_batch, special_prefix
from qdora.data.example import Example
from qdora.errors import UserError
from qdora.evaluation.answers import answer_names, first_mention, generation_faults
from qdora.evaluation.forward_path import ForwardPath, context_length, find_path
from qdora.evaluation.greedy import decode_greedily
from qdora.evaluation.metrics import Estimate, macro_average, mean_stderr
from qdora.evaluation.spans import Progress
from qdora.evaluation.suite import SuiteProgress, spread

MAX_NEW_TOKENS = 32
"""As the published evaluation."""
_NUM_SAMPLES = 5


@dataclass(frozen=True)
class GeneratedAnswer:
    """What a model said to one example."""

    task: str
    id: str
    gold: int
    output: str
    """Up to where the answer was decided, else to the end of sequence or the last allowed token."""
    answer: int | None
    """Index of the choice that it names first; None where it names none."""
    num_new_tokens: int
    num_truncated: int
    """Tokens cut from the left of the prompt because it is longer than the model's context allows."""

    @property
    def outcome(self) -> str:
        """right, wrong or unparsable."""
        return "unparsable" if self.answer is None else "right" if self.answer == self.gold else "wrong"


@dataclass(frozen=True)
class GeneratedResult:
    """Counts of one task, or of all of them. num_right + num_wrong + num_unparsable = num_examples."""

    num_examples: int
    num_right: int
    num_wrong: int
    num_unparsable: int
    acc: float
    """num_right / num_examples; of the average, the mean over tasks."""
    acc_stderr: float | None
    """None for a single example."""
    chance: float
    """Expected accuracy of naming a choice at random."""
    num_truncated: int
    num_new_tokens: int
    unparsable: list[dict[str, str]] = field(default_factory=list)
    """id and output of the first few outputs that name no choice."""


@dataclass(frozen=True)
class GenerationResult:
    """One model's answers on several tasks."""

    tasks: dict[str, GeneratedResult]
    average: GeneratedResult
    """Accuracy and chance: every task counts once. Counts are sums."""
    settings: dict[str, Any]
    per_example: list[GeneratedAnswer] = field(default_factory=list)
    """In task order."""

    def to_dict(self, *, per_example: bool = False) -> dict[str, Any]:
        """For JSON: dicts, lists, numbers, strings and None only."""
        document: dict[str, Any] = {
            "tasks": {task: asdict(result) for task, result in self.tasks.items()},
            "average": asdict(self.average),
            "settings": dict(self.settings),
        }
        if per_example:
            document["per_example"] = [asdict(each) | {"outcome": each.outcome} for each in self.per_example]
        return document


def evaluate_generated(
    model: nn.Module,
    tokenizer: Any,
    examples_by_task: Mapping[str, Sequence[Example]],
    *,
    limit: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    max_batch_tokens: int = 4096,
    progress: SuiteProgress | None = None,
) -> GenerationResult:
    """Let the model answer every task's examples and count right, wrong and unparsable answers.

    Args:
        model: A causal language model, on the device where it is to run; in eval mode meanwhile.
        tokenizer: Its tokenizer.
        examples_by_task: Task name -> its examples, at least one each, whose choices differ in one word.
        limit: Most examples of a task, the same ones as `suite.evaluate` takes; None for all.
        max_new_tokens: Most tokens of one answer.
        max_batch_tokens: Most tokens of one batch, padding and new tokens included.
        progress: Called with the task, its examples done and all its examples.
    Raises:
        UserError: If there is no task or no example, a choice has no name of one word, or the model's context is too
            short for any prompt.
        RunFailure: If the model gives logits that are not finite.
    """
    faults = generation_faults(examples_by_task)
    if not examples_by_task or not all(examples_by_task.values()):
        faults.append("eval: every task needs an example to answer, got none")
    if faults:
        raise UserError(*faults)
    path = find_path(model)
    began = time.perf_counter()
    tasks: dict[str, GeneratedResult] = {}
    answers: list[GeneratedAnswer] = []
    for task, examples in examples_by_task.items():
        chosen = spread(examples, limit)
        report = None if progress is None else _task_progress(progress, task)
        found = generate_answers(model, tokenizer, chosen, max_new_tokens, max_batch_tokens, path, report)
        tasks[task] = _counted(found, [len(example.choices) for example in chosen])
        answers.extend(found)
    parameter = next(model.parameters())
    settings = {
        "method": "generate",
        "decoding": "greedy",
        "limit": limit,
        "max_new_tokens": max_new_tokens,
        "max_batch_tokens": max_batch_tokens,
        "batched": bool(path.cache_keyword),
        "model_dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(parameter.device),
        "seconds": round(time.perf_counter() - began, 3),
    }
    return GenerationResult(tasks, _average(list(tasks.values())), settings, answers)


def generate_answers(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    max_new_tokens: int,
    max_batch_tokens: int,
    path: ForwardPath,
    progress: Progress | None = None,
) -> list[GeneratedAnswer]:
    """The model's answers, in the order of `examples`; see `evaluate_generated`.

    A row is done as soon as its first name is complete: what follows could not change the answer.
    """
    names = [answer_names(example.choices) for example in examples]
    prompts, cut = _prompts(tokenizer, examples, context_length(model), max_new_tokens)

    def text(ids: Sequence[int]) -> str:
        decoded: str = tokenizer.decode(list(ids), skip_special_tokens=True)
        return decoded

    def decided(index: int, ids: Sequence[int]) -> bool:
        answer, may_change = first_mention(text(ids), names[index])
        return answer is not None and not may_change

    generated = decode_greedily(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=_stop_ids(model, tokenizer),
        finished=decided,
        max_batch_tokens=max_batch_tokens,
        path=path,
        progress=progress,
    )
    return [
        GeneratedAnswer(
            task=example.task,
            id=example.id,
            gold=-1 if example.gold is None else example.gold,
            output=text(ids),
            answer=first_mention(text(ids), own)[0],
            num_new_tokens=len(ids),
            num_truncated=num_cut,
        )
        for example, own, ids, num_cut in zip(examples, names, generated, cut, strict=True)
    ]


def generation_table(results: Mapping[str, GenerationResult]) -> Table:
    """Tasks as rows and, per label, accuracy in % ± standard error with right / wrong / unparsable, for a terminal."""
    table = Table(title="answers generated", title_justify="left")
    for position, name in enumerate(["task", "n", "chance"]):
        table.add_column(name, justify="left" if position == 0 else "right")
    for label in results:
        table.add_column(f"{label} acc %", justify="right")
        table.add_column("right / wrong / unparsable", justify="right")
    names = list(dict.fromkeys(task for result in results.values() for task in result.tasks))
    for name in names:
        table.add_row(*_row(name, [result.tasks.get(name) for result in results.values()]))
    table.add_section()
    table.add_row(*_row("average", [result.average for result in results.values()]), style="bold")
    return table


def _row(name: str, results: Sequence[GeneratedResult | None]) -> list[str]:
    known = [result for result in results if result is not None]
    row = [name, *("/".join(dict.fromkeys(cells)) for cells in zip(*(_shared_cells(r) for r in known), strict=True))]
    for result in results:
        if result is None:
            row += ["–", "–"]
            continue
        error = "" if result.acc_stderr is None else f" ± {100 * result.acc_stderr:.1f}"
        row.append(f"{100 * result.acc:.1f}{error}")
        row.append(f"{result.num_right} / {result.num_wrong} / {result.num_unparsable}")
    return row


def _shared_cells(result: GeneratedResult) -> tuple[str, str]:
    return str(result.num_examples), f"{100 * result.chance:.1f}"


def _task_progress(progress: SuiteProgress, task: str) -> Progress:
    return lambda done, total: progress(task, done, total)


def _prompts(
    tokenizer: Any, examples: Sequence[Example], context: int | None, max_new_tokens: int
) -> tuple[list[list[int]], list[int]]:
    """Ids of each prompt, and how many were cut from its left so that prompt and answer fit the model's context."""
    prefix = special_prefix(tokenizer)
    encoded = encode_batch(tokenizer, [example.prompt for example in examples])
    room = None if context is None else context + 1 - max_new_tokens - len(prefix)  # the last new token is never fed
    if room is not None and room < 1:
        raise UserError(
            f"eval.method: generate needs {max_new_tokens} tokens for the answer, got a model with a context of "
            f"{context}, allowed: a longer context, or method loglikelihood."
        )
    cut = [0 if room is None else max(len(ids) - room, 0) for ids in encoded]
    return [[*prefix, *ids[num_cut:]] for ids, num_cut in zip(encoded, cut, strict=True)], cut


def _stop_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    """Ends of sequence of the tokenizer and of the model's own settings (chat models have several)."""
    stops = {tokenizer.eos_token_id}
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops |= set(own) if isinstance(own, list | tuple) else {own}
    return {int(stop) for stop in stops if stop is not None}


def _counted(answers: Sequence[GeneratedAnswer], num_choices: Sequence[int]) -> GeneratedResult:
    outcomes = [answer.outcome for answer in answers]
    acc = mean_stderr([outcome == "right" for outcome in outcomes])
    lost = [answer for answer in answers if answer.answer is None]
    return GeneratedResult(
        num_examples=len(answers),
        num_right=outcomes.count("right"),
        num_wrong=outcomes.count("wrong"),
        num_unparsable=outcomes.count("unparsable"),
        acc=acc.value,
        acc_stderr=None if np.isnan(acc.stderr) else acc.stderr,
        chance=float(np.mean([1.0 / count for count in num_choices])),
        num_truncated=sum(answer.num_truncated > 0 for answer in answers),
        num_new_tokens=sum(answer.num_new_tokens for answer in answers),
        unparsable=[{"id": answer.id, "output": answer.output} for answer in lost[:_NUM_SAMPLES]],
    )


def _average(results: Sequence[GeneratedResult]) -> GeneratedResult:
    errors = [float("nan") if result.acc_stderr is None else result.acc_stderr for result in results]
    acc = macro_average([Estimate(result.acc, error) for result, error in zip(results, errors, strict=True)])
    return GeneratedResult(
        num_examples=sum(result.num_examples for result in results),
        num_right=sum(result.num_right for result in results),
        num_wrong=sum(result.num_wrong for result in results),
        num_unparsable=sum(result.num_unparsable for result in results),
        acc=acc.value,
        acc_stderr=None if np.isnan(acc.stderr) else acc.stderr,
        chance=float(np.mean([result.chance for result in results])),
        num_truncated=sum(result.num_truncated for result in results),
        num_new_tokens=sum(result.num_new_tokens for result in results),
    )
