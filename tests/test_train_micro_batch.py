"""Loss of a micro-batch and of a step: sums over labelled tokens, whatever the padding and the split."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from qdora.data.batching import MicroBatch
from qdora.data.loader import Step
from qdora.model.inject import adapter_parameters, inject
from qdora.ops.loss import token_nll
from qdora.train.figures import smooth
from qdora.train.passes import batch_loss, step_gradient
from tests import reference, tiny

LENGTHS = (10, 7, 12, 3)


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four padded examples; labels on their last tokens, on none of the last one's."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 90, (4, 12), generator=generator)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
        if row < 3:
            labels[row, length - 3 : length] = ids[row, length - 3 : length]
    return ids * mask, mask, labels


def gemma() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    config = Gemma2Config(vocab_size=97, num_attention_heads=4, num_key_value_heads=2, **sizes)
    config.final_logit_softcapping = 0.5  # tight, so that leaving it out would show
    return Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize("make", [tiny.llama, gemma], ids=["llama", "gemma2 with soft capping"])
def test_losses_are_those_of_each_sequence_alone(make: Any) -> None:
    model = make()
    ids, mask, labels = batch()
    loss = batch_loss(model, ids, mask, labels)
    for row, length in enumerate(LENGTHS):
        with torch.no_grad():
            logits = model(input_ids=ids[row : row + 1, :length]).logits[0].double().numpy()
        nll, count = reference.token_nll(logits[:-1], labels[row, 1:length].numpy())
        assert float(loss.example_nll[row]) == pytest.approx(nll, rel=1e-5)
        assert int(loss.example_tokens[row]) == count
    assert float(loss.nll_sum.detach()) == pytest.approx(float(loss.example_nll.sum()), rel=1e-6)
    assert model(input_ids=ids).logits.shape == (4, 12, 97)  # the selection is gone afterwards


def test_gradients_are_those_of_the_full_logits() -> None:
    model, twin = tiny.llama(), tiny.llama()
    for each in (model, twin):
        inject(each, rank=2, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
        tiny.move_all_parameters_(each)
    ids, mask, labels = batch()
    batch_loss(model, ids, mask, labels).nll_sum.backward()
    logits = twin(input_ids=ids, attention_mask=mask).logits[:, :-1].reshape(-1, 97)
    torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum").backward()
    expected = adapter_parameters(twin)
    for name, parameter in adapter_parameters(model).items():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-5)


def test_token_nll_in_low_precision_is_summed_in_float32() -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * 5
    labels = torch.randint(0, 300, (50,), generator=torch.Generator().manual_seed(1))
    low = logits.bfloat16()
    got = token_nll(low, labels)
    assert got.dtype == torch.float32
    expected = [reference.token_nll(low[i : i + 1].double().numpy(), labels[i : i + 1].numpy())[0] for i in range(50)]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-5)


def step_of(groups: list[list[int]]) -> Step:
    ids, mask, labels = batch()
    micro = [
        MicroBatch(
            ids[g], mask[g], labels[g], torch.tensor([row % 2 for row in g]), ["even", "odd"], [str(r) for r in g]
        )
        for g in groups
    ]
    return Step(micro, 9, sum(LENGTHS), 4)


@pytest.mark.parametrize("groups", [[[0, 1, 2, 3]], [[0], [1], [2], [3]], [[2, 3], [0, 1]]])
def test_a_step_is_a_ratio_of_sums_however_it_is_split(groups: list[list[int]]) -> None:
    model = tiny.llama()
    inject(model, rank=2, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    tiny.move_all_parameters_(model)
    metrics, _ = step_gradient(model, step_of(groups), device=torch.device("cpu"))
    nll = []
    for row, length in enumerate(LENGTHS):
        ids, _, labels = batch()
        with torch.no_grad():
            logits = model(input_ids=ids[row : row + 1, :length]).logits[0].double().numpy()
        nll.append(reference.token_nll(logits[:-1], labels[row, 1:length].numpy())[0])
    assert metrics["loss"] == pytest.approx(sum(nll) / 9, rel=1e-5)
    assert metrics["tasks"]["even"] == {"nll_sum": pytest.approx(nll[0] + nll[2], rel=1e-5), "num_tokens": 6}
    assert metrics["tasks"]["odd"] == {"nll_sum": pytest.approx(nll[1], rel=1e-5), "num_tokens": 3}
    gradient = torch.cat([p.grad.flatten() for p in adapter_parameters(model).values() if p.grad is not None])
    twin = tiny.llama()
    inject(twin, rank=2, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    tiny.move_all_parameters_(twin)
    step_gradient(twin, step_of([[0, 1, 2, 3]]), device=torch.device("cpu"))
    expected = torch.cat([p.grad.flatten() for p in adapter_parameters(twin).values() if p.grad is not None])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_smoothing_is_a_mean_over_tokens() -> None:
    values = smooth(np.array([0.0, 6.0, 0.0, 10.0]), np.array([0.0, 3.0, 0.0, 1.0]), half_life=1.0)
    assert np.isnan(values[0])
    assert values[1:].tolist() == pytest.approx([2.0, 2.0, (6 / 4 + 10) / (3 / 4 + 1)])
