"""Frozen weights in the host's memory: streamed blocks, and the input embedding.

A step uses the blocks in one order forward and in the reverse order backward, where the recomputation of a checkpoint
and the backward pass of a block come one after the other and need one load. Two slots on the device take turns: one
holds the block in use, the other is filled with the one that comes next. Every block lies in one piece of pinned
memory, so a block is one copy. A layer's tensors are views of its block's slot, or of the host's piece while the block
is in no slot. Nothing is ever copied back.

The embedding of 128,256 words by 8,192 features takes 2.0 GiB; a micro-batch of 2,048 tokens reads 32 MiB of it.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qdora.adapter.layer import AdaptedLinear, FrozenLinear
from qdora.adapter.norms import refresh
from qdora.adapter.rows import HostEmbedding
from qdora.errors import RunFailure, UserError, first_line
from qdora.files.environment import available_memory_bytes
from qdora.model.checkpoint import Stored, StoredPacked, tied_weights
from qdora.model.inject import replace_module
from qdora.model.load import Loading, Quantization, block_list, iterate_quantized, place_dense, place_frozen
from qdora.quant.packed import PackedWeight, empty_packed, from_tensors

NUM_SLOTS = 2
"""Streamed blocks that are on the device at a time: one is read while the other is filled."""


class Ring:
    """Two slots in which the blocks of a model, in forward order, take turns, each block always in the same one.

    A checkpoint keeps the graph of the first forward pass, and with it the address of each weight. The backward pass
    reads there, so the recomputation must bring the block to the same place.
    """

    def __init__(self, num_blocks: int, engine: SlotCopies) -> None:
        self.num_blocks, self.engine = num_blocks, engine
        self._slots: list[int | None] = [None] * NUM_SLOTS
        self._current: int | None = None
        self._step = 1

    def use(self, block: int, *, turns_back: bool) -> None:
        """Bring a block before its use, and begin to bring the next one over the block used until now.

        `turns_back` says that a backward pass follows the last block, and not the next forward pass.
        """
        if block == self._current:
            return
        if self._current is not None:
            if abs(block - self._current) == 1:
                self._step = block - self._current
            self.engine.release(self.slot_of(self._current))
        self._current = block
        self._bring(block)
        slot = self.slot_of(block)
        self.engine.wait(slot)
        following = self._next(block, turns_back)
        if self.slot_of(following) != slot:
            self._bring(following)

    def slot_of(self, block: int) -> int:
        """The slot of a block."""
        return block % NUM_SLOTS

    def _bring(self, block: int) -> None:
        slot = self.slot_of(block)
        previous = self._slots[slot]
        if previous != block:
            self._slots[slot] = block
            self.engine.start(block, slot, previous)

    def _next(self, block: int, turns_back: bool) -> int:
        """The block that will be used after this one; itself if there is only one."""
        following = block + self._step
        if following == self.num_blocks:
            following = block - 1 if turns_back else 0
        elif following < 0:
            following = block + 1
        return following if 0 <= following < self.num_blocks else block


def interleaved(num_blocks: int, num_streamed: int) -> list[int]:
    """The streamed blocks, spread evenly among the resident ones, so that copies can hide behind all blocks' work.

    Raises ValueError if there are more of them than blocks.
    """
    if not 0 <= num_streamed <= num_blocks:
        raise ValueError(f"the streamed blocks must be 0 to {num_blocks}, got {num_streamed}.")
    return [(2 * index + 1) * num_blocks // (2 * num_streamed) for index in range(num_streamed)]


class Turns:
    """The streamed blocks of a causal LM, numbered by their turn, and the layers in them.

    It is the `residency` of these layers: it brings the block of a layer before the layer is read. `num_streamed`
    blocks are spread evenly among the others; None for all.

    Raises UserError: A model without a list of blocks, more blocks than it has.
    """

    def __init__(self, model: PreTrainedModel, num_streamed: int | None) -> None:
        found = block_list(model)
        if found is None:
            raise UserError(
                f"base.residency: must be device, since {model.config.model_type} has no list of blocks that can be "
                "checkpointed."
            )
        self._path, blocks = found
        self._blocks = list(blocks)
        count = len(blocks) if num_streamed is None else num_streamed
        if count > len(blocks):
            raise UserError(f"base.streamed_blocks: must be at most the model's {len(blocks)} blocks, got {count}.")
        self._turns = {block: turn for turn, block in enumerate(interleaved(len(blocks), count))}
        self._turn_of: dict[FrozenLinear, int] = {}
        self._ring: Ring | None = None

    def __len__(self) -> int:
        return len(self._turns)

    @property
    def blocks(self) -> list[nn.Module]:
        """The streamed blocks by their turn."""
        return [self._blocks[block] for block in self._turns]

    def of(self, name: str) -> int | None:
        """The turn of the block that contains a weight or layer; None if it is not in a streamed block."""
        index = name.removeprefix(f"{self._path}.").partition(".")[0]
        inside = name.startswith(f"{self._path}.") and index.isdecimal()
        return self._turns.get(int(index)) if inside else None

    def add(self, layer: FrozenLinear, turn: int) -> None:
        """Stream a layer with the block of a turn."""
        layer.residency = self
        self._turn_of[layer] = turn

    def start(self, engine: SlotCopies) -> None:
        """Stream from now on: each streamed block is brought before its forward pass."""
        self._ring = Ring(len(self), engine)
        for turn, block in enumerate(self.blocks):
            block.register_forward_pre_hook(partial(_enter, self._ring, turn))

    def use(self, layer: FrozenLinear) -> None:
        assert self._ring is not None
        self._ring.use(self._turn_of[layer], turns_back=False)


def _enter(ring: Ring, turn: int, _block: nn.Module, _args: Any) -> None:
    ring.use(turn, turns_back=torch.is_grad_enabled())


_ALIGNMENT = 256  # bytes; kernels read 16 at a time, and views need their dtype's


class CudaCopies:
    """Copies into `slots` on a stream of their own; events alone order them with the computation: no host waits."""

    def __init__(self, device: torch.device, slots: Sequence[Tensor]) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copied = [torch.cuda.Event() for _ in slots]  # type: ignore[no-untyped-call]
        self._released = [torch.cuda.Event() for _ in slots]  # type: ignore[no-untyped-call]
        for slot, target in enumerate(slots):
            # Queued kernels may still read the memory for earlier tensors, and the allocator must not reuse it during a
            # copy.
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
    """A block in one piece of memory, with the place of each tensor of each layer in it."""

    layout: dict[str, list[tuple[str, int, tuple[int, ...], torch.dtype]]] = field(default_factory=dict)
    num_bytes: int = 0
    host: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    layers: dict[str, FrozenLinear] = field(default_factory=dict)

    def add(self, path: str, weight: PackedWeight) -> None:
        """Make room for a layer."""
        entries = []
        for name, tensor in weight.tensors().items():
            entries.append((name, self.num_bytes, tuple(tensor.shape), tensor.dtype))
            self.num_bytes += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.layout[path] = entries

    def tensors(self, memory: Tensor, path: str) -> dict[str, Tensor]:
        """The tensors of a layer as views of `memory`, (at least num_bytes,) uint8."""
        found = {}
        for name, start, shape, dtype in self.layout[path]:
            size = torch.Size(shape).numel() * dtype.itemsize
            found[name] = memory[start : start + size].view(dtype).view(shape)
        return found


class HostResidency:
    """A `Placer` that keeps the packed blocks, or some of them, in pinned host memory.

    Training needs `memory.checkpointing`: a block must be in its slot for its backward pass, and only the recomputation
    brings it back. `sample` is the first block's piece and the first slot, (bytes,) uint8 each, for measurements.

    Args:
        num_streamed: How many blocks are streamed, spread evenly among those on the device; None for all.
        free_bytes: Returns the host memory that this process may take.
        copies: Makes the copies from the device and the slots.
    """

    def __init__(
        self,
        num_streamed: int | None = None,
        *,
        free_bytes: Callable[[], int] = available_memory_bytes,
        copies: Callable[[torch.device, Sequence[Tensor]], CudaCopies] = CudaCopies,
    ) -> None:
        self.num_streamed = num_streamed
        self.sample: tuple[Tensor, Tensor] | None = None
        self._make_copies = copies
        self._free_bytes = free_bytes

    @torch.no_grad()
    def __call__(self, load: Loading) -> None:
        """Put the weights into the model; the device never holds more of the blocks than in training.

        Raises UserError: A model without a list of blocks, more blocks than it has, too little host memory.
        """
        model, stored, layers, wanted, device = load.model, load.stored, load.layers, load.wanted, load.device
        turns = Turns(model, self.num_streamed)
        pieces = _pieces(stored, layers, wanted, turns)
        embeddings = (module.weight for module in model.modules() if isinstance(module, HostEmbedding))
        _pin(pieces, device, self._free_bytes(), sum(table.nbytes for table in embeddings))
        for done, (name, value) in enumerate(iterate_quantized(stored, layers, wanted, device), start=1):
            path, _, leaf = name.rpartition(".")
            turn = turns.of(name)
            if isinstance(value, PackedWeight) and turn is not None:
                piece = pieces[turn]
                held = piece.tensors(piece.host, path)
                for part, tensor in value.tensors().items():
                    held[part].copy_(tensor)
                layer = place_frozen(model, path, from_tensors(value.kind, value.shape, value.block_size, held))
                piece.layers[path] = layer
                turns.add(layer, turn)
            elif isinstance(value, PackedWeight):
                place_frozen(model, path, value.to(device))
            else:
                place_dense(model.get_submodule(path), leaf, value, device, load.dtype_of(name))
            del value
            if load.progress is not None:
                load.progress(done, len(stored))
        most = max((piece.num_bytes for piece in pieces), default=0)
        slots = [torch.empty(most, dtype=torch.uint8, device=device) for _ in range(NUM_SLOTS)]
        self.sample = pieces[0].host, slots[0]
        turns.start(SlotCopies(pieces, slots, self._make_copies(device, slots)))
        for block in turns.blocks:
            block.register_forward_pre_hook(_before_block)


class SlotCopies:
    """The copy engine: the layers of a block read its slot, until another block takes the slot."""

    def __init__(self, pieces: Sequence[Piece], slots: Sequence[Tensor], copies: CudaCopies) -> None:
        self.pieces, self.slots, self.copies = pieces, slots, copies
        self.wait, self.release = copies.wait, copies.release

    def start(self, block: int, slot: int, previous: int | None) -> None:
        if previous is not None:
            self._read_from(self.pieces[previous], self.pieces[previous].host)
        piece = self.pieces[block]
        self.copies.begin(piece.host, self.slots[slot][: piece.num_bytes], slot)
        self._read_from(piece, self.slots[slot])

    def _read_from(self, piece: Piece, memory: Tensor) -> None:
        """Let the layers of a block read from a slot, or from the host's memory."""
        # Outside of inference mode, whose tensors a training step could not use.
        with torch.inference_mode(False):
            for path, layer in piece.layers.items():
                layer._buffers.update(piece.tensors(memory, path))


