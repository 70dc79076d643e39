"""Products of a stack of experts, in which each token meets the weight of its own expert only.

A stack is one weight, (experts * out, in): expert e has the rows e * out to (e + 1) * out. Tokens lie expert by expert.
Only the experts that have tokens are dequantised. On a GPU several small experts are dequantised in one launch. They
share each product, too, where torch has a kernel for it or they have equally many tokens; on a CPU each has its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from qdora.adapter.adapted_product import WRITTEN, column_dot
from qdora.adapter.dora import (
    FactoredNorm,
    Gain,
    factored_norms,
    full_precision,
    masked_row_norm,
    measure_cancelled_,
    merged_weight,
    norms_of_products,
)
from qdora.adapter.dropout import draw_seed, drop_, dropped
from qdora.adapter.expert_tokens import ExpertTokens, Run
from qdora.adapter.frozen_product import (
    FrozenMap,
    add_product_,
    add_transposed_product_,
    product_dtype,
    without_autocast,
)
from qdora.adapter.low_rank_factors import rounded, row_factor, scaled_rows
from qdora.adapter.masked_update import MaskedUpdate
from qdora.quant.codebooks import NESTED_BLOCK_SIZE
from qdora.quant.packed import PackedWeight, block_scales, dequantize, packed_rows
from qdora.quant.planned_device import device_kind, is_planning
from qdora.quant.tiles import Weight, dense_weight, row_tiles

# Bytes of the dense experts that share a launch on a GPU.
_RUN_BYTES = 64 << 20
# Columns times tokens of a sum over tokens on a GPU, whose products are formed in float32: 64 MiB.
_ENTRIES_PER_SUM = 1 << 24


def expert_rows(stack: Weight, num_experts: int, run: Run) -> Weight:
    """The weights of a run's experts, in this order, as one weight (n * out, in).

    Consecutive experts share the memory of the stack's codes; others are copied. A stack whose blocks cross experts is
    dequantised whole, in float32.
    """
    rows, columns = stack.shape[0] // num_experts, stack.shape[1]
    if isinstance(stack, Tensor):
        return run.pick(stack.view(num_experts, rows, columns)).reshape(-1, columns)
    if stack.kind != "int8" and rows * columns % stack.block_size:
        return run.pick(dequantize(stack).view(num_experts, rows, columns)).reshape(-1, columns)
    if run.is_consecutive:
        return packed_rows(stack, slice(run.experts[0] * rows, (run.experts[-1] + 1) * rows))
    shape, nested = (len(run.experts) * rows, columns), stack.nested
    if nested is not None and rows * columns % (stack.block_size * NESTED_BLOCK_SIZE):
        nested = None  # a scale of scales is of two experts
    scales = block_scales(stack) if nested is None else stack.absmax
    codes, scales = (run.pick(each.view(num_experts, -1)).reshape(-1) for each in (stack.packed, scales))
    if nested is not None:
        nested = replace(nested, absmax=run.pick(nested.absmax.view(num_experts, -1)).reshape(-1))
    codes = codes.view(shape) if stack.kind == "int8" else codes
    return PackedWeight(stack.kind, shape, stack.block_size, codes, scales, nested=nested)


def experts_together(rows: int, columns: int, itemsize: int, device: torch.device) -> int:
    """How many experts share the launches of a product."""
    return 1 if device_kind(device) == "cpu" else max(1, _RUN_BYTES // (rows * columns * itemsize))


def grouped_product(x: Tensor, matrices: Tensor, run: Run) -> Tensor:
    """x (tokens, k) times (n, k, m) for the tokens and experts of a run: (tokens, m). One matrix serves all experts."""
    if len(matrices) == 1:
        return x @ matrices[0]
    if _has_kernel(x, *matrices.shape[1:]):
        return torch.nn.functional.grouped_mm(x, matrices, offs=run.ends(x.device))
    out = x.new_empty(x.shape[0], matrices.shape[2])
    for experts, tokens in run.groups:
        left, into = (each[tokens].view(experts.stop - experts.start, -1, each.shape[1]) for each in (x, out))
        torch.bmm(left, matrices[experts], out=into)
    return out


def grouped_outer(left: Tensor, right: Tensor, run: Run, *, shared: bool) -> Tensor:
    """left^T right of each expert's tokens, (n, k, m), or (1, k, m) of all tokens if `shared`."""
    if shared or len(run.counts) == 1:
        return (left.T @ right).unsqueeze(0)
    if _has_kernel(left, left.shape[1], right.shape[1]):
        return torch.nn.functional.grouped_mm(left.T, right, offs=run.ends(left.device))
    out = left.new_empty(len(run.counts), left.shape[1], right.shape[1])
    for experts, tokens in run.groups:
        a, b = (each[tokens].view(experts.stop - experts.start, -1, each.shape[1]) for each in (left, right))
        torch.bmm(a.mT, b, out=out[experts])
    return out


