"""Repeated decoder blocks: measure a model with few of them, and extrapolate to all.

Models repeat a block, or a short sequence of blocks (such as five with a sliding window, one without). The live bytes
of a step are linear in the number of repetitions, so two measurements, of models that differ by one repetition, give
the bytes for any number.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qdora.plan.plan_contents import Moment

# Least number of blocks on either side of the place where repetitions are inserted, rounded up to whole periods. The
# first block of a model (its input needs no gradient) and the last one (the loss follows) differ from the others and
# must not be repeated. With a period of 2 or more, one period on each side is enough.
_KEPT_BLOCKS = 2
# Most blocks of another kind at the start (such as 1 to 3 dense ones before mixtures of experts).
_LONGEST_PREFIX = 8


@dataclass(frozen=True)
class BlockPattern:
    """prefix + period * repetitions + suffix, in numbers of blocks."""

    prefix: int
    period: int
    repetitions: int
    suffix: int

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole model."""
        return self.prefix + self.period * self.repetitions + self.suffix

    @property
    def num_kept(self) -> int:
        """Repetitions of the shorter model that is measured."""
        return _num_kept(self.period)

    def kept(self, repetitions: int) -> list[int]:
        """Numbers of the blocks of a model with this many repetitions, without the others in the middle."""
        front = self.prefix + (repetitions - self.num_kept // 2) * self.period
        back = self.suffix + self.num_kept // 2 * self.period
        return [*range(front), *range(self.num_blocks - back, self.num_blocks)]

    @property
    def insertion(self) -> int:
        """Number of blocks before the place where repetitions are inserted."""
        return self.prefix + self.num_kept // 2 * self.period


def _num_kept(period: int) -> int:
    return 2 * -(-_KEPT_BLOCKS // period)


def signature(block: nn.Module, kind: Any) -> Hashable:
    """Equal for blocks that need the same bytes: classes, shapes and dtypes inside them, and the attention's `kind`."""
    modules = tuple((name, type(each).__name__) for name, each in block.named_modules())
    parameters = tuple((name, tuple(each.shape), each.dtype) for name, each in block.named_parameters())
    return modules, parameters, kind


def find_pattern(signatures: Sequence[Hashable]) -> BlockPattern | None:
    """The pattern with the fewest blocks to measure; None if leaving blocks out saves nothing."""
    total = len(signatures)
    best, cost = None, total
    for prefix in range(min(total, _LONGEST_PREFIX + 1)):
        rest = signatures[prefix:]
        for period in range(1, len(rest) // 3 + 1):  # two periods are kept at least, and one is inserted
            repetitions, suffix = divmod(len(rest), period)
            measured = 2 * (prefix + _num_kept(period) * period + suffix) + period
            if repetitions <= _num_kept(period):
                continue
            if measured < cost and all(rest[at] == rest[at - period] for at in range(period, len(rest))):
                best, cost = BlockPattern(prefix, period, repetitions, suffix), measured
    return best


def keep_blocks_(model: Any, path: str, kept: Sequence[int]) -> None:
    """Keep only these blocks in a model, and their entries in every list of its config with one entry a block."""
    blocks = model.get_submodule(path)
    total = len(blocks)
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.ModuleList([blocks[index] for index in kept]))
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for config in configs.values():
        for name, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == total:
                setattr(config, name, [value[index] for index in kept])
        if getattr(config, "num_hidden_layers", None) == total:
            config.num_hidden_layers = len(kept)


def extrapolated(short: Sequence[Moment], longer: Sequence[Moment], pattern: BlockPattern) -> list[Moment]:
    """Extrapolate the moments of the whole model from those with `num_kept` repetitions and one more, in the order of
    a step.

    The repetitions in between have no moments: their live bytes lie between those of their neighbours. ValueError if
    the two do not have the same moments.
    """
    more = pattern.repetitions - pattern.num_kept
    found = {(moment.phase, moment.block): moment.by_component for moment in longer}
    drawn = []
    for moment in short:
        behind = moment.block is not None and moment.block >= pattern.insertion
        block = moment.block + pattern.period if behind and moment.block is not None else moment.block
        if (moment.phase, block) not in found:
            raise ValueError(f"no {moment.phase} of block {block} in the longer model")
        other = found[moment.phase, block]
        names = dict.fromkeys([*moment.by_component, *other])
        by_component = {
            name: moment.by_component.get(name, 0) + more * (other.get(name, 0) - moment.by_component.get(name, 0))
            for name in names
        }
        place = moment.block + more * pattern.period if behind and moment.block is not None else moment.block
        drawn.append(Moment(moment.phase, place, {name: size for name, size in by_component.items() if size}))
    return drawn
