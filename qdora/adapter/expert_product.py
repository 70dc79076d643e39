"""Products of a stack of experts, in which each token meets the weight of its own expert only.

A stack is one weight, (experts * out, in): expert e has the rows e * out to (e + 1) * out. Tokens lie expert by expert.
Only experts that have tokens are dequantised. On a GPU several small experts share a launch, and each product where
torch has a kernel for it or they have equally many tokens (`padded_tokens`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qdora.adapter.algebra import Gain, rounded, row_factor, scaled_B
from qdora.adapter.dropout import drop_, dropped
from qdora.adapter.product import (
    FrozenMap,
    add_product_,
    column_dot,
    masked_factor_gradients,
    masked_input_gradient,
    masked_product,
    product_dtype,
    without_autocast,
)
from qdora.quant.codebooks import NESTED_BLOCK_SIZE
from qdora.quant.kernels import device_kind, is_planning
from qdora.quant.packed import TENSOR_NAMES, block_scales, packed_rows
from qdora.quant.tiles import Weight, dense_tiles, with_scales

# Bytes of the dense experts that share a launch on a GPU.
_RUN_BYTES = 64 << 20
# Columns times tokens of a sum over tokens on a GPU: 64 MiB of float32.
_ENTRIES_PER_SUM = 1 << 24
# Most rows of padding, as a fraction of the tokens of the experts that are padded to one count.
_MOST_PADDING = 0.25
# Experts out of order need copies of their codes: ordered by count where that saves more groups (11 launches each).
_WORTH_COPIES = 16


class CountsOnDevice(NamedTuple):
    """The numbers of an `ExpertTokens` on a device, of the experts with tokens, in the order of these."""

    counts: Tensor  # int64
    experts: Tensor  # int64: their numbers
    ends: Tensor  # int32: the token after the last one of each
    shifts: Tensor  # (all experts,) int64: see `padded_tokens`; empty without padding


class ExpertTokens:
    """How tokens divide among the experts: `counts[e]` of them, which lie together, belong to expert e.

    `routed` are the counts without padding, `experts` those that have tokens, in the order of these (default:
    ascending), `shifts` how far each expert's tokens lie behind their places in ascending order without padding.
    """

    def __init__(
        self,
        counts: Sequence[int],
        experts: Iterable[int] | None = None,
        shifts: Sequence[int] = (),
        routed: Sequence[int] | None = None,
    ) -> None:
        self.counts, self.shifts = tuple(counts), shifts
        self.routed = self.counts if routed is None else tuple(routed)
        self.experts = (
            tuple(e for e, count in enumerate(counts) if count) if experts is None else tuple(experts)
        )
        self._on_device: CountsOnDevice | None = None

    @cached_property
    def reached(self) -> tuple[Run, ...]:
        """Each expert that has tokens, as a run of its own."""
        return tuple(self.all_runs(1))

    @cached_property
    def whole(self) -> Run:
        """All experts that have tokens, as one run."""
        return next(self.all_runs(len(self.experts)))

    def all_runs(self, together: int) -> Iterator[Run]:
        """The experts that have tokens, `together` at a time."""
        token = 0
        for first in range(0, len(self.experts), together):
            some = self.experts[first : first + together]
            counts = tuple(self.counts[expert] for expert in some)
            yield Run(some, slice(token, token + sum(counts)), counts, self, first)
            token += sum(counts)

    def runs(self, together: int) -> Iterator[Run]:
        """`all_runs`; in a plan without those that need no more bytes."""
        before = deque[tuple[int, int, bool]](maxlen=2)
        for run in self.all_runs(together):
            if is_planning():
                sizes = len(run.experts), run.tokens.stop - run.tokens.start, run.is_consecutive
                # The second of two equal runs is needed: tensors of the first may still be alive in it.
                if before.count(sizes) == 2:
                    continue
                before.append(sizes)
            yield run

    def on(self, device: torch.device) -> CountsOnDevice:
        """The numbers on the device of the tokens, sent once from pinned memory, without a wait."""
        if self._on_device is None:
            reached = [self.counts[expert] for expert in self.experts]
            sizes = [*3 * [len(reached)], len(self.shifts)]
            numbers = torch.tensor([*reached, *self.experts, *accumulate(reached), *self.shifts])
            if device.type not in ("cpu", "meta"):
                numbers = numbers.pin_memory()
            counts, experts, ends, shifts = torch.split(numbers.to(device, non_blocking=True), sizes)
            self._on_device = CountsOnDevice(counts, experts, ends.int(), shifts)
        return self._on_device


@dataclass(eq=False)
class Run:
    """Experts with tokens, in the order of these, and their tokens, which lie together; `first` is the number of the
    first expert among all of `every` that have tokens."""

    experts: tuple[int, ...]
    tokens: slice
    counts: tuple[int, ...]
    every: ExpertTokens
    first: int
    _ends: Tensor | None = None

    @cached_property
    def is_consecutive(self) -> bool:
        """Whether these are neighbours in ascending order."""
        return self.experts == tuple(range(self.experts[0], self.experts[0] + len(self.experts)))

    @cached_property
    def groups(self) -> tuple[tuple[slice, slice], ...]:
        """Neighbours with one count: their places in the run, and their tokens."""
        found, first, token = [], 0, 0
        for count, same in groupby(self.counts):
            number = len(list(same))
            found.append((slice(first, first + number), slice(token, token + number * count)))
            first, token = first + number, token + number * count
        return tuple(found)

    def index(self, device: torch.device) -> Tensor:
        """The numbers of its experts on a device, (n,) int64."""
        return self.every.on(device).experts[self.first : self.first + len(self.experts)]

    def ends(self, device: torch.device) -> Tensor:
        """Where its experts end, (n,) int32: `offs` of torch's grouped product."""
        if self._ends is None:
            ends = self.every.on(device).ends[self.first : self.first + len(self.experts)]
            self._ends = ends - self.tokens.start if self.tokens.start else ends
        return self._ends

    def pick(self, values: Tensor) -> Tensor:
        """The entries of its experts along the first dimension: a view if they are consecutive."""
        if self.is_consecutive:
            return values[self.experts[0] : self.experts[-1] + 1]
        return values.index_select(0, self.index(values.device))

    def add_to(self, total: Tensor, found: Tensor) -> None:
        """Add values of its experts, (n, ...), to those of all experts."""
        if self.is_consecutive:
            total[self.experts[0] : self.experts[-1] + 1] += found
        else:
            total.index_add_(0, self.index(total.device), found.to(total.dtype))