def wants_padding(x: Tensor, stack: Weight, num_experts: int) -> bool:
    """Whether the experts of a stack share more launches if their tokens are padded; x has these in its dtype."""
    rows, columns = stack.shape[0] // num_experts, stack.shape[1]
    return experts_together(rows, columns, x.itemsize, x.device) > 1 and not _has_kernel(x, rows, columns)


def _has_kernel(x: Tensor, *sizes: int) -> bool:
    """Whether torch's grouped product has a kernel for these: bf16 on a GPU, features that are multiples of 16 bytes.

    That kernel is for compute capability 9 and 10. For other GPUs torch has a loop, which first makes the host wait.
    """
    if device_kind(x.device) != "cuda" or x.dtype != torch.bfloat16 or any(size % 8 for size in sizes):
        return False
    if is_planning():
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def frozen_stack(x: Tensor, weight: Weight, tokens: ExpertTokens, bias: Tensor | None = None) -> Tensor:
    """y = x W_e^T + bias_e with frozen W and bias, differentiable any number of times with respect to x.

    Args:
        x: (tokens, in), sorted by expert; the product runs in its dtype, or in that of an active autocast.
        weight: The stack, (experts * out, in).
        bias: (experts, out), or None.
    Returns: (tokens, out) in the dtype of the product.
    """

    def product(of: Tensor, transposed: bool) -> Tensor:
        rows, columns = _expert_shape(weight, tokens)
        of = of.contiguous()  # a gradient may be one row for all tokens, which the grouped kernel does not take
        into = of.new_zeros(of.shape[0], columns if transposed else rows)
        for run in tokens.runs(experts_together(rows, columns, of.itemsize, of.device)):
            _add_run_(into, of, weight, run, None, num_experts=len(tokens.counts), transposed=transposed)
        return into

    out: Tensor = FrozenMap.apply(  # type: ignore[no-untyped-call, unused-ignore]
        x.to(product_dtype(x)), product, False
    )
    return out if bias is None else add_expert_bias(out, bias, tokens)


def add_expert_bias(out: Tensor, bias: Tensor, tokens: ExpertTokens) -> Tensor:
    """out + bias_e for each token, (tokens, out): a new tensor."""
    counts = tokens.on(bias.device).counts
    return out + tokens.whole.pick(bias.to(out.dtype)).repeat_interleave(counts, dim=0, output_size=out.shape[0])


def _add_run_(
    out: Tensor,
    x: Tensor,
    stack: Weight,
    run: Run,
    gain: Tensor | None,
    *,
    num_experts: int,
    transposed: bool = False,
) -> None:
    """Add x (diag(g_e) W_e)^T of a run, or x diag(g_e) W_e where `transposed`, to `out`.

    Args:
        stack: The weights of all experts.
        gain: g of all experts, (experts, out), or None for 1.
    """
    into, of = out[run.tokens], x[run.tokens]
    if len(run.experts) == 1:
        weight, factor = expert_rows(stack, num_experts, run), None if gain is None else run.pick(gain).reshape(-1)
        (add_transposed_product_ if transposed else add_product_)(into, of, weight, factor)
        return
    matrices = _dense_experts(stack, num_experts, run, gain, x.dtype)
    into += grouped_product(of, matrices if transposed else matrices.mT, run)


