"""What a GPU keeps in the host's memory: frozen blocks, and the inputs of checkpointed blocks.

Two slots on the device take turns: one holds the block in use, the other is filled with the one that comes next. Every
block lies in one piece of pinned memory, so it is one copy; a layer's tensors are views of its block's slot, or of the
host's piece while the block is in no slot. Nothing is ever copied back.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from qdora.adapter.layer import AdaptedLinear, FrozenLinear
from qdora.adapter.norms import refresh
from qdora.errors import RunFailure, UserError, first_line
from qdora.files.machine import available_memory_bytes
from qdora.model.checkpoint import Stored, StoredPacked, StoredTensor
from qdora.model.load import Loading, blocks_of, place, place_all, place_frozen
from qdora.quant.packed import PackedWeight, empty_packed, from_tensors

NUM_SLOTS = 2  # one is read while the other is filled


def interleaved(num_blocks: int, num_streamed: int) -> list[int]:
    """The streamed blocks, spread evenly, so that copies hide behind all blocks' work."""
    return [(2 * index + 1) * num_blocks // (2 * num_streamed) for index in range(num_streamed)]


_ALIGNMENT = 256  # bytes; kernels read 16 at a time, and views need their dtype's


class CudaCopies:
    """Copies into `slots` on a stream of their own, ordered with the computation by events."""

    def __init__(self, device: torch.device, slots: Sequence[Tensor]) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copied = [torch.cuda.Event() for _ in slots]  # type: ignore[no-untyped-call]
        self._released = [torch.cuda.Event() for _ in slots]  # type: ignore[no-untyped-call]
        for slot, target in enumerate(slots):
            # Queued kernels may still read the memory, and the allocator must not reuse it during a copy.
            self.release(slot)
            target.record_stream(self.stream)

    def begin(self, source: Tensor, target: Tensor, slot: int) -> None:
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self._released[slot])
            target.copy_(source, non_blocking=True)
            self._copied[slot].record(self.stream)

    def wait(self, slot: int) -> None:
        torch.cuda.current_stream(self.device).wait_event(self._copied[slot])

    def release(self, slot: int) -> None:
        self._released[slot].record(torch.cuda.current_stream(self.device))


@dataclass
class Piece:
    """A block in one piece of memory; layout: path -> (name, first byte, shape, dtype) of each tensor."""

    layout: dict[str, list[tuple[str, int, tuple[int, ...], torch.dtype]]] = field(default_factory=dict)
    num_bytes: int = 0
    host: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    layers: dict[str, FrozenLinear] = field(default_factory=dict)

    def add(self, path: str, weight: PackedWeight) -> None:
        entries = self.layout[path] = []
        for name, tensor in weight.tensors().items():
            entries.append((name, self.num_bytes, tuple(tensor.shape), tensor.dtype))
            self.num_bytes += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT

    def tensors(self, memory: Tensor, path: str) -> dict[str, Tensor]:
        """The tensors of a layer as views of `memory`, (at least num_bytes,) uint8."""
        found = {}
        for name, start, shape, dtype in self.layout[path]:
            size = torch.Size(shape).numel() * dtype.itemsize
            found[name] = memory[start : start + size].view(dtype).view(shape)
        return found

    def read_from(self, memory: Tensor) -> None:
        """Let the layers read `memory`."""
        with torch.inference_mode(False):  # whose tensors a training step could not use
            for path, layer in self.layers.items():
                layer._buffers.update(self.tensors(memory, path))


class Turns:
    """The streamed blocks of a causal LM, and their pieces."""

    def __init__(self, model: PreTrainedModel, num_streamed: int | None) -> None:
        path, blocks = blocks_of(model, "base.residency: must be device")
        count = len(blocks) if num_streamed is None else num_streamed
        if count > len(blocks):
            raise UserError(
                f"base.streamed_blocks: must be at most the model's {len(blocks)} blocks, got {count}."
            )
        chosen = interleaved(len(blocks), count)
        self.blocks = [blocks[block] for block in chosen]
        self.pieces = {f"{path}.{block}": Piece() for block in chosen}

    def piece_of(self, name: str) -> Piece | None:
        """The piece of the block of a weight or layer; None if it is not streamed."""
        return next((piece for path, piece in self.pieces.items() if name.startswith(f"{path}.")), None)


