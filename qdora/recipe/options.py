"""The options of the verbs that have many. Each field is a flag of the command line, and its docstring the help."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from qdora.errors import UserError, refuse
from qdora.recipe.section import Text, Whole, WholeOrZero, fault_lines, parse_size

GgufType = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q4_0", "q3_k_m", "q2_k"
]
CONVERTED: tuple[GgufType, ...] = get_args(GgufType)[:4]
"""Types that llama.cpp's converter writes; its quantiser makes the others from a file in f16."""
Dtype = Literal["float16", "bfloat16", "float32"]


def _file_size(value: str) -> str:
    # A number below 1,000 lacks its unit
    if not value.rstrip()[-1:].isalpha() or parse_size(value) < 1000:
        raise ValueError("must be at least 1KB and have a unit, such as 2GB")
    return value


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class Options(BaseModel):
    """What a verb is asked for. UserError lists all options that are wrong or have no effect."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    used_with: ClassVar[tuple[tuple[str, str, str], ...]] = ()
    """(options, another option, its values with which they have an effect; "": any that is given)."""
    not_with: ClassVar[tuple[tuple[str, str], ...]] = ()
    """(options, another option that excludes them)."""

    def __init__(self, **given: Any) -> None:
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise UserError(*(f"{flag(key)}: {what}" for key, what in fault_lines(error, given))) from None
        refuse(list(self.faults()))

    def has(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    def faults(self) -> Iterator[str]:
        for names, other, values in self.used_with:
            if not (getattr(self, other) in values.split() if values else self.has(other)):
                what = f"is used only with {flag(other)}"
                if values:
                    what += f" {values.replace(' ', ' or ')}, got {getattr(self, other)}"
                yield from (
                    f"{flag(name)}: {what}. Fix: remove it." for name in names.split() if self.has(name)
                )
        for names, other in self.not_with:
            both = [name for name in names.split() if self.has(name) and self.has(other)]
            yield from (
                f"{flag(name)}: is not used with {flag(other)}. Fix: remove one of them." for name in both
            )


class Changes(Options):
    """Changes of a recipe."""

    set: tuple[str, ...] = ()
    """KEY=VALUE: change one setting; repeatable."""


class TrainOptions(Changes):
    """How `qdora train` runs a recipe."""

    run_dir: Path | None = None
    """Directory of the run; default: runs/<recipe>."""
    resume: bool = False
    """Continue from the newest whole checkpoint."""
    force: bool = False
    """Start even if the plan exceeds memory.budget."""


class PlanOptions(Changes):
    """What `qdora plan` plans for."""

    budget: str | None = None
    """Memory that the run may use, such as 40GiB; default: memory.budget."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cuda or cpu; this machine need not have it."""
    processes: Whole = 1
    """Cards of the run, one process each; two or more need buffers of NCCL."""
    hosts: Whole = 1
    """Machines, which have equally many of these cards."""

    def faults(self) -> Iterator[str]:
        if self.processes % self.hosts:
            yield f"--hosts: got {self.hosts}, must divide --processes ({self.processes})."


class InitOptions(Options):
    """What `qdora init` writes."""

    model: str | None = None
    """A Hub id, a directory, a .gguf file or builtin; default: builtin, with a GPU Qwen/Qwen2.5-7B-Instruct."""
    out: Path = Path("mine.yaml")
    """Recipe to write."""
    columns: str | None = None
    """prompt=QUESTION,completion=ANSWER: what the columns mean, or text=COLUMN; for files that do not show it."""


class PreviewOptions(Changes):
    """What `qdora preview` shows."""

    number: WholeOrZero = 3
    """Examples of each source to show."""


class QuantizeOptions(Changes):
    """How `qdora quantize` quantises."""

    quant: str = "nf4"
    """Format of the linear layers: nf4, fp4 or int8."""
    method: str = "round"
    """round: to the nearest value, as bitsandbytes does; gptq: with compensated errors."""
    calibration: str | None = None
    """Text file on which gptq measures the layers."""


