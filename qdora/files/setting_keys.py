"""Settings by their dotted keys: a nested recipe as one level, and which settings a resumed run may change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

WITHOUT_EFFECT: tuple[str, ...] = ("base.cache", "base.residency", "base.streamed_blocks", "data.cache", "memory")
WITHOUT_EFFECT += ("trackers", "train.log_every", "train.checkpoint_every", "train.keep_checkpoints")
WITHOUT_EFFECT += ("train.micro_batch_tokens", "train.parallel")
"""Settings that do not decide what a run learns: how it fits into memory and what it writes."""

# What a resumed run may change. Learning rate, clipping and the treatment of bad steps and rows change the training's
# numbers: changing them gets a run past a bad step or row.
MAY_CHANGE: tuple[str, ...] = (*WITHOUT_EFFECT, "eval", "interference", "data.max_bad_rows", "model.attention")
MAY_CHANGE += ("train.lr", "train.clip", "train.on_bad_step", "train.max_skips", "train.spike")
# What it may raise: a finished or stopped run is extended.
MAY_RISE: tuple[str, ...] = ("train.steps", "train.epochs")


def is_below(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted setting is one of those named, or inside one: data.mix[0].limit is below data and data.mix."""
    return any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in names)


def flat(value: Any, prefix: str = "", separator: str = ".") -> dict[str, Any]:
    """{'train': {'lr': 1}} -> {'train.lr': 1}; a list is one value."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    start = f"{prefix}{separator}" if prefix else ""
    return {name: leaf for key, item in value.items() for name, leaf in flat(item, f"{start}{key}", separator).items()}