@dataclass
class HostResidency:
    """A `Placer` that keeps the packed blocks, or some of them, in pinned host memory.

    Training needs `memory.checkpointing`: only the recomputation brings a block back for its backward pass.
    `num_streamed` blocks are spread evenly among those on the device; None streams all.
    """

    num_streamed: int | None = None
    free_bytes: Callable[[], int] = available_memory_bytes
    copies: Callable[[torch.device, Sequence[Tensor]], CudaCopies] = CudaCopies

    @torch.no_grad()
    def __call__(self, load: Loading) -> None:
        turns = Turns(load.model, self.num_streamed)
        for name, item in load.stored.items():
            piece, form = turns.piece_of(name), load.wanted if load.quantizes(name, item) else item
            if piece is not None and not isinstance(form, StoredTensor):
                shape = (item.shape[0], item.shape[1])
                packed = empty_packed(form.kind, shape, form.block_size, form.double_quant, "meta")
                if isinstance(item, StoredPacked) and item.scale_dtype is not None:
                    packed = replace(packed, absmax=packed.absmax.to(item.scale_dtype))
                piece.add(name.removesuffix(".weight"), packed)
        pieces = list(turns.pieces.values())
        _pin(pieces, load.device, self.free_bytes())

        def place_in_turn(load: Loading, name: str, item: Stored) -> None:
            path, piece = name.removesuffix(".weight"), turns.piece_of(name)
            if piece is None or path not in piece.layout:
                place(load, name, item)
                return
            value, held = load.read(name, item), piece.tensors(piece.host, path)
            assert isinstance(value, PackedWeight)
            for part, tensor in value.tensors().items():
                held[part].copy_(tensor)
            weight = from_tensors(value.kind, value.shape, value.block_size, held)
            piece.layers[path] = place_frozen(load.model, path, weight)

        place_all(load, place_in_turn)
        size = max(piece.num_bytes for piece in pieces)
        slots = [torch.empty(size, dtype=torch.uint8, device=load.device) for _ in range(NUM_SLOTS)]
        ring = Ring(pieces, slots, self.copies(load.device, slots))
        for turn, block in enumerate(turns.blocks):
            block.register_forward_pre_hook(partial(_before_block, ring, turn))


class Ring:
    """Two slots in which the blocks of a model, in forward order, take turns, each block always in the same one.

    The graph of a checkpoint's first forward pass keeps the address of each weight, where the backward pass reads. It
    is the `residency` of the blocks' layers, which read the slot of their block until another one takes it.
    """

    def __init__(self, pieces: Sequence[Piece], slots: Sequence[Tensor], copies: CudaCopies) -> None:
        self.pieces, self.slots, self.copies = pieces, slots, copies
        self._turn_of = {layer: turn for turn, piece in enumerate(pieces) for layer in piece.layers.values()}
        for layer in self._turn_of:
            layer.residency = self
        self._held: list[int | None] = [None] * NUM_SLOTS
        self._current: int | None = None
        self._step = 1

    def use(self, layer: FrozenLinear) -> None:
        self.enter(self._turn_of[layer], turns_back=False)

    def enter(self, block: int, *, turns_back: bool) -> None:
        """Bring a block before its use, and begin to bring the next one over the block used until now.

        `turns_back`: a backward pass follows the last block, not the next forward pass.
        """
        if block == self._current:
            return
        if self._current is not None:
            if abs(block - self._current) == 1:
                self._step = block - self._current
            self.copies.release(self._current % NUM_SLOTS)
        self._current = block
        self._bring(block)
        self.copies.wait(block % NUM_SLOTS)
        following, last = block + self._step, len(self.pieces) - 1
        if following > last:
            following = block - 1 if turns_back else 0
        elif following < 0:
            following = min(1, last)
        if following >= 0 and (following - block) % NUM_SLOTS:
            self._bring(following)

    def _bring(self, block: int) -> None:
        slot, piece = block % NUM_SLOTS, self.pieces[block]
        previous, self._held[slot] = self._held[slot], block
        if previous == block:
            return
        if previous is not None:
            self.pieces[previous].read_from(self.pieces[previous].host)
        self.copies.begin(piece.host, self.slots[slot][: piece.num_bytes], slot)
        piece.read_from(self.slots[slot])