class StudyOptions(Changes):
    """What `qdora study` runs, and where."""

    dir: Path | None = None
    """Directory of the study; default: runs/studies/<name>."""
    vary: tuple[str, ...] = ()
    """KEY=A,B: compare these values of a setting; the first is the reference. Repeatable."""
    seeds: Whole | None = None
    """With --vary: number of seeds; default: 3."""
    rates: str | None = None
    """A,B,C: with --vary: learning rates to search."""
    retry_failed: bool = False
    """Run cells again that have used up their tries."""
    dry_run: bool = False
    """Check every cell, and print what would run and how long it takes."""
    jobs: Whole | None = None
    """Submit this many processes and end."""
    cluster: Literal["slurm", "local"] = "slurm"
    """Where --jobs run: slurm or local."""
    job_option: tuple[str, ...] = ()
    """KEY=VALUE: with --jobs: an option of submitit, such as timeout_min=600. Repeatable."""

    used_with: ClassVar = (("set seeds rates", "vary", ""), ("cluster job_option", "jobs", ""))
    not_with: ClassVar = (("retry_failed dry_run", "jobs"),)


class AtStep(Options):
    """Which checkpoint of a run is loaded."""

    step: int | None = None
    """Checkpoint step; default: the adapter, else the newest checkpoint."""


class Which(AtStep):
    """What is loaded of a run, an adapter or a bare model."""

    base_model: str | None = None
    """Base of an adapter; default: the one that its adapter_config.json names."""
    quant: str | None = None
    """Form of the base: nf4, fp4, int8, none, nf4-single, fp4-single; default: as trained or nf4, none for a model."""


class WhichOrBase(Which):
    """What is loaded of a run, an adapter or a bare model, perhaps without the adapter."""

    base: bool = False
    """Use the base of the run without its adapter."""

    not_with: ClassVar[tuple[tuple[str, str], ...]] = (("step", "base"),)


class ExportOptions(Which):
    """What `qdora export` writes."""

    format: Literal["merged", "peft", "nf4-lora", "base", "gguf", "gguf-lora"] = "merged"
    """merged: one dense model; nf4-lora: 4-bit base and LoRA; peft: the adapter; base: the base; gguf: a GGUF file;
    gguf-lora: that of the base, and a LoRA for it."""
    dtype: Dtype | None = None
    """float16, bfloat16 or float32. Default: the run's (nf4-lora), the source's (base), float16 (Gemma: bfloat16)."""
    base: Literal["dequantized", "original"] = "dequantized"
    """Weights to merge on: dequantized (the adapter was trained on them) or original."""
    requantize: bool = False
    """Quantise the merged model to 4 bits again."""
    shard_size: Annotated[str, AfterValidator(_file_size)] = "5GiB"
    """Largest weights file, such as 2GB."""
    push: str | None = None
    """Upload it to this repository of the Hub; a new one is private."""
    public: bool = False
    """Make the repository of --push public."""
    gguf_type: GgufType = "f16"
    """Type of the matrices, such as q8_0, q4_k_m or bf16."""
    llama_cpp: Path | None = None
    """Folder of llama.cpp; default: QDORA_LLAMA_CPP, then PATH."""

    used_with: ClassVar = (
        ("base", "format", "merged gguf"),
        ("requantize", "format", "merged"),
        ("dtype shard_size", "format", "merged nf4-lora base"),
        ("gguf_type llama_cpp", "format", "gguf gguf-lora"),
        ("requantize", "base", "dequantized"),
        ("public", "push", ""),
    )

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.push is not None:
            from huggingface_hub.errors import HFValidationError
            from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

            try:
                validate_repo_id(self.push)
            except HFValidationError as error:
                yield f"--push: got {self.push!r}. {str(error).partition(chr(10))[0]}"