def _pieces(stored: Mapping[str, Stored], layers: set[str], wanted: Quantization, turns: Turns) -> list[Piece]:
    """The layout of each streamed block, before any weight is read."""
    pieces = [Piece() for _ in range(len(turns))]
    for name, item in stored.items():
        path, _, leaf = name.rpartition(".")
        turn = turns.of(name)
        if turn is None or leaf != "weight":
            continue
        if isinstance(item, StoredPacked):
            form = (item.kind, (item.shape[0], item.shape[1]), item.block_size, item.double_quant)
        elif path in layers:
            form = (wanted.kind, (item.shape[0], item.shape[1]), wanted.block_size, wanted.double_quant)
        else:
            continue
        pieces[turn].add(path, empty_packed(*form, device="meta"))
    return pieces


def _pin(pieces: Sequence[Piece], device: torch.device, free: int, embedding_bytes: int) -> None:
    """Give every block its piece of host memory, of which the embedding takes bytes later. Raises UserError."""
    sizes = [piece.num_bytes for piece in pieces]
    short = f"base.residency: host: {len(pieces)} blocks need {sum(sizes) / 2**30:.1f} GiB of pinned host memory, "
    fix = ". Fix: lower base.streamed_blocks, or take a machine with more memory."
    if free < sum(sizes) + embedding_bytes:
        beside = f" beside the {embedding_bytes / 2**30:.1f} GiB of the embedding" if embedding_bytes else ""
        raise UserError(f"{short}and {free / 2**30:.1f} GiB are free for this process{beside}{fix}")
    try:
        memory = page_locked(sum(sizes), device)
    except (RuntimeError, OSError) as error:
        raise UserError(f"{short}and the system refuses them ({first_line(error)}){fix}") from error
    for piece, host in zip(pieces, torch.split(memory, sizes), strict=True):
        piece.host = host


