"""Packed rows through real models: every example as if it were alone, or a clear refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from qdora.data.batching import Batching, micro_batches
from qdora.data.tokenize import TokenizedExample
from qdora.errors import UserError
from qdora.train import packed_attention
from qdora.train.packed_attention import packed_layout
from qdora.train.passes import batch_loss
from tests import reference, tiny
from tests.tiny_steps import examples

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def gemma2() -> nn.Module:
    """Every other layer sees four tokens; logits are capped."""
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, head_dim=8, sliding_window=4, final_logit_softcapping=0.5)
    config._attn_implementation = "eager"  # older releases of transformers choose another one, which caps nothing
    return Gemma2ForCausalLM(config).eval()


def mistral() -> nn.Module:
    """All layers see four tokens."""
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)).eval()


def gpt2() -> nn.Module:
    """Learnt positions."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    ).eval()


def eager() -> nn.Module:
    model = tiny.llama()
    model.set_attn_implementation("eager")  # type: ignore[operator]
    return model


MODELS = {"llama": tiny.llama, "eager": eager, "gemma2": gemma2, "mistral": mistral, "gpt2": gpt2}


def nll_alone(model: nn.Module, example: TokenizedExample) -> float:
    """Of the example as a batch of one, from the model's own logits."""
    ids = torch.from_numpy(example.input_ids).long()[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double().numpy()
    labels = np.where(example.loss_mask, example.input_ids, -100)
    return reference.token_nll(logits[:-1], labels[1:])[0] if len(labels) > 1 else 0.0


@pytest.mark.parametrize("layout", ["rows", "single"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_packed_losses_are_those_of_each_example_alone(make: Any, layout: Any) -> None:
    """Also of an example without a label."""
    model, found, seen = make(), examples(), {}
    found[3] = TokenizedExample("b", "3", found[3].input_ids, np.zeros_like(found[3].loss_mask))
    batches = micro_batches(found, Batching(75, 0, layout, 25), ["a", "b"])
    assert max(len(micro.input_ids) for micro in batches) == (3 if layout == "rows" else 1)
    for micro in batches:
        loss = batch_loss(model, micro.input_ids, micro.attention_mask, micro.labels, packing=micro.packing)
        assert float(loss.nll_sum.detach()) == pytest.approx(float(loss.example_nll.sum()), rel=1e-6)
        for name, nll, count in zip(micro.example_ids, loss.example_nll, loss.example_tokens, strict=True):
            seen[name] = (float(nll), int(count))
    assert len(seen) == len(found)
    for example in found:
        nll, count = seen[example.id]
        assert nll == pytest.approx(nll_alone(model, example), rel=1e-5, abs=1e-5)
        assert count == example.loss_mask.sum()


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [*MODELS.values(), mixtral], ids=[*MODELS, "mixtral"])
def test_models_that_keep_examples_apart_are_found_to_do_so(make: Any, dtype: torch.dtype) -> None:
    model = make().to(dtype).train()
    frozen = next(model.children()).eval()
    before = torch.get_rng_state()
    layout, said = packed_layout(model)
    assert layout == "rows"
    assert f"attention by {'eager' if make in (eager, gemma2) else 'sdpa'}, " in said
    assert ("sliding_attention" in said) == (make is gemma2)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert not frozen.training


@pytest.mark.parametrize(("noise", "is_refused"), [(2e-6, False), (1e-3, True)])
def test_the_rounding_of_float32_kernels_is_no_leak(
    noise: float, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of another shape takes other kernels: SmolLM2's logits in float32 move by 1.7e-5 with a size of 20."""
    real, generator = packed_attention._probe_outputs, torch.Generator().manual_seed(0)

    def noisy(*args: Any) -> torch.Tensor:
        logits = real(*args)
        return logits + noise * logits.abs().max() * torch.randn(logits.shape, generator=generator)

    monkeypatch.setattr(packed_attention, "_probe_outputs", noisy)
    if is_refused:
        with pytest.raises(UserError, match="does not keep packed examples apart"):
            packed_layout(tiny.llama())
    else:
        packed_layout(tiny.llama())


def test_kernels_for_variable_lengths_get_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash_attention_2 itself cannot run here; sdpa takes a single row as well."""
    names = ("sdpa", "eager", "flex_attention", "flash_attention_2", "kernels-community/flash-attn2")
    assert [packed_attention.layout_for(name) for name in names] == ["rows"] * 3 + ["single"] * 2
    monkeypatch.setattr(packed_attention, "layout_for", lambda attention: "single")
    model, shapes = tiny.llama(), []
    real = model.forward

    def forward(input_ids: Any, position_ids: Any = None, **options: Any) -> Any:
        shapes.append(tuple(input_ids.shape))
        return real(input_ids=input_ids, position_ids=position_ids, **options)

    model.forward = forward  # type: ignore[method-assign]
    assert packed_layout(model)[0] == "single"  # type: ignore[arg-type]
    assert shapes == [(1, 9), (1, 15), (1, 22), (1, 19), (1, 22), (1, 19)]


def instead(change: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """A Llama that takes other positions than it is given."""
    model = tiny.llama()
    real = model.forward

    def forward(input_ids: Any, position_ids: Any = None, **options: Any) -> Any:
        changed = None if position_ids is None else change(position_ids)
        return real(input_ids=input_ids, position_ids=changed, **options)

    model.forward = forward  # type: ignore[method-assign]
    return model


def without_borders() -> nn.Module:
    return instead(lambda positions: torch.arange(positions.shape[1]).expand(positions.shape))


def first_row_only() -> nn.Module:
    return instead(lambda positions: positions[:1].expand(positions.shape))


def counting_on() -> nn.Module:
    """Attention inside each example, but learnt positions that go on through the row."""
    model = gpt2()
    table: nn.Module = model.transformer.wpe  # type: ignore[assignment, union-attr]
    table.forward = lambda ids: table.weight[: ids.shape[1]].expand(*ids.shape, -1)  # type: ignore[method-assign, index]
    return model


def opt() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "num_hidden_layers": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=97, num_attention_heads=4, **sizes)).eval()


def lfm2() -> nn.Module:
    """A convolution over the row, then attention."""
    torch.manual_seed(0)
    return Lfm2ForCausalLM(Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])).eval()


def bloom() -> nn.Module:
    return BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4)).eval()


LEAKS = r"does not keep packed examples apart: other tokens in a packed example change logits of the next one"


@pytest.mark.parametrize(
    "make, message",
    [
        (without_borders, rf"^data.packing: llama \(attention by sdpa\) {LEAKS}.*Fix: data\.packing: false\.$"),
        (first_row_only, rf"^data.packing: llama .*{LEAKS}"),
        (opt, rf"^data.packing: opt .*{LEAKS}"),
        (lfm2, rf"^data.packing: lfm2 .*{LEAKS}"),
        (counting_on, r"^data.packing: gpt2 .*logits of a packed example differ from those of the example alone by 0"),
        (bloom, r"^data.packing: must be false for bloom, which takes no position_ids \(got true\)\.$"),
    ],
    ids=["without borders", "first row only", "opt", "lfm2", "counting on", "bloom"],
)
def test_models_that_do_not_are_refused(make: Any, message: str) -> None:
    model = make()
    with pytest.raises(UserError, match=message):
        packed_layout(model)
    if make is without_borders:
        model.set_attn_implementation("eager")
        with pytest.raises(UserError, match=r"Fix: data\.packing: false, or model\.attention: sdpa if"):
            packed_layout(model)