class EvalOptions(WhichOrBase):
    """What `qdora eval` measures."""

    tasks: tuple[Text, ...] = ()
    """A source of the run or a built-in task; repeatable. With --data: the source that has the same format."""
    limit: Whole | None = None
    """Use at most this many examples of each task."""
    split: str | None = None
    """validation (default), test or train; with --data any split of it."""
    data: str | None = None
    """Score this data: a file, folder, pattern or Hub id; with commonsense tasks: folder of <task>/<split>.parquet."""
    text: tuple[Path, ...] = ()
    """Measure the perplexity of this text file; repeatable."""
    like: Path | None = None
    """For a model: use the data of this run."""
    method: Literal["loglikelihood", "generate"] | None = None
    """loglikelihood, or generate: also score generated answers. Default: eval.method of the run."""
    harness: tuple[Text, ...] = ()
    """Task, group or pattern of lm-evaluation-harness; repeatable."""
    harness_include: Path | None = None
    """Folder of further harness tasks in YAML. They may run code."""

    used_with: ClassVar = (("harness_include", "harness", ""),)


class GenerateOptions(WhichOrBase):
    """What `qdora generate` answers."""

    prompt: Annotated[str, Field(min_length=1)] | None = None
    """The user's text; - reads it from standard input."""
    chats: str | None = None
    """In place of --prompt: a data file of format messages or sharegpt."""
    system: str | None = None
    """System message, for models with a chat template."""
    raw: bool = False
    """Use the prompt as it is, without a chat template."""

    used_with: ClassVar = (("system raw", "prompt", ""),)
    not_with: ClassVar = (*WhichOrBase.not_with, ("chats", "prompt"), ("system", "raw"))

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.prompt is None and self.chats is None:
            yield "generate: needs --prompt or --chats."


class Sampling(Options):
    """How `qdora generate` chooses the next token."""

    max_new_tokens: Whole = 256
    """Stop after this many new tokens."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    """0 always takes the most likely token; otherwise the logits are divided by it."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most likely tokens up to this total probability."""
    top_k: Whole | None = None
    """Sample from this many of the most likely tokens."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the sampling."""

    def faults(self) -> Iterator[str]:
        if self.temperature == 0 and (self.has("top_p") or self.has("top_k")):
            yield "--top-p, --top-k: have no effect at temperature 0. Fix: add --temperature 0.7, or remove them."


class RankSettings(AtStep):
    """How `qdora rank` chooses."""

    method: Literal["curvature", "svd", "gates"] = "curvature"
    """curvature, svd (of the trained update), or gates (what the run's own gates chose)."""
    budget: str | None = None
    """Parameters of the factors of these layers: a number, or a share of the run's own; default: 100%."""
    max_rank: Whole | None = None
    """Largest rank of a layer; default: twice the largest rank of the run. svd finds no more than the layer's own."""
    draws: WholeOrZero = 16
    """Label samples per token for the curvature along each component (0: exact, slow)."""
    eigenvalues: WholeOrZero = 0
    """Also compute this many eigenvalues of the curvature by A and B (slow); they do not influence the ranks."""
    curvature: Literal["hessian", "gauss_newton"] = "hessian"
    """Matrix of --eigenvalues: hessian or gauss_newton."""
    norm: Literal["attached", "held"] = "attached"
    """DoRA's norm in worths and eigenvalues: attached (differentiated) or held (a constant)."""
    layers: tuple[Text, ...] = ()
    """Only these layers: name or pattern; repeatable. Others keep their rank."""
    examples: Whole = 64
    """Training examples to use, from the start of the run's mix."""
    micro_batch_tokens: Whole = 512
    """Tokens of a micro-batch, with padding. Eigenvalues and exact curvature take 8 MiB a token of a 135M model."""

    used_with: ClassVar = (
        ("budget max_rank layers", "method", "curvature svd"),
        ("examples micro_batch_tokens draws eigenvalues curvature norm", "method", "curvature"),
        ("curvature", "eigenvalues", ""),
    )

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if 0 < self.draws < 8:  # fewer tell the worth of a component too roughly
            yield f"--draws: got {self.draws}, must be 0 (exact) or at least 8."
        if self.method == "svd" and self.budget in (None, "100%"):
            yield f"--budget: got {self.budget or '100%'}, must be less than 100% with --method svd."
