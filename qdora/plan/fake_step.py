"""A training step on fake tensors: the real layers, loss and optimizer run, and the bytes of each moment are noted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qdora.model.inject import adapted_layers, adapter_parameters
from qdora.nn.adapted_linear import prepare_gains
from qdora.plan.live_bytes import LiveBytes
from qdora.plan.plan_contents import (
    ADAPTERS,
    BACKWARD,
    CHECKPOINTS,
    FORWARD,
    GRADIENTS,
    LOSS,
    OPTIMIZER,
    OTHER,
    UPDATE,
    MicroBatchShape,
    Moment,
)
from qdora.train.optimizer import AdapterOptimizer, OptimizerName, groups_of
from qdora.train.output_head import head_nll, proposed_form, tapped


class StepRecorder:
    """Runs steps of a model and notes the peak of each part, by component.

    Args:
        model: On fake tensors, its adapters in place.
        blocks: Its decoder blocks.
        live: Active, as is the FakeTensorMode around it and `planned_on`.
        checkpointing: Whether the blocks' inputs are all that is kept of them.
    """

    def __init__(self, model: Any, blocks: Sequence[nn.Module], live: LiveBytes, *, checkpointing: bool) -> None:
        self.model, self.blocks, self.live = model, blocks, live
        self.parameters = adapter_parameters(model)
        self.moments: list[Moment] = []
        self._kept_as = CHECKPOINTS if checkpointing else FORWARD
        self._now: tuple[str, int | None] = ("forward", None)
        self._recording = False
        for parameter in self.parameters.values():
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda each: live.register(each.grad, GRADIENTS)
            )
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(self._entering(index), with_kwargs=True)

    def record(self, optimizer: AdapterOptimizer, shape: MicroBatchShape, chunk: int | None) -> None:
        """The moments of a later step, when states, gradients of an earlier micro-batch and norms are there.

        Args:
            optimizer: Over the model's trainable parameters.
            shape: The micro-batch.
            chunk: As `memory.loss_chunk`; None for auto.
        """
        layers = adapted_layers(self.model).values()
        with self.live.label(ADAPTERS):
            for layer in layers:
                layer.gain(self.model.dtype)
        self._make_gradients()
        optimizer.step(1e-4)
        optimizer.zero_grad()
        self.live.register(optimizer.state_tensors().values(), OPTIMIZER)
        with self._part("gains", None, ADAPTERS):
            prepare_gains(layers)
        if shape.accumulated:
            self._make_gradients()
        self._gradient(shape, chunk)
        with self._part("update", None, UPDATE):
            pass

    def _make_gradients(self) -> None:
        """As an earlier micro-batch leaves them."""
        for parameter in self.parameters.values():
            parameter.grad = torch.empty(parameter.shape, dtype=parameter.grad_dtype or parameter.dtype)
            self.live.register(parameter.grad, GRADIENTS)

    def _gradient(self, shape: MicroBatchShape, chunk: int | None) -> None:
        """One micro-batch forward and backward."""
        with self.live.label(OTHER):
            inputs, rows, columns, targets = fake_batch(shape)
        head = self.model.get_output_embeddings()
        with self._part("forward", None, FORWARD):
            self._recording = True
            with tapped(head, rows, columns, probing=False) as tap:
                self.model(**inputs, use_cache=False)
            self._recording = False
        with self._part("loss", None, LOSS):
            loss = head_nll(head, tap.hidden, targets, proposed_form(self.model.config), chunk).sum() / len(targets)
        with self._part("backward", len(self.blocks) - 1 if self.blocks else None, BACKWARD):
            loss.backward()  # type: ignore[no-untyped-call]
            del loss, tap

    @contextmanager
    def _part(self, phase: str, block: int | None, label: str) -> Iterator[None]:
        self.live.reset_peak()
        self._now = phase, block
        with self.live.label(label):
            yield
        self._note()

    def _note(self) -> None:
        self.moments.append(Moment(*self._now, dict(self.live.peak_by_label)))
        self.live.reset_peak()

    def _entering(self, index: int) -> Any:
        """A hook that notes a block's input, and the moments that end with it: before it, and its backward pass."""

        def enter(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._recording:  # the recomputation of a checkpoint
                return
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            self.live.register(hidden, self._kept_as)
            self._note()
            self._now = "forward", index
            if hidden.requires_grad and index > 0:
                hidden.register_hook(lambda _gradient: leave())  # type: ignore[no-untyped-call]

        def leave() -> None:
            self._note()
            self._now = "backward", index - 1

        return enter


def fake_batch(shape: MicroBatchShape) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """What a model is given of a micro-batch, and rows, columns and targets of its labelled positions."""
    ids = torch.zeros(shape.rows, shape.length, dtype=torch.int64)
    inputs = {"input_ids": ids}
    if shape.packed:
        inputs["position_ids"] = torch.zeros_like(ids)
    elif shape.masked:
        inputs["attention_mask"] = torch.zeros_like(ids)
    rows, columns, targets = (torch.zeros(shape.num_labels, dtype=torch.int64) for _ in range(3))
    return inputs, rows, columns, targets


def update_bytes(
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], name: OptimizerName, live: LiveBytes
) -> int:
    """What an update needs at its peak beside parameters, gradients and states.

    Args:
        shapes: Path -> shape and dtype of every trainable parameter of the whole model.
        name: Of the optimizer.
        live: Active, within a FakeTensorMode.
    """
    # Groups are updated one after the other, so the largest ones say it: of matrices, and of vectors.
    sizes = {path: torch.Size(shape).numel() for path, (shape, _) in shapes.items()}
    largest: dict[bool, list[str]] = {}
    for keys, is_matrix in groups_of({path: shape for path, (shape, _) in shapes.items()}):
        if sum(map(sizes.__getitem__, keys)) > sum(map(sizes.__getitem__, largest.get(is_matrix, []))):
            largest[is_matrix] = keys
    chosen = [path for keys in largest.values() for path in keys]
    parameters = {path: nn.Parameter(torch.empty(shapes[path][0], dtype=shapes[path][1])) for path in chosen}
    optimizer = AdapterOptimizer(parameters, name=name)
    for parameter in parameters.values():
        parameter.grad = torch.empty(parameter.shape, dtype=torch.float32)
    optimizer.step(1e-4)  # makes the states
    live.reset_peak()
    optimizer.scale_gradients_(optimizer.gradient_norm())
    optimizer.step(1e-4)
    return live.peak_bytes - live.live_bytes


def pageable_bytes(shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], name: OptimizerName) -> int:
    """What of the optimizer's states a driver can move to the host: those of large matrices."""
    sizes = [torch.Size(shape).numel() for shape, _ in shapes.values() if len(shape) >= 2]
    return sum(size for size in sizes if size >= _PAGED_ELEMENTS) * _PAGED_STATE_BYTES.get(name, 0)


# bitsandbytes pages only states of at least so many elements, and not the scales of 8-bit ones.
_PAGED_ELEMENTS = 100_000
_PAGED_STATE_BYTES = {"paged_adamw_8bit": 2, "paged_adamw_32bit": 8, "paged_lion_8bit": 1}
