"""Before the first step of a run whose base is divided: the loss, also with some blocks gathered in another way.

A wrong byte in a gathered weight would train an adapter for a model that does not exist, at a plausible loss. So the
first, the middle and the last block are also gathered by a plain collective instead of torch's `fully_shard`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qdora.adapter.frozen_linear import FrozenLinear
from qdora.adapter.row_share import divided_tensors
from qdora.adapter.shared_norms import prepare_shared_gains
from qdora.errors import RunFailure
from qdora.model.inject import adapted_layers, frozen_layers
from qdora.model.load import block_list
from qdora.quant.tiles import Weight
from qdora.train.distributed import Processes
from qdora.train.passes import batch_loss

_NUM_TOKENS = 32
# Relative differences allowed between two passes: sums on a GPU may have another order, and the norms of a block come
# from the rows of each process in one pass and from the whole weight in the other.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5}
_ROUNDING_16 = 5e-3


def check_division(model: PreTrainedModel, processes: Processes) -> str | None:
    """What was compared, in words; None if the base is not divided. All processes must call this together.

    Raises RunFailure in all processes if one has another loss, or another one than with the blocks gathered whole.
    """
    if not processes.shards:
        return None
    found = block_list(model)
    assert found is not None, "a base is divided by blocks"
    blocks = list(found[1])
    blocks = [blocks[index] for index in sorted({0, len(blocks) // 2, len(blocks) - 1})]
    layers = [layer for block in blocks for layer in frozen_layers(block).values()]
    try:
        mine = [_loss(model)]
        with _read_from({layer: layer.share.whole() for layer in layers if layer.share is not None}):
            mine.append(_loss(model))
    except RuntimeError as error:
        raise processes.broken(error) from error
    losses = processes.gather(mine)
    right = losses[0][1]
    for rank, theirs in enumerate(losses):
        if not all(math.isclose(loss, right, rel_tol=_ROUNDING.get(model.dtype, _ROUNDING_16)) for loss in theirs):
            raise RunFailure(
                f"train.parallel: the base is not the same when it is divided: process {rank} has a loss of "
                f"{theirs[0]:.8g}, and {theirs[1]:.8g} with blocks gathered whole, instead of {right:.8g}. "
                "Fix: train with train.parallel: replicate, and report it."
            )
    return f"a divided base and one with {len(blocks)} whole blocks have one loss, {right:.6g} on {_NUM_TOKENS} tokens."


@torch.no_grad()
def _loss(model: PreTrainedModel) -> float:
    """Mean loss of random tokens, the same in all processes, without dropout."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, _NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    layers, training = adapted_layers(model).values(), model.training
    model.eval()
    for layer in layers:
        layer.parameters_changed()
    prepare_shared_gains(layers)
    given = ids.to(model.device)
    loss = batch_loss(model, given, torch.ones_like(given), ids).nll_sum / _NUM_TOKENS
    model.train(training)
    return float(loss)


@contextmanager
def _read_from(whole: Mapping[FrozenLinear, tuple[Weight, Tensor | None]]) -> Iterator[None]:
    """Let layers read these weights in the block, as layers do whose base is not divided."""
    before = {layer: (dict(layer._buffers), layer.residency, layer.share) for layer in whole}
    try:
        for layer, (weight, keep_bits) in whole.items():
            layer.residency = layer.share = None
            layer._buffers.update(divided_tensors(weight, keep_bits))
        yield
    finally:
        for layer, (buffers, residency, share) in before.items():
            layer._buffers.update(buffers)
            layer.residency, layer.share = residency, share