class _PageLocked(mmap.mmap):
    """Memory that CUDA unlocks before it is unmapped: `__del__` comes before that, a weakref's callback after it."""

    address = 0
    """Where CUDA has locked it."""

    def __del__(self) -> None:
        if self.address and not sys.is_finalizing():
            with suppress(RuntimeError):  # CUDA after a fault, or in a process that was forked
                torch.cuda.synchronize()  # copies may be under way
                torch.cuda.cudart().cudaHostUnregister(self.address)  # type: ignore[no-untyped-call]


def page_locked(num_bytes: int, device: torch.device) -> Tensor:
    """(num_bytes,) uint8 of the host, from which a GPU copies while it computes; on the CPU ordinary memory.

    It takes these bytes and no more (torch rounds its pinned memory up to a power of two, and keeps what is freed), and
    they live as long as any tensor in them. Raises RuntimeError or OSError if the system refuses.
    """
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
    return locked


def _before_block(block: nn.Module, _args: Any) -> None:
    """Compute the block's norms with one wait of the host, and refuse a backward pass that could read another block."""
    recomputed = block.training and getattr(block, "gradient_checkpointing", False)
    if torch.is_grad_enabled() and not recomputed and any(p.requires_grad for p in block.parameters()):
        raise RunFailure(
            "base.residency: host: gradients without checkpointing would use another block's weights. Fix: train with "
            "memory.checkpointing, or compute without gradients."
        )
    refresh(module for module in block.modules() if isinstance(module, AdaptedLinear))


