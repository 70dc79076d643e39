"""The `data` section of a recipe: which sources are mixed, how, and how an example becomes tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, Strict
from pydantic_core import PydanticCustomError

from qdora.errors import nearest
from qdora.recipe.section import Fault, Flag, Positive, Section, Seed, Share, Text, Whole, allowed, ignored_faults

COMMONSENSE_TASKS = ("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_e", "arc_c", "obqa")
"""The eight tasks of the LoRA and DoRA papers' commonsense average."""

DEMO_TASKS = ("demo/facts", "demo/odd", "demo/cause", "demo/howto", "demo/next")
"""The sets that ship inside the package."""

TASKS = (*COMMONSENSE_TASKS, *DEMO_TASKS)
"""All built-in tasks."""

DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt", ".md", ".gz", ".zst", ".csv")
"""File endings that make a `source` a file and never a Hub id."""

STREAMED_SUFFIXES = (".parquet", ".jsonl")
"""File endings that can be read in parts."""

_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?")


def _task_name(value: str) -> str:
    if value in TASKS:
        return value
    context = {"allowed": ", ".join(TASKS), "nearest": nearest(value, TASKS)}
    raise PydanticCustomError("allowed", "allowed: {allowed}", context)


TaskName = Annotated[Text, AfterValidator(_task_name)]


def is_path(source: str) -> bool:
    """Whether a source is written as a path: /x, ./x, ../x, ~/x, with the ending of a file, or not as a Hub id."""
    return source.startswith(("/", ".", "~")) or has_file_ending(source) or not _HUB_ID.fullmatch(source)


def has_file_ending(source: str) -> bool:
    """Whether a source names one file, by its ending (`DATA_SUFFIXES` or .gguf)."""
    return source.lower().endswith((*DATA_SUFFIXES, ".gguf"))


class SourceConfig(Section):
    """One source of the mix: a built-in task, or the user's own data."""

    task: TaskName | None = None
    """Built-in task: boolq, piqa, siqa, hellaswag, winogrande, arc_e, arc_c, obqa, or a demo/<family>."""
    source: Text | None = None
    """Own data: a file, a directory of <split> files, or a Hub id."""
    path: Text | None = None
    """For `task`: a directory that holds <split>.parquet or <split>.jsonl. None: the task's pinned set on the Hub."""
    format: Literal["auto", "choices", "completion", "messages", "text", "commonsense170k"] = "auto"
    """Layout of the rows of `source`. auto: from the names of the columns. For the eight commonsense tasks: auto
    asks for the text of a choice; commonsense170k, as LLM-Adapters and the DoRA paper do, for its name."""
    split: Text = "train"
    """Split to train on."""
    validation: Text | None = None
    """Split, or file, to validate on. None: the validation split, or the end of the train split where there is none."""
    weight: Positive | None = None
    """For data.strategy weights: share of this source in the examples that are seen, relative to the others."""
    loss_weight: Positive | None = None
    """What a token of this source counts in the loss, relative to those of others. None: 1."""
    limit: Whole | None = None
    """Use at most so many training examples, drawn with data.seed. None: all."""
    max_epochs: Positive | None = None
    """Most passes over this source; then its share goes to the others, in their proportions. None: no end."""
    stream: Flag = False
    """Read `source` while training, a part at a time: for data larger than memory. Parquet, JSON-lines, or the Hub."""
    size: Whole | None = None
    """Examples of a stream, for shares by size and max_epochs. None: as Parquet footers or the Hub say, if they do."""
    shuffle_window: Whole = 4096
    """Rows of a stream that are shuffled together and kept in memory; its files come in another order each pass."""
    name: Text | None = None
    """Name in metrics and tables. None: the task, or the last part of the source."""
    revision: Text | None = None
    """Branch, tag or commit of a Hub data set. None: the pinned one of a task, the main branch of a source."""

    @property
    def label(self) -> str:
        """The name in metrics: `name`, the task, or the last part of the source without its ending."""
        return self.name or self.task or Path(self.source or "").name.partition(".")[0] or str(self.source)

    def unused(self) -> dict[str, str]:
        found = {}
        if self.stream:
            found["limit"] = "a stream is not counted beforehand (max_epochs is the cap)"
        else:
            found |= dict.fromkeys(("size", "shuffle_window"), "the source is not streamed")
        if self.task is not None:
            found["stream"] = f"task {self.task} is read into memory"
            if self.task not in COMMONSENSE_TASKS or self.format not in ("auto", "commonsense170k"):
                found["format"] = f"task {self.task} has a layout of its own"
            if self.task.startswith("demo/"):
                found["path"] = f"{self.task} ships inside the package"
                found["revision"] = f"{self.task} ships inside the package"
            elif self.path is not None:
                found["revision"] = "the data comes from path"
        elif self.source is not None:
            found["path"] = "it belongs to task; the data comes from source"
            if is_path(self.source):
                found["revision"] = "source is not on the Hub"
            if has_file_ending(self.source):
                found["split"] = "source is a single file"
        return found

    def faults(self) -> Iterator[Fault]:
        if (self.task is None) == (self.source is None):
            got = "neither" if self.task is None else "both"
            yield "", f"what to read, got {got} of task and source, allowed: exactly one of task, source."
        source = self.source or ""
        if self.stream and has_file_ending(source) and not source.lower().endswith(STREAMED_SUFFIXES):
            yield "stream", f"{source} cannot be read in parts, got True, allowed: {', '.join(STREAMED_SUFFIXES)}."


