"""The sections `train`, `eval` and `interference` of a recipe: optimizer, schedule, checkpoints, evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict

from qdora.recipe.section import (
    AutoTokens,
    Factor,
    Flag,
    NotNegative,
    Positive,
    Section,
    Seed,
    Share,
    Text,
    Warmup,
    Whole,
    WholeOrZero,
)

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
    """Tokens, with padding, in one forward pass; a step accumulates as many passes as it needs. auto: 2,048, or
    data.max_length if that is larger."""
    parallel: Literal["auto", "replicate", "shard", "hybrid"] = "auto"
    """How several processes hold the frozen base (torchrun or accelerate launch). replicate: each all of it. shard:
    each its rows, and a block is gathered while it computes. hybrid: shard among the processes of a machine, replicate
    across machines. auto: shard if memory.budget is set and the base fits sharded but not whole, else replicate. One
    process holds all of it in any case. See the guide several-gpus."""
    optimizer: Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw", "paged_lion_8bit", "lion"] = "paged_adamw_8bit"
    """AdamW, or Lion (arXiv 2302.06675; needs an lr 3 to 10 times smaller), with 8-bit or 32-bit states. paged: on CUDA
    the states can move to host memory (QLoRA, arXiv 2305.14314, sec. 3). Magnitudes always have 32-bit states."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay of lora_A and lora_B (of all matrices with adapter.kind full). Magnitudes have none."""
    betas: tuple[Share, Share] | None = None
    """Decay rates of the two averages (null: [0.9, 0.999] for Adam, arXiv 1412.6980, sec. 2; [0.9, 0.99] for Lion,
    sec. 5)."""
    eps: Positive = 1e-8
    """Adam's epsilon. Adam, arXiv 1412.6980, sec. 2."""
    router_aux_loss: NotNegative = 0.0
    """Factor of the auxiliary loss that spreads a mixture's tokens evenly over its experts, added to the loss (0: off).
    The model itself was trained with the factor router_aux_loss_coef of its config.json. See the guide experts."""
    clip: Positive | None = 1.0
    """Largest norm of the whole gradient (null: no clipping)."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """What happens at a bad step: its loss or gradient is not finite, or its loss is a spike. A bad step is never
    applied, and its examples are kept in bad-steps/. stop: the run ends. skip: the run continues with the next step."""
    max_skips: Whole = 5
    """Bad steps in a row that may be skipped; at one more the run ends."""
    spike: Factor | None = None
    """A loss is a spike if it is more than this many times the median of the last 32 applied steps (at least 8)
    (null: no loss is a spike)."""
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


class EvalConfig(Section):
    """Evaluation during a training run; `qdora eval` evaluates afterwards."""

    tasks: tuple[Text, ...] | None = None
    """Names of sources in the mix to evaluate (null: all with validation data; []: no evaluation)."""
    limit: Whole | None = None
    """Most examples of each task (null: all)."""
    block: WholeOrZero | None = None
    """Which examples limit takes: block k has the k-th `limit` examples of a fixed random order, which starts again at
    its end (null: examples at even distances). A study gives each of its seeds a block of its own."""
    method: Literal["loglikelihood", "generate"] = "loglikelihood"
    """loglikelihood: score the given choices and answers. generate: in addition let the model write its answers, as in
    the DoRA paper (arXiv 2402.09353, sec. 5.1); only for tasks whose choices differ in one word."""
    every: Whole | None = None
    """Optimizer steps between evaluations (null: no evaluation during training)."""
    at_start: Flag = True
    """Evaluate before the first step, that is, the quantised base."""
    at_end: Flag = True
    """Evaluate after the last step."""
    best_by: Text | None = None
    """Choose the best of the evaluated steps by macro (the average over the tasks) or by the task of this name. Its
    checkpoint is kept and becomes adapter/ (null: adapter/ is the last step)."""
    best_metric: Literal["nll_per_token", "acc", "acc_norm"] = "nll_per_token"
    """Metric of best_by. nll_per_token: the lowest is best. acc, acc_norm: the highest is best; only for tasks with
    choices."""
    patience: Whole | None = None
    """End the run after this many evaluations in a row without improvement (null: never)."""


class InterferenceConfig(Section):
    """Measurement of tasks that pull the adapter in different directions. It does not change the training."""

    every: Whole | None = None
    """Optimizer steps between measurements of the cosines between the tasks' gradients, a multiple of eval.every
    (null: no measurement)."""
    examples: Annotated[int, Strict(), Field(ge=2)] = 16
    """Validation examples of each task to measure gradients on. Fewer are cheaper, but the cosines are noisier."""