class _PageLocked(mmap.mmap):
    """Memory that CUDA unlocks before it is unmapped: `__del__` comes before that, a weakref's callback after it."""

    address = 0  # where CUDA has locked it

    def __del__(self) -> None:
        if self.address and not sys.is_finalizing():
            with suppress(RuntimeError):  # CUDA after a fault, or in a process that was forked
                torch.cuda.synchronize()  # copies may be under way
                torch.cuda.cudart().cudaHostUnregister(self.address)  # type: ignore[no-untyped-call]


def _pin(pieces: Sequence[Piece], device: torch.device, free: int) -> None:
    """Give every block its piece of host memory, from which a GPU copies while it computes; on the CPU ordinary memory.

    torch would round its pinned memory up to a power of two, and keep what is freed.
    """
    sizes = [piece.num_bytes for piece in pieces]
    num_bytes = sum(sizes)
    needed = f"base.streamed_blocks: {num_bytes / 2**30:.2f} GiB of pinned host memory are needed"
    if free < num_bytes:  # beyond its limit, a container's process would be ended by SIGKILL
        raise RunFailure(f"{needed}, and {free / 2**30:.2f} GiB are free.")
    try:
        memory = _PageLocked(-1, num_bytes, mmap.MAP_PRIVATE)
        locked = torch.frombuffer(memory, dtype=torch.uint8)
        if device.type != "cpu":
            cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            answer = cuda.cudaHostRegister(locked.data_ptr(), num_bytes, 0)
            if int(answer) != 0:
                with suppress(RuntimeError):
                    torch.ones(1, device=device)  # CUDA reports the refusal again, to the next kernel
            torch.cuda.check_error(answer)
            memory.address = locked.data_ptr()
    except (RuntimeError, OSError) as error:
        raise RunFailure(f"{needed}, which the system refuses ({first_line(error)}).") from error
    for piece, host in zip(pieces, torch.split(locked, sizes), strict=True):
        piece.host = host


def _before_block(ring: Ring, turn: int, block: nn.Module, _args: Any) -> None:
    """Bring the block, compute its norms at once, and refuse a backward pass that could read another block."""
    ring.enter(turn, turns_back=torch.is_grad_enabled())
    recomputed = block.training and getattr(block, "gradient_checkpointing", False)
    if torch.is_grad_enabled() and not recomputed and any(p.requires_grad for p in block.parameters()):
        raise RunFailure(
            "base.residency: host: gradients without checkpointing would use another block's weights."
        )
    refresh(module for module in block.modules() if isinstance(module, AdaptedLinear))


_LEAST_BYTES = 1 << 16  # smaller inputs are masks and positions


def offload_activations(model: PreTrainedModel) -> None:
    """Keep the inputs of a model's checkpointed blocks in pinned host memory, but the last, which is read at once.

    The stream that computes copies, too, so that the host never waits; a copy takes a few percent of a block's time.
    """
    _, blocks = blocks_of(model, "memory.offload_activations: must be false")
    for block in blocks[:-1]:
        plain: Any = block._gradient_checkpointing_func
        block._gradient_checkpointing_func = partial(_offloaded, plain)  # type: ignore[assignment]


def _offloaded(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with saved_tensors_hooks(_to_host, lambda saved: saved[1].to(saved[0], non_blocking=True)):
        return plain(*args, **kwargs)


def _to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    """Where a tensor comes from, and what is kept of it."""
    tensor, device = tensor.detach(), tensor.device
    if tensor.nbytes < _LEAST_BYTES or not tensor.is_floating_point():
        return device, tensor
    if device.type != "cpu" and available_memory_bytes() < tensor.nbytes:  # the system would end the process
        raise RunFailure("memory.offload_activations: too little host memory is free.")
    try:
        held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=device.type != "cpu")
    except RuntimeError as error:  # its words are those of a full GPU
        why = f"the system refuses pinned host memory ({first_line(error)})"
        raise RunFailure(f"memory.offload_activations: {why}.") from error
    return device, held.copy_(tensor, non_blocking=True)