def padded_tokens(counts: Sequence[int]) -> ExpertTokens:
    """Tokens with rows of padding behind those of an expert, so that few groups have one count. A token at place p of
    the ascending order goes to p + shifts[e] if it is of expert e."""
    reached = [expert for expert, count in enumerate(counts) if count]
    groups = _groups(reached, counts)
    by_count = _groups(sorted(reached, key=lambda expert: -counts[expert]), counts)
    if len(groups) - len(by_count) > _WORTH_COPIES:
        groups = by_count
    padded, shifts, place = [0] * len(counts), [0] * len(counts), 0
    for group in groups:
        most = max(counts[expert] for expert in group)
        for expert in group:
            padded[expert], shifts[expert] = most, place
            place += most
    for expert, before in enumerate(accumulate(counts[:-1], initial=0)):
        shifts[expert] -= before
    return ExpertTokens(padded, (expert for group in groups for expert in group), shifts, counts)


def _groups(experts: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    groups: list[list[int]] = []
    least = most = total = 0
    for expert in experts:
        count = counts[expert]
        least, most, total = min(least, count), max(most, count), total + count
        if groups and most <= 2 * least and most * (len(groups[-1]) + 1) <= (1 + _MOST_PADDING) * total:
            groups[-1].append(expert)
        else:
            groups.append([expert])
            least = most = total = count
    return groups


def expert_rows(stack: Weight, num_experts: int, run: Run) -> Weight:
    """The weights of a run's experts as one weight (n * out, in); no copy if they are consecutive."""
    rows, columns = stack.shape[0] // num_experts, stack.shape[1]
    if isinstance(stack, Tensor):
        return run.pick(stack.view(num_experts, rows, columns)).reshape(-1, columns)
    if run.is_consecutive:
        return packed_rows(stack, slice(run.experts[0] * rows, (run.experts[-1] + 1) * rows))
    shape, nested = (len(run.experts) * rows, columns), stack.nested_absmax
    # A scale of scales is of two experts
    if nested is None or rows * columns % (stack.block_size * NESTED_BLOCK_SIZE):
        stack = with_scales(stack, block_scales(stack))
    own = [(name, each) for name, each in stack.tensors().items() if name in (*TENSOR_NAMES[:3], "zeros")]
    picked: dict[str, Any] = {name: run.pick(each.view(num_experts, -1)).reshape(-1) for name, each in own}
    if stack.kind == "int8":
        picked["packed"] = picked["packed"].view(shape)
    return replace(stack, shape=shape, **picked)


def experts_together(rows: int, columns: int, itemsize: int, device: torch.device) -> int:
    """How many experts share the launches of a product."""
    return 1 if device_kind(device) == "cpu" else max(1, _RUN_BYTES // (rows * columns * itemsize))


def has_kernel(x: Tensor, *sizes: int) -> bool:
    """Whether torch's grouped product has a kernel: bf16, features in multiples of 16 bytes, compute capability 9 or
    10. Elsewhere torch has a loop, which first makes the host wait."""
    if device_kind(x.device) != "cuda" or x.dtype != torch.bfloat16 or any(size % 8 for size in sizes):
        return False
    return is_planning() or (
        torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] in (9, 10)
    )


def grouped_product(x: Tensor, matrices: Tensor, run: Run) -> Tensor:
    """x (tokens, k) times (n, k, m) for the tokens and experts of a run: (tokens, m)."""
    if len(matrices) == 1:
        return x @ matrices[0]
    if has_kernel(x, *matrices.shape[1:]):
        return torch.nn.functional.grouped_mm(x, matrices, offs=run.ends(x.device))
    out = x.new_empty(x.shape[0], matrices.shape[2])
    for experts, tokens in run.groups:
        left, into = (each[tokens].view(experts.stop - experts.start, -1, each.shape[1]) for each in (x, out))
        torch.bmm(left, matrices[experts], out=into)
    return out


def grouped_outer(left: Tensor, right: Tensor, run: Run) -> Tensor:
    """left^T right of each expert's tokens, (n, k, m)."""
    if len(run.counts) == 1:
        return (left.T @ right).unsqueeze(0)
    if has_kernel(left, left.shape[1], right.shape[1]):
        return torch.nn.functional.grouped_mm(left.T, right, offs=run.ends(left.device))
    out = left.new_empty(len(run.counts), left.shape[1], right.shape[1])
    for experts, tokens in run.groups:
        a, b = (each[tokens].view(experts.stop - experts.start, -1, each.shape[1]) for each in (left, right))
        torch.bmm(a.mT, b, out=out[experts])
    return out


def column_dots(left: Tensor, right: Tensor, factor: Tensor, tokens: ExpertTokens) -> Tensor:
    """`column_dot` over the tokens of each expert: (experts, out), like `factor`; 0 for an expert without tokens."""
    total = torch.zeros_like(factor)
    if device_kind(left.device) == "cpu":
        for run in tokens.runs(1):
            total[run.experts[0]] = column_dot(left[run.tokens], right[run.tokens], factor[run.experts[0]])
        return total
    lengths = tokens.on(left.device).counts
    step = max(1, _ENTRIES_PER_SUM // max(1, left.shape[0]))
    for start in range(0, left.shape[1], step):
        some = slice(start, start + step)
        products = left[:, some].to(factor.dtype) * right[:, some]
        # Unsafe: checks of the lengths would let a GPU's host wait twice.
        sums = torch.segment_reduce(products, "sum", lengths=lengths, axis=0, initial=0, unsafe=True)
        tokens.whole.add_to(total[:, some], sums.mul_(tokens.whole.pick(factor[:, some])))
    return total


def frozen_stack(x: Tensor, weight: Weight, tokens: ExpertTokens, bias: Tensor | None = None) -> Tensor:
    """y = x W_e^T + bias_e with frozen W, (experts * out, in), and bias, (experts, out); x is (tokens, in), sorted by
    expert. Differentiable by x any number of times."""

    def product(of: Tensor, transposed: bool) -> Tensor:
        rows, columns = weight.shape[0] // len(tokens.counts), weight.shape[1]
        of = of.contiguous()  # a gradient may be one row for all tokens, which the grouped kernel does not take
        into = of.new_zeros(of.shape[0], columns if transposed else rows)
        for run in tokens.runs(experts_together(rows, columns, of.itemsize, of.device)):
            _add_run_(into, of, weight, run, None, transposed=transposed)
        return into

    out: Tensor = FrozenMap.apply(x.to(product_dtype(x)), product, False)  # type: ignore[no-untyped-call, unused-ignore]
    return out if bias is None else add_expert_bias(out, bias, tokens)


def add_expert_bias(out: Tensor, bias: Tensor, tokens: ExpertTokens) -> Tensor:
    """out + bias_e for each token, (tokens, out): a new tensor."""
    counts = tokens.on(bias.device).counts
    return out + tokens.whole.pick(bias.to(out.dtype)).repeat_interleave(
        counts, dim=0, output_size=out.shape[0]
    )


def _add_run_(
    out: Tensor, x: Tensor, stack: Weight, run: Run, gain: Gain | None, *, transposed: bool = False
) -> None:
    into, of, num_experts = out[run.tokens], x[run.tokens], len(run.every.counts)
    weight, factor = (
        expert_rows(stack, num_experts, run),
        None if gain is None else run.pick(gain.value).reshape(-1),
    )
    if len(run.experts) == 1:
        add_product_(into, of, weight, factor, transposed=transposed)
        return
    ((_, tile),) = dense_tiles(weight, x.dtype, factor)  # experts that share a launch are one tile
    matrices = tile.view(len(run.experts), -1, tile.shape[1])
    into += grouped_product(of, matrices if transposed else matrices.mT, run)


def expert_bits(keep_bits: Any, run: Run) -> Any:
    """The mask bits, (experts * bytes,) uint8, of a run of one expert; an expert's mask is whole bytes."""
    return keep_bits.view(len(run.every.counts), -1)[run.experts[0]]


class StackCall(NamedTuple):
    """The arguments of a product that have no gradient. Weight, mask and gain are of the whole stack, the gain right
    for the experts that have tokens; `scaling` includes dropout's 1 / (1 - p)."""

    weight: Weight
    tokens: ExpertTokens
    keep_bits: Tensor | None
    gain: Gain | None
    scaling: float
    dropout: float
    seed: int

    def runs(self, x: Tensor) -> Iterator[Run]:
        """The experts with tokens, as many at a time as share launches."""
        rows, columns = self.weight.shape[0] // len(self.tokens.counts), self.weight.shape[1]
        together = experts_together(rows, columns, x.itemsize, x.device)
        return self.tokens.runs(1 if self.keep_bits is not None else together)

    def dropped(self, x: Tensor, run: Run) -> Tensor:
        """drop(x) of a run, without the factor 1 / (1 - p)."""
        return dropped(x[run.tokens], self.dropout, self.seed + run.experts[0])

    def scaled_B(self, lora_B: Tensor, run: Run, dtype: torch.dtype) -> tuple[Tensor, float | Tensor]:
        """diag(s g_e) B_e of a run, (n, out, rank), and s g, (n, out, 1)."""
        factor = row_factor(None if self.gain is None else run.pick(self.gain.value), self.scaling)
        return scaled_B(run.pick(lora_B), factor, dtype), factor


class AdaptedStack(torch.autograd.Function):
    """g_e * (x W_e^T + s (drop(x) A_e^T) B_e^T) for a token of expert e; g = 1 without a magnitude.

    x is (tokens, in), contiguous, sorted by expert, A (experts, rank, in), B (experts, out, rank), magnitude (experts,
    out). Source: DoRA, arXiv 2402.09353, eq. 5 and sec. 4.3 (norm detached), for each expert.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor | None, call: StackCall
    ) -> Tensor:
        """(tokens, out)."""
        out = x.new_empty(x.shape[0], lora_B.shape[1])
        low = x.new_empty(x.shape[0], lora_A.shape[1]) if call.keep_bits is None else None
        with without_autocast(x.device):
            for run in call.runs(x):
                dropped_x, a = call.dropped(x, run), rounded(run.pick(lora_A), x.dtype)
                b, _ = call.scaled_B(lora_B, run, x.dtype)
                if low is None:
                    out[run.tokens] = masked_product(dropped_x, expert_bits(call.keep_bits, run), a[0], b[0])
                else:
                    low[run.tokens] = grouped_product(dropped_x, a.mT, run)
                    out[run.tokens] = grouped_product(low[run.tokens], b.mT, run)
                del dropped_x
                _add_run_(out, x, call.weight, run, call.gain)
        kept = out if magnitude is not None and magnitude.requires_grad else None
        ctx.save_for_backward(x, lora_A, lora_B, magnitude, low, kept)
        ctx.call = call
        ctx.version = 0 if kept is None or kept.is_inference() else kept._version
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The formulas of `product`, expert by expert."""
        dy = grads[0].contiguous()  # of a sum it is one number for all, which the grouped kernel does not take
        x, lora_A, lora_B, _, low, out = ctx.saved_tensors
        if out is not None and out._version > ctx.version:
            raise RuntimeError("the model has written into the output of a stack of experts (inplace).")
        call: StackCall = ctx.call
        need_x, need_a, need_b, need_m = ctx.needs_input_grad[:4]
        dm = None
        if need_m:
            dm = column_dots(dy, out, call.gain.inverse_magnitude, call.tokens)  # type: ignore[union-attr]
        del out
        dx = torch.empty_like(x) if need_x else None
        da, db = (
            torch.zeros(each.shape, dtype=torch.promote_types(dy.dtype, torch.float32), device=dy.device)
            for each in (lora_A, lora_B)
        )
        with without_autocast(dy.device):
            for run in call.runs(dy):
                dy_run, seed = dy[run.tokens], call.seed + run.experts[0]
                b, factor = call.scaled_B(lora_B, run, dy.dtype)
                if low is None:
                    bits, a = expert_bits(call.keep_bits, run), rounded(run.pick(lora_A), dy.dtype)[0]
                    if need_a or need_b:
                        own = factor if isinstance(factor, float) else factor[0]
                        dropped_x = call.dropped(x, run)
                        found = masked_factor_gradients(dy_run, dropped_x, bits, a, run.pick(lora_B)[0], own)
                        del dropped_x
                        run.add_to(da, found[0].unsqueeze(0))
                        run.add_to(db, found[1].unsqueeze(0))
                    through = masked_input_gradient(dy_run, bits, a, b[0]) if need_x else None
                else:
                    d_low = grouped_product(dy_run, b, run)
                    if need_a:
                        run.add_to(da, grouped_outer(d_low, call.dropped(x, run), run))
                    if need_b:
                        outer = grouped_outer(low[run.tokens], dy_run, run).mT
                        run.add_to(db, outer.to(db.dtype) * factor)
                    through = (
                        grouped_product(d_low, rounded(run.pick(lora_A), dy.dtype), run) if need_x else None
                    )
                if dx is not None and through is not None:
                    dx[run.tokens] = drop_(through, call.dropout, seed)
                    _add_run_(dx, dy, call.weight, run, call.gain, transposed=True)
        return dx, da if need_a else None, db if need_b else None, dm, None
