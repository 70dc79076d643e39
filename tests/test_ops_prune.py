"""Pruning and GPTQ: masks, counts, ties and bits; magnitude, Wanda, SparseGPT, GPTQ against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qdora.errors import UserError
from qdora.prune import scores as prune
from qdora.prune.grid import CLIP_FACTORS, Grid, fitted_scales
from qdora.prune.scores import (
    InputStatistics,
    Pruned,
    check_finite,
    check_shape,
    keep_mask,
    mask_by_scores,
    num_pruned,
    pattern_from,
    sweep,
)
from qdora.quant.codebooks import code_values
from qdora.quant.packed import dequantize, mask_bits, mask_from_bits, pack, quantize, stored_scales
from tests import reference_prune as reference

PATTERN_NAMES = ("unstructured", "2:4", "4:8", "1:4")


def pattern_of(name, sparsity=0.5):
    return pattern_from(name, None if ":" in name else sparsity)


def compared(name, group="row"):
    """The comparison groups of a pattern for the reference."""
    return tuple(map(int, name.split(":"))) if ":" in name else group


def correlated(tokens=200, columns=24, seed=0, rank=6):
    """Inputs of a few directions of very different size, as a language model's are."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((rank, columns)) * rng.uniform(0.2, 3.0, (rank, 1))
    x = rng.standard_normal((tokens, rank)) @ mixing + 0.2 * rng.standard_normal((tokens, columns))
    return x * rng.uniform(0.3, 3.0, columns)


def matrix(rows=12, columns=24, seed=1):
    return np.random.default_rng(seed).standard_normal((rows, columns)) * 0.1


def statistics_of(x, method):
    statistics = InputStatistics(x.shape[1], "cpu", products=method != "wanda")
    tensor = torch.from_numpy(x)
    statistics.sums = tensor.square().sum(0) if method == "wanda" else tensor.T @ tensor
    return statistics


def pruned_by(method, weight, x, pattern, group=None):
    wide = torch.as_tensor(weight)
    if method == "sparsegpt":
        return sweep(wide, statistics_of(x, method), pattern)
    measured = None if method == "magnitude" else statistics_of(x, method)
    keep = mask_by_scores(method, wide, measured, pattern, group or "auto")
    return Pruned(wide.masked_fill(~keep, 0), keep)


@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 33),
    of=st.integers(2, 9),
    sparsity=st.floats(0, 0.99),
    group=st.sampled_from(["tensor", "row", "n:m"]),
    seed=st.integers(0, 5),
    levels=st.integers(1, 4),
    data=st.data(),
)
def test_counts_are_exact_and_ties_go_to_the_first(rows, columns, of, sparsity, group, seed, levels, data):
    name, wanted = "unstructured", group
    if group == "n:m":
        columns = of * (columns % 5 + 1)
        keep = data.draw(st.integers(1, of - 1))
        name, wanted, group = f"{keep}:{of}", (keep, of), "row"
    scores = np.random.default_rng(seed).integers(0, levels, (rows, columns)).astype(np.float64)
    expected = reference.keep_mask(scores, wanted, sparsity)
    pattern = pattern_of(name, sparsity)
    for given_scores in (torch.from_numpy(scores), torch.from_numpy(scores).T.contiguous().T.bfloat16()):
        assert np.array_equal(keep_mask(given_scores, pattern, group).numpy(), expected)


@given(rows=st.integers(1, 9), columns=st.integers(1, 21), seed=st.integers(0, 9), data=st.data())
def test_a_mask_survives_as_bits(rows, columns, seed, data):
    mask = torch.from_numpy(np.random.default_rng(seed).random((rows, columns)) < 0.5)
    bits = mask_bits(mask)
    assert np.array_equal(bits.numpy(), np.packbits(mask.numpy().reshape(-1), bitorder="little"))
    assert torch.equal(mask_from_bits(bits, (rows, columns)), mask)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    assert torch.equal(mask_from_bits(bits, (rows, columns), slice(start, stop)), mask[start:stop])


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize(
    ("name", "group"), [("unstructured", None), ("unstructured", "tensor"), ("unstructured", "row"), ("2:4", None)]
)
def test_magnitude_compares_the_tensor_and_wanda_rows_unless_told(method, name, group):
    weight, x = matrix(), correlated()
    scores = np.abs(weight) * (np.sqrt((x**2).sum(0)) if method == "wanda" else 1.0)
    default = "row" if method == "wanda" else "tensor"
    keep = reference.keep_mask(scores, compared(name, group or default), 0.6)
    pruned = pruned_by(method, weight, x, pattern_of(name, 0.6), group=group)
    assert np.array_equal(pruned.keep_mask.numpy(), keep)
    assert np.array_equal(pruned.weight.numpy(), np.where(keep, weight, 0.0))


