"""The section `data` of a recipe: the sources, how they are mixed, and how an example becomes tokens."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, StrictInt, StrictStr, model_validator

from qdora.files.machine import user_path
from qdora.recipe.section import Flag, NotNegative, Positive, Section, Seed, Share, Text, Whole, WholeOrZero

Strategy = Literal["proportional", "equal", "temperature", "weights"]
TooLong = Literal["error", "truncate", "drop", "split"]
LossOn = Literal["answer", "last", "all"]

TaskName = Literal[
    "boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_e", "arc_c", "obqa",
    "demo/facts", "demo/odd", "demo/cause", "demo/howto", "demo/next",
]  # fmt: skip
TASKS: tuple[str, ...] = get_args(TaskName)
COMMONSENSE_TASKS, DEMO_TASKS = TASKS[:8], TASKS[8:]

COMPRESSED_SUFFIXES = (".gz", ".zst")

PLAIN_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".md")

FILE_SUFFIXES = (
    ".parquet",
    *(plain + packed for packed in ("", *COMPRESSED_SUFFIXES) for plain in PLAIN_SUFFIXES),
)

DATA_SUFFIXES = (".parquet", *PLAIN_SUFFIXES, *COMPRESSED_SUFFIXES)
"""A `source` with one of these endings is a file, never a Hub id."""

_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?")
_PART = r"\w[\w.-]*(\[[^][/]*\])?"
_SPLITS = re.compile(rf"{_PART}(\+{_PART})*")
"""Also parts of splits: train[95%:], train[:9]+test."""


def is_path(source: str) -> bool:
    """Whether a source is a path: /x, ./x, ../x, ~/x, anything with the ending of a file, or no valid Hub id."""
    return source.startswith(("/", ".", "~")) or has_file_ending(source) or not _HUB_ID.fullmatch(source)


def names_files(validation: str) -> bool:
    """Whether `validation` of a source is a path, not a split or parts of splits."""
    return has_file_ending(validation) or (is_path(validation) and not _SPLITS.fullmatch(validation))


def is_pattern(source: str) -> bool:
    """Whether a source stands for all files that fit it, such as data/*.jsonl. A path that exists does not."""
    return any(mark in source for mark in "*?[") and not os.path.exists(user_path(source))


def absolute_pattern(value: str, folder: Path) -> str:
    """A path or a pattern that starts at a folder, whose own name is no pattern, as an absolute one."""
    path = os.path.abspath(folder / user_path(value))
    if glob.escape(value) == value or os.path.exists(path):
        return path
    return os.path.abspath(glob.escape(str(folder)) / user_path(value))


def has_file_ending(source: str) -> bool:
    """Whether a source ends as a file does (`DATA_SUFFIXES` or .gguf)."""
    return source.lower().endswith((*DATA_SUFFIXES, ".gguf"))


def _jinja(value: str) -> str:
    from jinja2 import Environment, TemplateError

    try:
        Environment().from_string(value)  # only compiled
    except TemplateError as error:
        raise ValueError(f"not a Jinja template ({error})") from None
    return value


Template = Annotated[StrictStr, Field(min_length=1), AfterValidator(_jinja)]


class TemplateConfig(Section):
    """Prompt and completion of any row: Jinja templates over the columns; null gives no text."""

    prompt: Annotated[StrictStr, AfterValidator(_jinja)]
    """Template of the prompt; it may be empty: '' makes plain text, all of which is learnt."""
    completion: Template
    """Template of the completion, which is learnt. It follows the prompt as it stands, with its own leading space."""


CHAT_FORMATS = ("completion", "alpaca")


HubFiles = Text | tuple[Text, ...] | dict[Text, Text | tuple[Text, ...]]


class SourceConfig(Section):
    """One source of the mix: a built-in task, or your own data."""

    task: TaskName | None = None
    """Built-in task: boolq, piqa, siqa, hellaswag, winogrande, arc_e, arc_c, obqa, or a demo/<family>."""
    source: Text | None = None
    """Your own data: a file, a pattern such as data/*.jsonl, a directory of files, or a Hub id."""
    path: Text | None = None
    """For a task: directory with <split>.parquet or <split>.jsonl (null: the task's pinned data set on the Hub)."""
    format: Literal[
        "auto", "choices", "completion", "messages", "sharegpt", "alpaca", "text", "commonsense170k"
    ] = "auto"
    """Layout of the rows of source. auto: by the names of the columns. commonsense170k: asks as the DoRA paper does."""
    chat: Flag = False
    """Make a chat of each row of prompt and completion, or instruction and output, and a column system."""
    columns: Annotated[dict[Text, Text], Field(min_length=1)] | None = None
    """Name that the format reads -> your name of the column: {prompt: question, completion: answer}."""
    template: TemplateConfig | None = None
    """Makes prompt and completion from any row, in place of a format. Renamed columns have their new names in it."""
    split: Text = "train"
    """Split to train on."""
    validation: Text | None = None
    """Split or file to validate on (null: the validation split; if there is none, the end of the train split)."""
    weight: NotNegative | None = None
    """Share of the examples that are drawn from this source, relative to the others; for data.strategy weights. 0: it
    is evaluated, but neither trained on nor used for calibration."""
    loss_weight: Positive | None = None
    """Weight of a token of this source in the loss, relative to other sources (null: 1)."""
    limit: Whole | None = None
    """Most training examples to use; they are drawn with data.seed (null: all)."""
    max_epochs: Positive | None = None
    """Most passes over this source. After that the other sources share its part of the mix (null: no limit)."""
    stream: Flag = False
    """Read source in parts during training, for data larger than memory."""
    size: Whole | None = None
    """Number of examples in a stream, for shares by size and for max_epochs (null: from Parquet footers or the Hub)."""
    shuffle_window: Whole = 4096
    """Rows of a stream that are kept in memory and shuffled together. Each pass also reads the files in a new order."""
    name: Text | None = None
    """Name in metrics and tables (null: the task, or the last part of source)."""
    revision: Text | None = None
    """Branch, tag or commit of a Hub data set (null: the pinned commit of a task, the main branch of a source)."""
    config: Text | None = None
    """Configuration of a Hub data set that has several, such as main of openai/gsm8k."""
    data_files: HubFiles | None = None
    """Files of a Hub data set to read: one, a list, or a table of split: files (null: those that it declares)."""

    @property
    def label(self) -> str:
        """`name`, the task, or the last part of the source without its ending and wildcards."""
        parts = reversed(Path(self.source or "").parts)
        stems = (re.split(r"[*?\[]", part.partition(".")[0])[0].rstrip("-_") for part in parts)
        return self.name or self.task or next(filter(None, stems), None) or str(self.source)

    @property
    def is_local(self) -> bool:
        return self.path is not None or (self.source is not None and is_path(self.source))


class DataConfig(Section):
    """The combined training data."""

    mix: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    """The sources to train on together; at least one."""
    strategy: Strategy = "proportional"
    """Share of each source: by its size, equal, by size^(1 / temperature), or its weight."""
    temperature: Positive | None = None
    """For strategy temperature: 1 is proportional, large values approach equal. T5, arXiv 1910.10683, sec. 3.5.2."""
    max_length: Annotated[StrictInt, Field(ge=2)] = 512
    """Most tokens of an example."""
    too_long: TooLong = "error"
    """What to do with a longer training example. error: the run does not start. truncate: cut the start of the prompt,
    then the end of the answer; a chat is cut after its last answer that fits. drop: leave it out and count it. split:
    divide plain text into examples of max_length; all else is an error. The default with a stream is truncate."""
    max_bad_rows: WholeOrZero | None = None
    """Most faulty rows, which are skipped and reported, of a pass over a stream (null: 10, or 0.1 % if more)."""
    packing: Flag = False
    """Put several examples, each trained as if it were alone, into a row of max_length tokens (with flash attention
    micro_batch_tokens)."""
    loss_on: LossOn = "answer"
    """What is learnt. answer: in a chat every turn of the assistant. last: only the last one. all: the prompt, too."""
    chat_template: Text | None = None
    """File with the chat template (Jinja) in place of the tokenizer's, in exports too (null: the tokenizer's own)."""
    template_kwargs: dict[Text, Any] = Field(default_factory=dict)
    """Variables of the chat template, such as {enable_thinking: false}."""
    cache: Text | None = None
    """Directory that keeps sources of 262,144 tokens and more; off: none (null: qdora/data in XDG_CACHE_HOME)."""
    validation_fraction: Share = 0.05
    """Share to cut off the end of a train split that has no validation split."""
    seed: Seed = 0
    """Seed of the order of the examples and of limit."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_streams(cls, given: Any) -> Any:
        if (
            not isinstance(given, dict)
            or given.get("too_long")
            or not isinstance(given.get("mix"), list | tuple)
        ):
            return given
        sources = [dict(each) for each in given["mix"] if isinstance(each, dict | Section)]
        return (
            given | {"too_long": "truncate"} if any(each.get("stream") is True for each in sources) else given
        )

    @property
    def has_stream(self) -> bool:
        return any(source.stream for source in self.mix)