def obstacle(model: PreTrainedModel) -> str | None:
    """Why the embedding of `model` must be on the device, as the end of a sentence about it; None if it need not."""
    kind = type(model.get_input_embeddings())
    shared = {name for pair in tied_weights(model).items() for name in pair}
    if f"{_path(model)}.weight" in shared:
        return "is its output head as well, which computes on the device"
    return None if kind is nn.Embedding else f"does more than look up rows ({kind.__name__})"


def check_host_embedding(model: PreTrainedModel) -> None:
    """Raise UserError if the embedding of `model` cannot stay in the host's memory."""
    if (why := obstacle(model)) is not None:
        what = f"the embedding of {model.config.model_type} {why}"
        raise UserError(f"memory.host_embeddings: must be false, since {what}, got true.")


def keep_embedding_on_host(model: PreTrainedModel, device: torch.device) -> None:
    """Replace the input embedding of a model before its weights are read. Raises as `check_host_embedding`."""
    check_host_embedding(model)
    embedding: Any = model.get_input_embeddings()
    replace_module(model, _path(model), HostEmbedding(embedding.weight.detach(), device))


def _path(model: PreTrainedModel) -> str:
    embedding = model.get_input_embeddings()
    path: str = next(name for name, module in model.named_modules() if module is embedding)
    return path