class DataConfig(Section):
    """The combined training data."""

    mix: tuple[SourceConfig, ...]
    """The sources, trained on together; at least one."""
    strategy: Literal["proportional", "equal", "temperature", "weights"] = "proportional"
    """Share of each source: by its size, the same for each, by size^(1 / temperature), or by its `weight`."""
    temperature: Positive | None = None
    """For strategy temperature: 1 is proportional, large is equal. T5, arXiv 1910.10683, sec. 3.5.2."""
    max_length: Annotated[int, Strict(), Field(ge=2), allowed("a whole number of tokens, 2 or more")] = 512
    """Tokens of the longest example."""
    too_long: Literal["error", "truncate", "drop"] = "error"
    """What happens to a longer one: stop before training, cut the front of its prompt, or leave it out (counted)."""
    packing: Flag = False
    """Put several examples into one row of at most max_length tokens: less padding. Each is trained as if it were
    alone; a model that cannot keep them apart is refused."""
    loss_on: Literal["answer", "all"] = "answer"
    """Tokens that are learnt: the answer's, or the prompt's too."""
    validation_fraction: Share = 0.05
    """Share that is cut from the end of a train split without a validation split."""
    seed: Seed = 0
    """Seed of the order and of `limit`; apart from train.seed, so that arms of a comparison see the same data."""

    def unused(self) -> dict[str, str]:
        found = {}
        if self.strategy != "temperature":
            found["temperature"] = f"data.strategy is {self.strategy}"
        if all(source.validation is not None or source.stream for source in self.mix):
            found["validation_fraction"] = "every source names its validation data or is streamed"
        return found

    def faults(self) -> Iterator[Fault]:
        if self.strategy == "temperature" and self.temperature is None:
            yield "temperature", "missing for data.strategy temperature, got None, allowed: a finite number above 0."
        if not self.mix:
            yield "mix", "nothing to train on, got [], allowed: at least one source."
        if self.too_long == "error" and any(source.stream for source in self.mix):
            what = "a stream is not read before training, got 'error', allowed: truncate, drop."
            yield "too_long", what
        seen: dict[str, int] = {}
        for index, source in enumerate(self.mix):
            if self.strategy != "weights":
                reason = {"weight": f"data.strategy is {self.strategy}"}
                yield from ignored_faults(source, reason, prefix=f"mix[{index}].")
            elif source.weight is None:
                yield f"mix[{index}].weight", "missing for data.strategy weights, got None, allowed: a number above 0."
            first = seen.setdefault(source.label, index)
            if first != index:
                yield (
                    f"mix[{index}].name",
                    f"the same as that of mix[{first}], got {source.label!r}, allowed: a name of its own.",
                )