def _dense_experts(stack: Weight, num_experts: int, run: Run, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
    """diag(g_e) W_e of a run's experts, (n, out, in); `gain` is of all experts."""
    factor = None if gain is None else run.pick(gain).reshape(-1)
    # Experts that share a launch are one tile.
    ((_, tile),) = row_tiles(expert_rows(stack, num_experts, run), dtype, factor)
    return tile.view(len(run.experts), -1, tile.shape[1])


def _expert_shape(weight: Weight, tokens: ExpertTokens) -> tuple[int, int]:
    return weight.shape[0] // len(tokens.counts), weight.shape[1]


def adapted_stack(
    x: Tensor,
    weight: Weight,
    tokens: ExpertTokens,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    bias: Tensor | None = None,
    magnitude: Tensor | None = None,
    gain: Gain | None = None,
    dropout: float = 0.0,
    keep_bits: Tensor | None = None,
    keeps_copy: bool = False,
) -> Tensor:
    """y = g_e * (x W_e^T + s (drop(x) A_e^T) B_e^T) + bias_e for a token of expert e; g = 1 where magnitude is None.

    Source: DoRA, arXiv 2402.09353, eq. 5 and sec. 4.3, for each expert (norm detached).

    Args:
        x: (tokens, in), sorted by expert; the products run in its dtype, or in that of an active autocast.
        weight: Frozen stack W, (experts * out, in), dense or packed.
        lora_A, lora_B: (experts, rank, in) and (experts, out, rank), trainable; (1, ...) is shared by all experts.
        scaling: s = alpha / rank.
        bias: Frozen, (experts, out).
        magnitude: m, (experts, out), float32 (float64 for float64 x), trainable; None for LoRA.
        gain: `adapter.dora.gain` of the present values, (experts, out), right for the experts that have tokens.
        dropout: As in `adapted_linear`.
        keep_bits: `quant.sparsity.mask_bits` of a mask M of the stack: M o (B A) replaces B A.
        keeps_copy: As in `adapted_linear`.
    Returns: (tokens, out) in the dtype of the products. An expert without tokens has gradients of 0.
    """
    assert (magnitude is None) == (gain is None), "a magnitude comes with its gain"
    seed = draw_seed() if dropout > 0.0 else 0
    keeps_copy = keeps_copy and bias is None  # a bias makes another tensor
    call = _StackCall(
        weight, tokens, keep_bits, scaling / (1.0 - dropout), dropout=dropout, seed=seed, keeps_copy=keeps_copy
    )
    out: Tensor = _AdaptedStack.apply(  # type: ignore[no-untyped-call, unused-ignore]
        x.to(product_dtype(x)).contiguous(), lora_A, lora_B, magnitude, *(gain or (None, None)), call
    )
    return out if bias is None else add_expert_bias(out, bias, tokens)


def expert_bits(keep_bits: Tensor, num_experts: int, expert: int) -> Tensor:
    """The mask bits of one expert of a stack, whose mask is whole bytes."""
    assert keep_bits.numel() % num_experts == 0, "the mask of an expert is whole bytes"
    return keep_bits.view(num_experts, -1)[expert]


class _StackCall(NamedTuple):
    """The arguments of a product that have no gradient; `scaling` includes dropout's 1 / (1 - p)."""

    weight: Weight
    tokens: ExpertTokens
    keep_bits: Tensor | None
    scaling: float
    dropout: float
    seed: int
    keeps_copy: bool

    def runs(self, x: Tensor) -> Iterator[Run]:
        together = experts_together(*_expert_shape(self.weight, self.tokens), x.itemsize, x.device)
        return self.tokens.runs(1 if self.keep_bits is not None else together)

    def dropped(self, x: Tensor, run: Run) -> Tensor:
        """drop(x) of a run, without the factor 1 / (1 - p)."""
        return dropped(x[run.tokens], self.dropout, self.seed + run.experts[0])

    def row_factor(self, run: Run, gain: Tensor | None) -> float | Tensor:
        """s g of a run's experts, (n, out, 1), or s for LoRA."""
        return row_factor(None if gain is None else run.pick(gain), self.scaling)

    def masked(self, run: Run, lora_A: Tensor, lora_B: Tensor, gain: Tensor | None) -> MaskedUpdate | None:
        """The masked update of one expert, or None without a mask."""
        if self.keep_bits is None:
            return None
        (expert,) = run.experts
        bits = expert_bits(self.keep_bits, len(self.tokens.counts), expert)
        a, b = (_pick_or_shared(each, run)[0] for each in (lora_A, lora_B))
        return MaskedUpdate(bits, a, b, None if gain is None else gain[expert], self.scaling)


def _pick_or_shared(factor: Tensor, run: Run) -> Tensor:
    """The factors of a run's experts, (n, ...), or the one that all experts share, (1, ...)."""
    return factor if len(factor) == 1 else run.pick(factor)


class _AdaptedStack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        magnitude: Tensor | None,
        gain: Tensor | None,
        inverse_magnitude: Tensor | None,
        call: _StackCall,
    ) -> Tensor:
        out = x.new_empty(x.shape[0], lora_B.shape[1])
        low = x.new_empty(x.shape[0], lora_A.shape[1]) if call.keep_bits is None else None
        with without_autocast(x.device):
            for run in call.runs(x):
                update = call.masked(run, lora_A, lora_B, gain)
                dropped_x = call.dropped(x, run)
                if update is not None:
                    out[run.tokens] = update.product(dropped_x)
                elif low is not None:
                    a = rounded(_pick_or_shared(lora_A, run), x.dtype)
                    b = scaled_rows(rounded(_pick_or_shared(lora_B, run), x.dtype), call.row_factor(run, gain), x.dtype)
                    low[run.tokens] = grouped_product(dropped_x, a.mT, run)
                    out[run.tokens] = grouped_product(low[run.tokens], b.mT, run)
                del dropped_x
                _add_run_(out, x, call.weight, run, gain, num_experts=len(call.tokens.counts))
        kept = out if magnitude is not None and magnitude.requires_grad else None
        if kept is not None and call.keeps_copy:
            kept = out.clone()
        ctx.save_for_backward(x, lora_A, lora_B, magnitude, gain, inverse_magnitude, low, kept)
        ctx.call = call
        ctx.version = 0 if kept is None or kept.is_inference() else kept._version
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = grads[0].contiguous()  # of a sum it is one number for all, which the grouped kernel does not take
        x, lora_A, lora_B, _, gain, inverse_magnitude, low, out = ctx.saved_tensors
        if out is not None and out._version > ctx.version:
            raise RuntimeError(WRITTEN)
        call: _StackCall = ctx.call
        need_x, need_a, need_b, need_m = ctx.needs_input_grad[:4]
        dm = column_dots(dy, out, inverse_magnitude, call.tokens) if need_m else None
        del out
        dx = torch.empty_like(x) if need_x else None
        da, db = (
            torch.zeros(each.shape, dtype=torch.promote_types(dy.dtype, torch.float32), device=dy.device)
            for each in (lora_A, lora_B)
        )
        with without_autocast(dy.device):
            for run in call.runs(dy):
                dy_run = dy[run.tokens]
                dropped_x = call.dropped(x, run) if need_a or call.keep_bits is not None else None
                update = call.masked(run, lora_A, lora_B, gain)
                if update is not None:
                    assert dropped_x is not None
                    found = update.factor_gradients(dy_run, dropped_x)
                    into = [each[0 if len(each) == 1 else run.experts[0]] for each in (da, db)]
                    into[0].add_(found[0])
                    into[1].add_(found[1])
                    if dx is not None:
                        into_x = drop_(update.input_gradient(dy_run), call.dropout, call.seed + run.experts[0])
                        dx[run.tokens] = into_x
                elif low is not None:
                    factor = call.row_factor(run, gain)
                    b = scaled_rows(rounded(_pick_or_shared(lora_B, run), dy.dtype), factor, dy.dtype)
                    d_low = grouped_product(dy_run, b, run)
                    if dropped_x is not None:
                        _add_(da, run, grouped_outer(d_low, dropped_x, run, shared=len(da) == 1))
                    if need_b:
                        # Of each expert, since the gain differs between experts that share B.
                        per_expert = grouped_outer(low[run.tokens], dy_run, run, shared=False).mT
                        _add_(db, run, per_expert.to(db.dtype) * factor)
                    if dx is not None:
                        through = grouped_product(d_low, rounded(_pick_or_shared(lora_A, run), dy.dtype), run)
                        dx[run.tokens] = drop_(through, call.dropout, call.seed + run.experts[0])
                if dx is not None:
                    _add_run_(dx, dy, call.weight, run, gain, num_experts=len(call.tokens.counts), transposed=True)
        return dx, da if need_a else None, db if need_b else None, dm, None, None, None


