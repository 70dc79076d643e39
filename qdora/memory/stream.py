"""What a GPU keeps in the host's memory: frozen blocks, and the inputs of checkpointed blocks.

Two slots on the device take turns: one holds the block in use, the other is filled with the one that comes next. Every
block lies in one piece of pinned memory, so it is one copy; a layer's tensors are views of its block's slot, or of the
host's piece while the block is in no slot. Nothing is ever copied back.

A checkpoint keeps one tensor a block, its input. It is copied out while the block computes, and back during the
backward pass of the block behind it; the device holds the last two or three.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
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
from qdora.model.checkpoint import Stored, StoredPacked
from qdora.model.load import Loading, block_list, place, place_all, place_frozen
from qdora.quant.packed import PackedWeight, empty_packed, from_tensors

NUM_SLOTS = 2  # one is read while the other is filled


class Ring:
    """Two slots in which the blocks of a model, in forward order, take turns, each block always in the same one.

    The graph of a checkpoint's first forward pass keeps the address of each weight, where the backward pass reads.
    """

    def __init__(self, num_blocks: int, engine: SlotCopies) -> None:
        self.num_blocks, self.engine = num_blocks, engine
        self._slots: list[int | None] = [None] * NUM_SLOTS
        self._current: int | None = None
        self._step = 1

    def use(self, block: int, *, turns_back: bool) -> None:
        """Bring a block before its use, and begin to bring the next one over the block used until now.

        `turns_back`: a backward pass follows the last block, not the next forward pass.
        """
        if block == self._current:
            return
        if self._current is not None:
            if abs(block - self._current) == 1:
                self._step = block - self._current
            self.engine.release(self.slot_of(self._current))
        self._current = block
        self._bring(block)
        self.engine.wait(self.slot_of(block))
        following = block + self._step
        if following == self.num_blocks:
            following = block - 1 if turns_back else 0
        elif following < 0:
            following = block + 1
        if 0 <= following < self.num_blocks and self.slot_of(following) != self.slot_of(block):
            self._bring(following)

    def slot_of(self, block: int) -> int:
        return block % NUM_SLOTS

    def _bring(self, block: int) -> None:
        slot = self.slot_of(block)
        previous, self._slots[slot] = self._slots[slot], block
        if previous != block:
            self.engine.start(block, slot, previous)


def interleaved(num_blocks: int, num_streamed: int) -> list[int]:
    """The streamed blocks, spread evenly, so that copies hide behind all blocks' work."""
    return [(2 * index + 1) * num_blocks // (2 * num_streamed) for index in range(num_streamed)]


class Turns:
    """The streamed blocks of a causal LM, numbered by their turn; `residency` of the layers in them."""

    def __init__(self, model: PreTrainedModel, num_streamed: int | None) -> None:
        found = block_list(model)
        if found is None:
            raise UserError(f"base.residency: must be device, since {model.config.model_type} has no list of blocks.")
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
        return [self._blocks[block] for block in self._turns]

    def of(self, name: str) -> int | None:
        """The turn of the block of a weight or layer; None if it is not streamed."""
        index = name.removeprefix(f"{self._path}.").partition(".")[0]
        inside = name.startswith(f"{self._path}.") and index.isdecimal()
        return self._turns.get(int(index)) if inside else None

    def add(self, layer: FrozenLinear, turn: int) -> None:
        layer.residency = self
        self._turn_of[layer] = turn

    def start(self, engine: SlotCopies) -> None:
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


class HostResidency:
    """A `Placer` that keeps the packed blocks, or some of them, in pinned host memory.

    Training needs `memory.checkpointing`: only the recomputation brings a block back for its backward pass.
    `num_streamed` blocks are spread evenly among those on the device; None streams all. `sample`: the first block's
    piece and the first slot, (bytes,) uint8, for measurements.
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
        model, device = load.model, load.device
        turns = Turns(model, self.num_streamed)
        pieces = [Piece() for _ in range(len(turns))]
        for name, item in load.stored.items():
            path, turn = name.removesuffix(".weight"), turns.of(name)
            if turn is None:
                continue
            if load.quantizes(name, item):
                kind, block_size, double_quant = load.wanted.kind, load.wanted.block_size, load.wanted.double_quant
            elif isinstance(item, StoredPacked):
                kind, block_size, double_quant = item.kind, item.block_size, item.double_quant
            else:
                continue
            shape = (item.shape[0], item.shape[1])
            pieces[turn].add(path, empty_packed(kind, shape, block_size, double_quant, "meta"))
        _pin(pieces, device, self._free_bytes())

        def place_in_turn(load: Loading, name: str, item: Stored) -> None:
            path, turn = name.removesuffix(".weight"), turns.of(name)
            if turn is None or path not in pieces[turn].layout:
                place(load, name, item)
                return
            value, held = load.read(name, item), pieces[turn].tensors(pieces[turn].host, path)
            assert isinstance(value, PackedWeight)
            for part, tensor in value.tensors().items():
                held[part].copy_(tensor)
            layer = place_frozen(model, path, from_tensors(value.kind, value.shape, value.block_size, held))
            pieces[turn].layers[path] = layer
            turns.add(layer, turn)

        place_all(load, place_in_turn)
        most = max((piece.num_bytes for piece in pieces), default=0)
        slots = [torch.empty(most, dtype=torch.uint8, device=device) for _ in range(NUM_SLOTS)]
        self.sample = pieces[0].host, slots[0]
        turns.start(SlotCopies(pieces, slots, self._make_copies(device, slots)))
        for block in turns.blocks:
            block.register_forward_pre_hook(_before_block)


class SlotCopies:
    """The engine: the layers of a block read its slot, until another block takes the slot."""

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
        # Outside of inference mode, whose tensors a training step could not use.
        with torch.inference_mode(False):
            for path, layer in piece.layers.items():
                layer._buffers.update(piece.tensors(memory, path))


def _pin(pieces: Sequence[Piece], device: torch.device, free: int) -> None:
    """Give every block its piece of host memory."""
    sizes = [piece.num_bytes for piece in pieces]
    short = f"base.residency: host: {len(pieces)} blocks need {sum(sizes) / 2**30:.1f} GiB of pinned host memory, and"
    if free < sum(sizes):
        raise UserError(f"{short} {free / 2**30:.1f} GiB are free. Fix: lower base.streamed_blocks.")
    try:
        memory = page_locked(sum(sizes), device)
    except (RuntimeError, OSError) as error:
        refused = f"the system refuses them ({first_line(error)})"
        raise UserError(f"{short} {refused}. Fix: lower base.streamed_blocks.") from error
    for piece, host in zip(pieces, torch.split(memory, sizes), strict=True):
        piece.host = host


class _PageLocked(mmap.mmap):
    """Memory that CUDA unlocks before it is unmapped: `__del__` comes before that, a weakref's callback after it."""

    address = 0  # where CUDA has locked it

    def __del__(self) -> None:
        if self.address and not sys.is_finalizing():
            with suppress(RuntimeError):  # CUDA after a fault, or in a process that was forked
                torch.cuda.synchronize()  # copies may be under way
                torch.cuda.cudart().cudaHostUnregister(self.address)  # type: ignore[no-untyped-call]


def page_locked(num_bytes: int, device: torch.device) -> Tensor:
    """(num_bytes,) uint8 of the host, from which a GPU copies while it computes; on the CPU ordinary memory.

    torch would round its pinned memory up to a power of two, and keep what is freed.
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
    """Compute the block's norms at once, and refuse a backward pass that could read another block."""
    recomputed = block.training and getattr(block, "gradient_checkpointing", False)
    if torch.is_grad_enabled() and not recomputed and any(p.requires_grad for p in block.parameters()):
        raise RunFailure("base.residency: host: gradients without checkpointing would use another block's weights.")
    refresh(module for module in block.modules() if isinstance(module, AdaptedLinear))


_LEAST_BYTES = 1 << 16  # smaller inputs are masks and positions
_PAGE_BYTES = 1 << 21  # 80 microseconds of copying; a block's input takes 16 MiB at 2,048 tokens of width 4,096
_PAGES_AT_ONCE = 8
_MOST_LEAVING = 2  # tensors that are being copied out: copies have as long as two blocks compute


class PinnedPages:
    """Pinned host memory in pages of one size, which serve tensors of any shape.

    A pool per shape would hold the need of every length of micro-batch at once.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, num_bytes: int) -> list[Tensor]:
        """Pages (_PAGE_BYTES,) uint8 that hold `num_bytes` together."""
        count = math.ceil(num_bytes / _PAGE_BYTES)
        while len(self._free) < count:
            self._free += torch.split(_pinned(_PAGE_BYTES * _PAGES_AT_ONCE), _PAGE_BYTES)
        pages = self._free[-count:]
        del self._free[-count:]
        return pages

    def give(self, pages: list[Tensor]) -> None:
        self._free += pages


def pages_bytes(num_bytes: int, count: int) -> int:
    """Pinned memory that `PinnedPages` takes for `count` tensors of `num_bytes` at once."""
    pages = count * math.ceil(num_bytes / _PAGE_BYTES)
    return math.ceil(pages / _PAGES_AT_ONCE) * _PAGES_AT_ONCE * _PAGE_BYTES


def _pinned(num_bytes: int) -> Tensor:
    reason = "too little is free"  # beyond its limit, a container's process would be ended by SIGKILL
    if available_memory_bytes() >= num_bytes:
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            reason = first_line(error)
    size = num_bytes / 2**20
    raise RunFailure(f"memory.offload_activations: the system refuses {size:.0f} MiB of pinned host memory ({reason}).")


def _copy(target: Iterable[Tensor], source: Iterable[Tensor]) -> None:
    """Begin to copy; a page may be longer than the last piece."""
    for into, out_of in zip(target, source, strict=True):
        size = min(into.numel(), out_of.numel())
        into[:size].copy_(out_of[:size], non_blocking=True)


class CudaHost:
    """Pinned pages for tensors of `device`, and a stream on which tensors go out and come back in call order.

    The stream that computes waits for a copy before it gives away memory that the copy uses. With `record_stream` a
    host that runs ahead would take new memory for each block.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pages = PinnedPages()
        self.leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()  # being copied out, and the ends of the copies

    @property
    def computing(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def __call__(self, tensor: Tensor) -> Away:
        """Begin to copy a tensor out."""
        flat = tensor.reshape(-1)  # a copy if it is not contiguous
        pages = self.pages.take(flat.nbytes)
        self.stream.wait_stream(self.computing)
        left = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self.stream):
            _copy(pages, torch.split(flat.view(torch.uint8), _PAGE_BYTES))
            left.record(self.stream)
        self.leaving.append((flat, left))
        self.let_go(_MOST_LEAVING)
        return Away(self, pages, tensor.shape, tensor.dtype)

    def let_go(self, most: int) -> None:
        """Free the memory of all but the last tensors that are being copied out."""
        while len(self.leaving) > most:
            self.computing.wait_event(self.leaving.popleft()[1])


class Away:
    """A tensor on the host, or on its way there or back."""

    def __init__(self, host: CudaHost, pages: list[Tensor], shape: torch.Size, dtype: torch.dtype) -> None:
        self.host, self.pages, self.shape, self.dtype = host, pages, shape, dtype
        self.back: Tensor | None = None
        self.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def fetch(self) -> None:
        if self.back is None:
            self.back = torch.empty(self.shape, dtype=self.dtype, device=self.host.device)
            self.host.stream.wait_stream(self.host.computing)  # it may still use what was in this memory
            with torch.cuda.stream(self.host.stream):
                _copy(torch.split(self.back.view(-1).view(torch.uint8), _PAGE_BYTES), self.pages)
                self.arrived.record(self.host.stream)

    def take(self) -> Tensor:
        """The tensor on the device, for later work; only once."""
        self.fetch()
        back = self.back
        assert back is not None
        self._end()
        return back

    def _end(self) -> None:
        if self.back is not None:
            self.host.computing.wait_event(self.arrived)
            self.host.let_go(0)
            self.back = None
        self.host.pages.give(self.pages)  # the next tensor is copied into them on the same stream, behind this one
        self.pages = []

    def __del__(self) -> None:
        if self.pages:  # a pass that was broken off takes nothing back
            self._end()


class ActivationOffload:
    """Keeps the inputs of a model's checkpointed blocks in the host's memory, but the last, which is read at once."""

    def __init__(self, model: PreTrainedModel, send: Callable[[Tensor], Away] | None = None) -> None:
        blocks = block_list(model)
        if blocks is None:
            why = f"{model.config.model_type} has no list of blocks"
            raise UserError(f"memory.offload_activations: must be false, since {why}.")
        self._send = send or CudaHost(model.device)
        self._sent: dict[int, list[Away]] = {}  # block -> its input, until it is taken
        for index, block in enumerate(list(blocks[1])[:-1]):
            plain: Any = block._gradient_checkpointing_func
            block._gradient_checkpointing_func = partial(self._checkpoint, index, plain)  # type: ignore[assignment]

    def _checkpoint(self, block: int, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def out(tensor: Tensor) -> Tensor | list[Away]:
            if tensor.nbytes < _LEAST_BYTES or not tensor.is_floating_point():
                return tensor
            self._sent.pop(block, None)  # gives its pages back if its pass was broken off
            sent = self._sent[block] = [self._send(tensor.detach())]
            return sent

        def back(sent: Tensor | list[Away]) -> Tensor:
            if isinstance(sent, Tensor):
                return sent
            if not sent:
                raise RunFailure("memory.offload_activations: a graph allows only one backward pass.")
            tensor = sent.pop().take()
            for before in self._sent.get(block - 1, ()):
                before.fetch()
            return tensor

        with saved_tensors_hooks(out, back):
            return plain(*args, **kwargs)
