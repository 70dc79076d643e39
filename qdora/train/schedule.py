"""The learning rate of each step: warm-up, then constant, linear or cosine."""

from __future__ import annotations

import math

from qdora.recipe.train_settings import TrainConfig


def learning_rate(step: int, num_steps: int, train: TrainConfig) -> float:
    """The learning rate of optimizer step `step`, 0 to num_steps - 1.

    Warm-up rises linearly and reaches `train.lr` at its last step. The rate then stays (constant) or falls to
    `train.lr_end`, linearly or along half a cosine (arXiv 1608.03983, without restarts). It would reach that end one
    step after the last, so no step is spent at rate 0.
    """
    warmup = math.ceil(train.warmup * num_steps) if isinstance(train.warmup, float) else train.warmup
    warmup = min(warmup, num_steps)
    if step < warmup:
        return train.lr * (step + 1) / warmup
    if train.schedule == "constant":
        return train.lr
    progress = (step - warmup) / max(1, num_steps - warmup)
    share = (1 - progress) if train.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return train.lr_end + (train.lr - train.lr_end) * share