def _add_(total: Tensor, run: Run, found: Tensor) -> None:
    """Add the gradients of a run's experts, (n, ...), to those of all experts, or of the factor that all share."""
    if len(total) == 1:
        total[0] += found.sum(dim=0)
    elif run.is_consecutive:
        total[run.experts[0] : run.experts[-1] + 1] += found
    else:
        total.index_add_(0, run.index(total.device), found.to(total.dtype))


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
        _add_(total[:, some], tokens.whole, sums.mul_(tokens.whole.pick(factor[:, some])))
    return total


@torch.no_grad()
def merged_rows(
    weight: Tensor,
    first: int,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude: Tensor | None = None,
    keep_mask: Tensor | None = None,
) -> Tensor:
    """Some rows of the dense stack that equals base and adapter, by `adapter.dora.merged_weight` expert by expert.

    Args:
        weight: Rows of the dequantised base from row `first` on, (rows, in), float32 or float64, which the result has.
        lora_A, lora_B, scaling, magnitude: As in `adapted_stack`.
        keep_mask: (rows, in) bool; B A counts only where it is True.
    """
    size, done, merged = lora_B.shape[1], 0, []
    while done < len(weight):
        expert, row = divmod(first + done, size)
        count = min(size - row, len(weight) - done)
        here, inside = slice(done, done + count), slice(row, row + count)
        merged.append(
            merged_weight(
                weight[here],
                lora_A[expert % len(lora_A)],  # one for all experts where they share it
                lora_B[expert % len(lora_B), inside],
                scaling,
                magnitude=None if magnitude is None else magnitude[expert, inside],
                keep_mask=None if keep_mask is None else keep_mask[here],
            )
        )
        done += count
    return merged[0] if len(merged) == 1 else torch.cat(merged)