SPARSEGPT = [({"sparsity": sparsity}, block) for sparsity in (0.0, 0.37) for block in (1, 5, 128)]
SPARSEGPT += [({"n_of_m": n_of_m}, block) for n_of_m in ((2, 4), (1, 3)) for block in (4, 7, 128)]


@pytest.mark.parametrize(("share", "block"), SPARSEGPT)
def test_sparsegpt_equals_the_unblocked_solution(share, block, monkeypatch):
    monkeypatch.setattr(prune, "BLOCK_COLUMNS", block)
    weight, x = matrix(), correlated()
    products = x.T @ x
    expected, keep = reference.obs(weight, products, 0.01, block=block, **share)
    name = "unstructured" if "sparsity" in share else "{}:{}".format(*share["n_of_m"])
    pattern = pattern_of(name, share.get("sparsity"))
    found, found_keep = pruned_by("sparsegpt", weight, x, pattern)
    assert np.array_equal(found_keep.numpy(), keep)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)
    if "sparsity" in share:
        assert int((~found_keep).sum()) == num_pruned(share["sparsity"], weight.size)


def test_dead_columns_go_first_and_receive_no_error():
    weight, x = matrix(), correlated()
    x[:, [2, 9, 17]] = 0.0
    found = pruned_by("sparsegpt", weight, x, pattern_of("unstructured"))
    assert not found.keep_mask[:, [2, 9, 17]].any()
    x[:, 8:12] = 0.0
    found = pruned_by("sparsegpt", weight, x, pattern_of("2:4"))
    stays = found.keep_mask[:, 8:12]
    assert int(stays.sum()) == 24
    assert torch.equal(found.weight[:, 8:12][stays], torch.from_numpy(weight)[:, 8:12][stays])
    # Nothing measured at all: the magnitudes decide, over the tensor, or in rows.
    for method, group in (("sparsegpt", "tensor"), ("wanda", "row")):
        found = pruned_by(method, weight, np.zeros((3, 24)), pattern_of("unstructured"))
        keep = reference.keep_mask(np.abs(weight), group, 0.5)
        assert np.array_equal(found.keep_mask.numpy(), keep)
        assert np.array_equal(found.weight.numpy(), np.where(keep, weight, 0.0))


@pytest.mark.parametrize(
    ("kind", "clip", "double_quant", "pruned"),
    [("nf4", False, True, None), ("int3", True, False, None), ("int2", True, True, "2:4"), ("nf3", True, True, "given"),
     ("int4", False, False, "unstructured"), ("nf2", True, False, "2:4")],
)  # fmt: skip
def test_gptq_equals_the_plain_algorithm(kind, clip, double_quant, pruned):
    """Whole blocks and a short one, which cross rows; experts have statistics of their own and blocks of all."""
    rows, columns, block = 10, 40, 16
    weight = matrix(2 * rows, columns).astype(np.float32).astype(np.float64)
    inputs = [correlated(columns=columns, seed=seed) for seed in (2, 3)]
    statistics = [statistics_of(x, "sparsegpt") for x in inputs]
    wide, values = torch.from_numpy(weight), code_values(kind)
    squares = torch.stack([each.column_squares for each in statistics])
    absmax = fitted_scales(wide.float(), squares.float(), kind, block, clip=clip)
    factors = CLIP_FACTORS if clip else (1.0,)
    costs = np.repeat([(x**2).sum(0) for x in inputs], rows, axis=0)
    lost, largest = reference.rounding_costs(weight, costs, block, values.double().numpy(), factors)
    chosen = np.abs(absmax.numpy()[:, None] / largest[:, None] - factors).argmin(axis=1)
    np.testing.assert_allclose(absmax.numpy(), largest * np.array(factors)[chosen], rtol=1e-6)
    np.testing.assert_allclose(lost[np.arange(len(lost)), chosen], lost.min(axis=1), rtol=1e-5)  # ties are left open
    scales, mask = stored_scales(absmax, double_quant), keep_mask(wide.abs(), pattern_of("2:4"))
    found, pattern = [], None if pruned in (None, "given") else pattern_of(pruned)
    for index, (part, x) in enumerate(zip(wide.chunk(2), inputs, strict=True)):
        grid = Grid(kind, block, scales, values, first=index * part.numel())
        given_mask = mask.chunk(2)[index] if pruned == "given" else None
        codes, keep = sweep(part, statistics[index], pattern, given_mask, grid)
        spread = np.repeat(scales.double().numpy(), block)[: weight.size].reshape(weight.shape)
        groups = (x**2).sum(0).reshape(-1, 4 if pruned == "2:4" else 1)
        order = [group * groups.shape[1] + i for group in np.argsort(-groups.sum(1)) for i in range(groups.shape[1])]
        mine = slice(index * rows, (index + 1) * rows)
        plain = reference.gptq(part.numpy(), x.T @ x, 0.01, values.double().numpy(), spread[mine], order, keep.numpy())
        assert np.array_equal(codes.numpy(), plain)
        if pruned is not None:
            assert (~keep).sum() == part.numel() // 2
        found.append(codes)
    after = dequantize(pack(torch.cat(found), absmax, kind, block, double_quant)).double().numpy()
    if pruned is None:  # less of the outputs is lost than by rounding
        rounded = dequantize(quantize(wide.float(), kind, block, double_quant)).double().numpy()
        lost = [
            sum(np.sum((x @ (dense - weight)[i * rows : (i + 1) * rows].T) ** 2) for i, x in enumerate(inputs))
            for dense in (after, rounded)
        ]
        assert lost[0] < 0.5 * lost[1]


