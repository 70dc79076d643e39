"""`train.compile`: the blocks of a model compiled by `torch.compile`, one code for all like blocks and all lengths.

Norms, rotary embedding, attention's reshapes and the MLP's activation become fused kernels; the products of the layers
stay what they are (`ops.opaque_product`).

The compiled region is the forward pass of a block inside of its checkpoint. So the recomputation, too, first does what
only Python can: it brings streamed weights, takes the operands that the layers keep for a step, restores the random
generators. Evaluation and generation run the blocks as they are: their results are those of the exported model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.decorators import mark_unbacked, maybe_mark_dynamic
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, TorchDynamoException
from torch._functorch import config as functorch_config
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qdora.errors import UserError, first_line
from qdora.model.experts import stacks
from qdora.model.load import block_list
from qdora.nn.adapted_linear import AdaptedLinear
from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops.frozen_product import product_dtype
from qdora.ops.opaque_product import opaque_weight, stand_ins

BACKEND: Any = "inductor"
# transformers checkpoints a block in its `forward`, or before 5.2x in its `__call__`.
_FORWARD_CHECKPOINTS = "__call__" not in vars(GradientCheckpointingLayer)

logger = logging.getLogger("qdora")


@contextmanager
def compiled_blocks(model: PreTrainedModel, backend: Any = None) -> Iterator[None]:
    """Inside, the blocks of `model` train compiled. Names and parameters stay as they are.

    The first steps compile: once, or twice where some micro-batches have an attention mask and others have none; again
    where only some blocks are streamed. If torch cannot compile a kind of block or its gradient, a warning says so and
    it runs as it is. On leaving, all of torch's compiled code is dropped.

    Args:
        backend: Of torch.compile; None: `BACKEND`.
    Raises UserError: A model without a list of blocks, or with stacks of experts, whose products depend on how the
        tokens divide.
    """
    kind, found = model.config.model_type, block_list(model)
    if found is None:
        raise UserError(f"train.compile: must be false, since {kind} has no list of blocks.")
    if stacks(model):
        raise UserError(f"train.compile: must be false, since {kind} has experts, which torch.compile cannot compile.")
    blocks = list(found[1])
    regions = {plain: _Region(plain, backend or BACKEND) for plain in set(map(_plain_forward, blocks))}
    for block in blocks:
        block.forward = CompiledBlock(block, regions[_plain_forward(block)])
    try:
        # A gradient is compiled with its block: in the backward pass it would be too late to run the block as it is.
        with functorch_config.patch(force_non_lazy_backward_lowering=True):
            yield
    finally:
        for block in blocks:
            del block.forward
        torch.compiler.reset()  # the codes of a process count together, and there may be another run


def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile needs and this machine does not have, with a fix; None if nothing is missing."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "a C++ compiler. Fix: install g++, or set the variable CXX"
        return None
    from torch.utils._triton import has_triton

    return None if has_triton() else "Triton for its GPU. Fix: pip install triton"


def _plain_forward(block: nn.Module) -> Callable[..., Any]:
    """The forward method of a block's class without transformers' checkpointing around it."""
    forward: Any = type(block).forward
    plain: Callable[..., Any] = forward.__wrapped__ if _FORWARD_CHECKPOINTS else forward
    return plain


class _Region:
    """The forward pass of a class of blocks, as it is and compiled; whether some block could not be compiled."""

    def __init__(self, plain: Callable[..., Any], backend: Any) -> None:
        self.plain = plain
        self.compiled = torch.compile(self._traced, fullgraph=True, backend=backend)
        self.has_failed = False

    def _traced(self, block: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        # All that the code may know of the number of rows.
        torch._check(hidden_states.shape[0] >= 1)  # type: ignore[no-untyped-call]
        return self.plain(block, hidden_states, *args, **kwargs)


class CompiledBlock:
    """The `forward` of a block.

    Attributes:
        runs_compiled: Whether its latest forward pass ran compiled. A checkpoint's recomputation does, too, and saves
            the same tensors, even if another block could not be compiled in the meantime.
    """

    def __init__(self, block: nn.Module, region: _Region) -> None:
        self.block: Any = block
        self.region = region
        self.adapted = [module for module in block.modules() if isinstance(module, AdaptedLinear)]
        bases = {id(layer.base) for layer in self.adapted}
        self.frozen = [each for each in block.modules() if isinstance(each, FrozenLinear) and id(each) not in bases]
        self.runs_compiled = False

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        block = self.block
        if not (block.training and torch.is_grad_enabled()):
            return type(block).forward(block, hidden_states, *args, **kwargs)
        if block.gradient_checkpointing and _FORWARD_CHECKPOINTS:
            return block._gradient_checkpointing_func(partial(self._run, **kwargs), hidden_states, *args)
        return self._run(hidden_states, *args, **kwargs)

    def _run(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        region = self.region
        is_recomputed = torch._C._current_graph_task_id() != -1
        if not is_recomputed:
            self.runs_compiled = not region.has_failed
        if self.runs_compiled:
            try:
                self._take_operands(product_dtype(hidden_states))
                given = self._with_gradient(hidden_states)
                _mark_lengths(given, (args, kwargs))
                return region.compiled(self.block, given, *args, **kwargs)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:  # torch has not run the block
                name = type(self.block).__name__
                why = first_line(error.inner_exception if isinstance(error, BackendCompilerFailed) else error)
                logger.warning("train.compile: blocks of %s run as they are, not compiled: %s", name, why)
                region.has_failed, self.runs_compiled = True, False
            finally:
                self._drop_operands()
        return region.plain(self.block, hidden_states, *args, **kwargs)

    def _take_operands(self, dtype: torch.dtype) -> None:
        """Give the layers what their operators take."""
        trained = [layer.trained_tensors() for layer in self.adapted]
        made = iter(stand_ins(*(tensor for tensors in trained for tensor in tensors)))
        for layer, tensors in zip(self.adapted, trained, strict=True):
            operands = layer.opaque_operands(dtype, [next(made) for _ in tensors])
            if layer.gate is not None:
                _mark_rank(operands.stand_ins[:2], operands.factors)
            layer.__dict__["opaque"] = operands  # past nn.Module's own way, which is slow
        for base in self.frozen:
            base.__dict__["opaque"] = opaque_weight(base.stored_weight, dtype)

    def _with_gradient(self, hidden_states: Tensor) -> Tensor:
        """The input as if it had a gradient: so the first block has the code of the others."""
        if hidden_states.requires_grad:
            return hidden_states
        made = [each for layer in self.adapted if layer.opaque is not None for each in layer.opaque.stand_ins]
        trained = next((each for each in made if each is not None and each.requires_grad), None)
        if trained is None:
            return hidden_states
        found: Tensor = _WithGradient.apply(hidden_states, trained)  # type: ignore[no-untyped-call, unused-ignore]
        return found

    def _drop_operands(self) -> None:
        for layer in (*self.adapted, *self.frozen):
            layer.__dict__["opaque"] = None


def _mark_lengths(hidden_states: Tensor, others: object) -> None:
    """Let torch compile for any number of rows and tokens, (rows, tokens, width), in all tensors that a block takes."""
    rows, length = hidden_states.shape[:2]
    mark_unbacked(hidden_states, 0, shape_id="rows")  # else one row has a code of its own
    maybe_mark_dynamic(hidden_states, 1)
    for tensor in tree_leaves(others):
        if not isinstance(tensor, Tensor):
            continue
        for dim, size in enumerate(tensor.shape):
            if dim == 0 and (tensor.ndim == 4 or size == rows > 1):  # (rows, heads, tokens, tokens)
                mark_unbacked(tensor, dim, shape_id="rows")
            elif dim > 0 and size == length:
                maybe_mark_dynamic(tensor, dim)


def _mark_rank(*factors: tuple[Tensor, Tensor]) -> None:
    """Let torch compile for any rank, (rank, in) and (out, rank): gates remove components."""
    for lora_A, lora_B in factors:
        mark_unbacked(lora_A, 0)
        mark_unbacked(lora_B, 1)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor, _trained: Tensor) -> Tensor:
        return x.detach()  # x itself would come back as a view, for which torch compiles other code

    @staticmethod
    def backward(_ctx: Any, *_grads: Tensor) -> tuple[None, None]:
        return None, None
