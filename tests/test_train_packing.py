"""Packed rows through real models: every example as if it were alone, or a clear refusal."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qdora.data.batching import Batching, micro_batches
from qdora.data.tokenize import TokenizedExample
from qdora.errors import UserError
from qdora.train import checks as packed_attention
from qdora.train.checks import packed_layout
from qdora.train.passes import batch_loss
from tests import reference, support
from tests.support import examples

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
OPT = {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def of(kind: str, sizes: dict[str, Any] = SIZES, attention: str | None = None, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{"vocab_size": 97} | sizes | fields)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "llama": support.llama,
    "eager": partial(of, "llama", attention="eager"),
    # Every other layer sees four tokens; logits are capped
    "gemma2": partial(of, "gemma2", attention="eager", head_dim=8, sliding_window=4, final_logit_softcapping=0.5),
    "mistral": partial(of, "mistral", sliding_window=4),
    "gpt2": partial(of, "gpt2", GPT2),  # learnt positions
    "mixtral": partial(of, "mixtral", num_local_experts=4),
}


def nll_alone(model: Any, example: TokenizedExample) -> float:
    """Of the example as a batch of one, from the model's own logits."""
    ids = torch.from_numpy(example.input_ids).long()[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double().numpy()
    labels = np.where(example.loss_mask, example.input_ids, -100)
    return reference.token_nll(logits[:-1], labels[1:])[0] if len(labels) > 1 else 0.0


@pytest.mark.parametrize("layout", ["rows", "single"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_losses_are_those_of_each_example_alone(name: str, layout: Any) -> None:
    """Also of an example without a label."""
    model, found, seen = MODELS[name](), examples(), {}
    found[3] = TokenizedExample("b", "3", found[3].input_ids, np.zeros_like(found[3].loss_mask))
    batches = micro_batches(found, Batching(75, 0, layout, 25), ["a", "b"])
    assert max(len(micro.input_ids) for micro in batches) == (3 if layout == "rows" else 1)
    for micro in batches:
        loss = batch_loss(model, micro.input_ids, micro.attention_mask, micro.labels, packing=micro.packing)
        assert float(loss.nll_sum.detach()) == pytest.approx(float(loss.example_nll.sum()), rel=1e-6)
        for each, nll, count in zip(micro.example_ids, loss.example_nll, loss.example_tokens, strict=True):
            seen[each] = (float(nll), int(count))
    assert len(seen) == len(found)
    for example in found:
        nll, count = seen[example.id]
        assert nll == pytest.approx(nll_alone(model, example), rel=1e-5, abs=1e-5)
        assert count == example.loss_mask.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_models_that_keep_examples_apart_are_found_to_do_so(name: str, dtype: torch.dtype) -> None:
    model = MODELS[name]().to(dtype).train()
    frozen = next(model.children()).eval()
    before = torch.get_rng_state()
    layout, said = packed_layout(model)
    assert layout == "rows"
    assert f"attention by {'eager' if name in ('eager', 'gemma2') else 'sdpa'}, " in said
    assert ("sliding_attention" in said) == (name == "gemma2")
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert not frozen.training


@pytest.mark.parametrize(("noise", "is_refused"), [(2e-6, False), (1e-3, True)])
def test_rounding_of_float32_is_no_leak(noise: float, is_refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of another shape takes other kernels: SmolLM2's logits in float32 move by 1.7e-5 with a size of 20."""
    real, generator = packed_attention._probe_outputs, torch.Generator().manual_seed(0)

    def noisy(*args: Any) -> torch.Tensor:
        logits = real(*args)
        return logits + noise * logits.abs().max() * torch.randn(logits.shape, generator=generator)

    monkeypatch.setattr(packed_attention, "_probe_outputs", noisy)
    refused: Any = pytest.raises(UserError, match="does not keep packed examples apart")
    with refused if is_refused else nullcontext():
        packed_layout(support.llama())  # type: ignore[arg-type]


def instead(model: Any, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
    """The model takes other positions than it is given."""
    real = model.forward

    def forward(input_ids: Any, position_ids: Any = None, **options: Any) -> Any:
        changed = None if position_ids is None else change(position_ids)
        return real(input_ids=input_ids, position_ids=changed, **options)

    model.forward = forward
    return model


def test_kernels_for_variable_lengths_get_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash_attention_2 itself cannot run here; sdpa takes a single row as well."""
    names = ("sdpa", "eager", "flex_attention", "flash_attention_2", "kernels-community/flash-attn2")
    assert [packed_attention.layout_for(name) for name in names] == ["rows"] * 3 + ["single"] * 2
    monkeypatch.setattr(packed_attention, "layout_for", lambda attention: "single")
    shapes: list[Any] = []
    model = instead(support.llama(), lambda positions: shapes.append(tuple(positions.shape)) or positions)
    assert packed_layout(model)[0] == "single"
    assert shapes == [(1, 22), (1, 19), (1, 22), (1, 19)]


def without_borders(attention: str = "sdpa") -> Any:
    model = of("llama", attention=attention)
    return instead(model, lambda positions: torch.arange(positions.shape[1]).expand(positions.shape))


def counting_on() -> Any:
    """Attention inside each example, but learnt positions that go on through the row."""
    model = of("gpt2", GPT2)
    table = model.transformer.wpe
    table.forward = lambda ids: table.weight[: ids.shape[1]].expand(*ids.shape, -1)
    return model


LEAKS = "does not keep packed examples apart: other tokens in a packed example change logits of the next one"


@pytest.mark.parametrize(
    "make, message",
    [
        (without_borders, rf"^data.packing: llama \(attention by sdpa\) {LEAKS}.*Fix: data\.packing: false\.$"),
        (partial(without_borders, "eager"), rf"{LEAKS}.*Fix: data\.packing: false, or model\.attention: sdpa if"),
        (lambda: instead(support.llama(), lambda p: p[:1].expand(p.shape)), LEAKS),  # the first row only
        (partial(of, "opt", OPT), rf"opt .*{LEAKS}"),
        (partial(of, "lfm2", layer_types=["conv", "full_attention"]), rf"lfm2 .*{LEAKS}"),
        (counting_on, r"gpt2 .*logits of a packed example differ from those of the example alone by 0"),
        (partial(of, "bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 4}), "bloom, which takes no position_ids"),
    ],
    ids=["without borders", "eager", "first row only", "opt", "lfm2", "counting on", "bloom"],
)
def test_models_that_do_not_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        packed_layout(make())