@pytest.mark.parametrize("products", [False, True])
def test_statistics_of_batches_are_those_of_all_tokens(products, monkeypatch):
    monkeypatch.setattr(prune, "_ENTRIES_PER_SLICE", 50)
    x = correlated(50, 8)
    statistics = InputStatistics(8, "cpu", products=products)
    statistics.add(torch.from_numpy(x[:20]).view(4, 5, 8).bfloat16())
    statistics.add(torch.from_numpy(x[20:]).float())
    rounded = np.concatenate([torch.from_numpy(x[:20]).bfloat16().double().numpy(), x[20:]])
    expected = rounded.T @ rounded if products else (rounded**2).sum(0)
    np.testing.assert_allclose(statistics.sums.double().numpy(), expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(statistics.column_squares.double().numpy(), (rounded**2).sum(0), rtol=1e-5)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.sampled_from([24, 40, 72, 136]),
    method=st.sampled_from(["magnitude", "wanda", "sparsegpt"]),
    name=st.sampled_from(PATTERN_NAMES),
    sparsity=st.floats(0, 0.95),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 9),
)
def test_every_rule_and_pattern_has_its_count_and_zeros_stay_zero_when_quantised(
    rows, columns, method, name, sparsity, scale, seed
):
    weight, x, pattern = matrix(rows, columns, seed) * scale, correlated(30, columns, seed), pattern_of(name, sparsity)
    before = weight.copy()
    pruned = pruned_by(method, weight, x, pattern)
    assert np.array_equal(weight, before)
    assert not pruned.weight[~pruned.keep_mask].any()
    zeros = int((~pruned.keep_mask).sum())
    if ":" in name:
        assert bool((pruned.keep_mask.view(rows, -1, pattern.of).sum(2) == pattern.keep).all())
    elif method == "wanda":
        assert zeros == rows * round(sparsity * columns)
    else:
        assert zeros == round(sparsity * rows * columns)
    narrow = torch.from_numpy(weight).bfloat16()
    rounded = pruned_by(method, narrow, x, pattern)
    assert rounded.weight.dtype == torch.bfloat16
    for kind in ("nf4", "fp4", "int8"):  # rows of whole blocks and of others
        gone = dequantize(quantize(rounded.weight, kind))[~rounded.keep_mask]
        assert not gone.any()
        assert not torch.signbit(gone).any() or kind != "int8"


def test_what_cannot_be_pruned_is_named():
    weight, half = torch.from_numpy(matrix()), pattern_of("unstructured")
    broken = weight.clone()
    broken[3, 3] = float("nan")
    infinite, negative = statistics_of(correlated(), "wanda"), statistics_of(correlated(), "sparsegpt")
    infinite.sums[0] = float("inf")
    negative.sums = -negative.sums
    for kind, message, call in (
        (ValueError, "up_proj: .*2:5 .*24", lambda n: check_shape(pattern_of("2:5"), weight.shape, n)),
        (UserError, "up_proj: .*finite", lambda n: check_finite(broken, None, n)),
        (UserError, "up_proj: .*inputs", lambda n: check_finite(weight, infinite, n)),
        (UserError, "up_proj: .*0.01", lambda n: sweep(weight, negative, half, name=n)),
    ):
        with pytest.raises(kind, match=message):
            call("up_proj")