@torch.no_grad()
def dense_rows(stack: Weight, num_experts: int, rows: slice, dtype: torch.dtype = torch.float32) -> Tensor:
    """Some rows of a stack, dense; only their experts are dequantised."""
    size = stack.shape[0] // num_experts
    experts = range(rows.start // size, -(-rows.stop // size))
    runs = ExpertTokens.one_for_each(experts, num_experts).reached
    parts = [dense_weight(expert_rows(stack, num_experts, run), dtype) for run in runs]
    dense = parts[0] if len(parts) == 1 else torch.cat(parts)
    return dense[rows.start - experts.start * size : rows.stop - experts.start * size]


@torch.no_grad()
def stack_norm(
    weight: Weight,
    tokens: ExpertTokens,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    base_squared: Tensor,
    dtype: torch.dtype,
    keep_bits: Tensor | None = None,
) -> Tensor:
    """Row norms of W_e + s B_e A_e of the experts that have tokens, (n, out), by the sum of `dora.factored_norms`.

    A GPU's host waits once, to know which experts have cancelled rows.

    Args:
        lora_A, lora_B: (experts, rank, in), (experts, out, rank); (1, ...) if all experts share one.
        base_squared: ||w||^2 of each row, (experts, out).
        dtype: Of the tiles of W and of the product W A^T; all else is summed in float32 or wider.
        keep_bits: As in `adapted_stack`; the sums are then formed, row by row.
    """
    num_experts, count = len(tokens.counts), len(tokens.experts)
    together = experts_together(base_squared.shape[1], weight.shape[1], dtype.itemsize, lora_A.device)
    norms: list[Tensor] = []
    cancelled: list[Tensor] = []
    for run in tokens.all_runs(1 if keep_bits is not None else together):
        if is_planning() and len(norms) > 1 and run.first + 2 * together < count:
            # Like the run before it. The last ones are run, when the norms of the others are there.
            norms.append(base_squared.new_empty(len(run.experts), base_squared.shape[1]))
            continue
        a, b = (rounded(_pick_or_shared(each, run), dtype) for each in (lora_A, lora_B))
        if keep_bits is not None:
            part, bits = expert_rows(weight, num_experts, run), expert_bits(keep_bits, num_experts, run.experts[0])
            norms.append(masked_row_norm(part, bits, a[0], b[0], scaling, dtype=dtype).unsqueeze(0))
        else:
            found = _norm_of_run(weight, run, a, b, scaling, base_squared=base_squared, dtype=dtype)
            norms.append(found.norm)
            cancelled.append(found.cancelled)
    whole = torch.cat(norms)
    if keep_bits is not None or isinstance(whole, FakeTensor):
        return whole
    lost = torch.cat(cancelled)
    for run, norm, rows, has_some in zip(tokens.reached, whole, lost, lost.any(dim=1).tolist(), strict=True):
        if has_some:
            a, b = (rounded(_pick_or_shared(each, run)[0], dtype) for each in (lora_A, lora_B))
            part = expert_rows(weight, num_experts, run)
            measure_cancelled_(FactoredNorm(norm, rows), part, a, b, scaling, dtype=dtype)
    return whole


@full_precision()
def _norm_of_run(
    weight: Weight,
    run: Run,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    base_squared: Tensor,
    dtype: torch.dtype,
) -> FactoredNorm:
    """The norms of a run's experts with shared launches, (n, out). A and B are theirs; `base_squared` is of all."""
    squared = run.pick(base_squared)
    part = expert_rows(weight, len(base_squared), run)
    if len(squared) == 1:
        return factored_norms([part], lora_A, lora_B, scaling, base_squared=squared, dtype=dtype)
    ((_, tile),) = row_tiles(part, dtype)
    products = tile.view(*squared.shape, -1) @ lora_A.mT
    return norms_of_products(products, lora_A, lora_B, scaling, base_squared=squared)
