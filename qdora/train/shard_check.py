"""Before the first step of a run whose base is divided: the same pass with some blocks gathered in another way.

A wrong byte in a gathered weight would train an adapter for a model that does not exist, at a plausible loss. So the
first, the middle and the last block are gathered whole, by a plain collective instead of torch's `fully_shard`, and
compared byte by byte, and then the loss and the gradient norm of a micro-batch, computed with both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from qdora.errors import RunFailure
from qdora.model.inject import adapted_layers, frozen_layers
from qdora.model.load import block_list
from qdora.nn.frozen_linear import FrozenLinear
from qdora.nn.row_share import divided_tensors
from qdora.nn.shared_norms import prepare_shared_gains
from qdora.ops.tiles import Weight
from qdora.train.checkpoint import random_state, set_random_state
from qdora.train.distributed import Processes
from qdora.train.passes import batch_loss

_NUM_TOKENS = 32
# Relative differences allowed between two passes: sums on a GPU may have another order, and the norms of a block come
# from the rows of each process in one pass and from the whole weight in the other.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5}
_ROUNDING_16 = 5e-3


def check_division(model: PreTrainedModel, processes: Processes) -> str | None:
    """What was compared, in words; None if the base is not divided. All processes must call this together.

    Leaves the model, its gradients and the random generators as they were.

    Raises RunFailure: In all processes, if a process differs from another, or from the blocks that are gathered whole.
    """
    if not processes.shards:
        return None
    blocks = _some_blocks(model)
    random = random_state()
    try:
        divided = _pass(model)
        whole = {layer: layer.share.whole() for layer in _layers(blocks) if layer.share is not None}
        faults = _wrong_weights(model, blocks, whole)
        with _read_from(whole):
            gathered = _pass(model)
    except RuntimeError as error:
        raise processes.broken(error) from error
    finally:
        set_random_state(random)
    allowed = _ROUNDING.get(model.dtype, _ROUNDING_16)
    told = processes.gather((divided, gathered, faults))
    for rank, (theirs, others, wrong) in enumerate(told):
        pairs = (("blocks gathered whole", others), ("process 0", told[0][0]))
        wrong += [
            f"{what} {mine:.8g}, with {where} {other:.8g}"
            for where, values in pairs
            for what, mine, other in zip(("loss", "gradient norm"), theirs, values, strict=True)
            if not math.isclose(mine, other, rel_tol=allowed)
        ]
        if wrong:
            raise RunFailure(
                f"train.parallel: the base is not the same when it is divided: process {rank}: {wrong[0]}. "
                "Fix: train with train.parallel: replicate, and report it."
            )
    return (
        f"the divided base is the whole one: {len(whole)} layers of {len(blocks)} blocks byte by byte, and loss and "
        f"gradient norm of {_NUM_TOKENS} tokens ({divided[0]:.6g} and {divided[1]:.6g})."
    )


def _some_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The first, the middle and the last block."""
    found = block_list(model)
    assert found is not None, "a base is divided by blocks"
    blocks = list(found[1])
    return [blocks[index] for index in sorted({0, len(blocks) // 2, len(blocks) - 1})]


def _layers(blocks: Sequence[nn.Module]) -> list[FrozenLinear]:
    return [layer for block in blocks for layer in frozen_layers(block).values()]


def _pass(model: PreTrainedModel) -> tuple[float, float]:
    """Mean loss of random tokens, the same in all processes, and the norm of its gradient (0 without an adapter)."""
    torch.manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, _NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    parameters = [each for each in model.parameters() if each.requires_grad]
    mode = model.training
    model.train()
    for layer in adapted_layers(model).values():
        layer.parameters_changed()
    prepare_shared_gains(adapted_layers(model).values())
    given = ids.to(model.device)
    loss = batch_loss(model, given, torch.ones_like(given), ids).nll_sum / _NUM_TOKENS
    norm = 0.0
    if parameters:
        loss.backward()  # type: ignore[no-untyped-call]
        squares = [each.grad.double().square().sum() for each in parameters if each.grad is not None]
        norm = math.sqrt(float(torch.stack(squares).sum()))
        for parameter in parameters:
            parameter.grad = None
    model.train(mode)
    return float(loss.detach()), norm


def _wrong_weights(
    model: PreTrainedModel, blocks: Sequence[nn.Module], whole: dict[FrozenLinear, tuple[Weight, Tensor | None]]
) -> list[str]:
    """Layers whose tensors are not the same when torch gathers them."""
    names = {layer: name for name, layer in frozen_layers(model).items()}
    found = []
    for block in blocks:
        assert isinstance(block, FSDPModule)
        block.unshard()
        wrong = [layer for layer in _layers([block]) if layer in whole and not _same(layer, *whole[layer])]
        found += [f"{names[layer]} has other bytes" for layer in wrong]
        block.reshard()
    return found


def _same(layer: FrozenLinear, weight: Weight, keep_bits: Tensor | None) -> bool:
    mine, right = divided_tensors(layer.stored_weight, layer.keep_bits), divided_tensors(weight, keep_bits)
    return all(torch.equal(mine[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in right.items())


@contextmanager
def _read_from(whole: dict[FrozenLinear, tuple[Weight, Tensor | None]]) -> Iterator[None]:
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
