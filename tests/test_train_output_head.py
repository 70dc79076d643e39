"""The loss without the model's logits: equal to the loss from them, for every head and whatever follows the head."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig, LlamaForCausalLM

from qdora.model.inject import adapter_parameters, inject, replace_module
from qdora.nn.adapted_linear import AdaptedLinear
from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops.packed import quantize
from qdora.train import output_head
from qdora.train.output_head import LogitForm
from qdora.train.passes import batch_loss
from tests import tiny

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three padded examples with 5, 1 and no labelled tokens."""
    ids = torch.randint(1, 90, (3, 11), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    labels = torch.full_like(ids, -100)
    labels[0, 6:] = ids[0, 6:]
    labels[1, 6] = ids[1, 6]
    return ids * mask, mask, labels


def of(config: Any) -> nn.Module:
    """A model whose logits are of the order of 1, so that what follows the head shows in the loss."""
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5.0)
    return model


def adapted(model: nn.Module, **options: Any) -> Any:
    """The model with adapters off their start, the same ones for the same model."""
    inject(model, rank=2, dtype=torch.float32, generator=torch.Generator().manual_seed(0), **options)
    tiny.move_all_parameters_(model)
    return model


def liar() -> nn.Module:
    """A config that names a softcap and a scale to which the model pays no heed."""
    model = tiny.llama()
    model.config.final_logit_softcapping = 0.5
    model.config.logit_scale = 3.0
    return model


class Multiplied(LlamaForCausalLM):  # type: ignore[misc]
    """Multiplies with the field that Granite divides by, as HyperCLOVA X does."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.config.logits_scaling
        return output


class Odd(LlamaForCausalLM):  # type: ignore[misc]
    """Does something with its logits that no config names."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.num_calls = getattr(self, "num_calls", 0) + 1
        output = super().forward(*args, **kwargs)
        torch.rand(3)  # as dropout would
        output.logits = output.logits - 0.1 * output.logits.square()
        return output


def multiplied() -> nn.Module:
    config = LlamaConfig(**SIZES)
    config.logits_scaling = 0.25
    torch.manual_seed(0)
    return Multiplied(config).eval()


def odd() -> Any:
    torch.manual_seed(0)
    return Odd(LlamaConfig(**SIZES)).eval()


def quantised_head() -> nn.Module:
    model = tiny.llama(tie_word_embeddings=False, hidden_size=64)
    replace_module(model, "lm_head", FrozenLinear(quantize(model.lm_head.weight.detach(), "nf4", 64)))
    return model


KNOWN: dict[str, Callable[[], nn.Module]] = {
    "llama, tied": tiny.llama,
    "llama, head of its own": lambda: tiny.llama(tie_word_embeddings=False),
    "gemma2, softcap": lambda: of(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5)),
    "gemma2, a softcap far above its logits": lambda: of(Gemma2Config(**SIZES, head_dim=8)),
    "granite, divided": lambda: of(GraniteConfig(**SIZES, logits_scaling=4.0)),
    "cohere, multiplied": lambda: of(CohereConfig(**SIZES, logit_scale=0.0625)),
    "multiplied by logits_scaling": multiplied,
    "a config that is not followed": liar,
    "quantised head": quantised_head,
}


def from_logits(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum of the plain formula, over all logits of the model."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].reshape(-1, VOCABULARY)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum")


def assert_equal_to_plain(model: nn.Module, twin: nn.Module, chunk: int | None, *, seeds: tuple[int, ...]) -> None:
    """Sum and gradients of every trainable parameter over two batches: the first one is the one that is learnt from."""
    for seed in seeds:
        ids, mask, labels = batch(seed)
        loss = batch_loss(model, ids, mask, labels, chunk=chunk).nll_sum
        expected = from_logits(twin, ids, mask, labels)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        loss.backward()
        expected.backward()
    gradients = {name: p.grad for name, p in adapter_parameters(twin).items()}
    assert gradients
    for name, parameter in adapter_parameters(model).items():
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture
def heads_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that the models' own heads were given, call by call."""
    rows: list[int] = []
    real = output_head.tapped

    def counting(head: nn.Module, *args: Any, **kwargs: Any) -> Any:
        head.register_forward_hook(lambda _m, _a, out: rows.append(out.shape[1]) if out.ndim == 3 else None)
        return real(head, *args, **kwargs)

    monkeypatch.setattr(output_head, "tapped", counting)
    return rows


@pytest.mark.parametrize("chunk", [None, 1, 4])
@pytest.mark.parametrize("name", KNOWN)
def test_adapters_get_the_gradient_of_the_full_logits(name: str, chunk: int | None) -> None:
    model, twin = adapted(KNOWN[name]()), adapted(KNOWN[name]())
    assert_equal_to_plain(model, twin, chunk, seeds=(0, 1))
    assert output_head._FORMS[model] is not None  # the chunked loss, not the way back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name, form",
    [
        ("llama, tied", LogitForm()),
        ("gemma2, softcap", LogitForm(softcap=0.5)),
        ("gemma2, a softcap far above its logits", LogitForm(softcap=30.0)),
        ("granite, divided", LogitForm(scale=0.25)),
        ("cohere, multiplied", LogitForm(scale=0.0625)),
        ("multiplied by logits_scaling", LogitForm(scale=0.25)),
        ("a config that is not followed", LogitForm()),
        ("quantised head", LogitForm()),
    ],
)
def test_what_is_learnt_from_a_models_first_batch(name: str, form: LogitForm, dtype: torch.dtype) -> None:
    model = KNOWN[name]().to(dtype)
    ids, mask, labels = batch()
    with torch.no_grad():
        loss = batch_loss(model, ids, mask, labels).nll_sum
        assert output_head._FORMS[model] == form
        expected = from_logits(model.float(), ids, mask, labels)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("name", ["gemma2, softcap", "granite, divided", "llama, head of its own"])
def test_an_adapted_head_gets_its_gradients_a_chunk_at_a_time(name: str) -> None:
    model, twin = (adapted(KNOWN[name](), targets=["q_proj", "lm_head"]) for _ in range(2))
    for each in (model, twin):
        assert isinstance(each.get_output_embeddings(), AdaptedLinear)
    assert_equal_to_plain(model, twin, 4, seeds=(0, 1))
    assert output_head._FORMS[model] is not None


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_trained_whole_gets_its_gradient(tied: bool) -> None:
    model, twin = (tiny.llama(tie_word_embeddings=tied) for _ in range(2))
    assert_equal_to_plain(model, twin, 4, seeds=(0, 1))
    assert model.lm_head.weight.grad is not None


def test_an_adapted_head_under_dropout_repeats_its_mask_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for kept in (False, True):
        model = adapted(tiny.llama(tie_word_embeddings=False), targets=["lm_head"], dropout=0.5).train()
        if kept:  # no recompute
            monkeypatch.setattr(output_head, "checkpoint", lambda function, *args, use_reentrant: function(*args))
        torch.manual_seed(3)
        batch_loss(model, *batch(), chunk=4).nll_sum.backward()
        assert output_head._FORMS[model] is not None  # learnt through the mask
        gradients.append(model.lm_head.lora_A.grad)
    assert torch.equal(*gradients)


def test_under_recomputed_activations() -> None:
    model, twin = adapted(tiny.llama()), adapted(tiny.llama())
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal_to_plain(model, twin, 4, seeds=(0, 1))


def test_the_models_head_sees_a_dozen_rows_once_and_then_one(heads_rows: list[int]) -> None:
    model = KNOWN["gemma2, softcap"]()
    model.requires_grad_(False)
    for seed in (0, 1, 2):
        batch_loss(model, *batch(seed))
    assert heads_rows[0] == 12
    assert set(heads_rows[1:]) == {1}


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]], ids=["frozen head", "adapted head"])
def test_what_is_not_known_is_said_once_and_done_by_the_model(targets: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, twin = adapted(odd(), targets=targets), adapted(odd(), targets=targets)
    torch.manual_seed(5)
    torch.rand(3)
    after_one_forward = torch.get_rng_state()
    torch.manual_seed(5)
    with caplog.at_level(logging.WARNING):
        batch_loss(model, *batch(7))
        assert torch.equal(torch.get_rng_state(), after_one_forward)
        assert model.num_calls == 2
        assert_equal_to_plain(model, twin, 4, seeds=(0, 1))
    assert model.num_calls == 4
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "llama: the operations after this model's head are not known, so memory.loss_chunk"
    )
    assert "about 0.00 GiB for the 6 of this micro-batch" in record.getMessage()


def test_a_head_that_does_not_do_what_its_weight_says_is_left_to_the_model(caplog: pytest.LogCaptureFixture) -> None:
    model, twin = adapted(tiny.llama()), adapted(tiny.llama())
    for each in (model, twin):
        each.lm_head.register_forward_hook(lambda _m, _a, out: out + 5.0 * torch.arange(VOCABULARY) / VOCABULARY)
    assert_equal_to_plain(model, twin, 4, seeds=(0, 1))
    assert len(caplog.records) == 1


def test_the_first_batch_may_have_no_labels() -> None:
    model = adapted(KNOWN["gemma2, softcap"]())
    ids, mask, labels = batch()
    empty = batch_loss(model, ids, mask, torch.full_like(labels, -100))
    empty.nll_sum.backward()
    assert float(empty.nll_sum.detach()) == 0.0
    assert empty.example_nll.tolist() == [0.0, 0.0, 0.0]
    assert model not in output_head._FORMS
    loss = batch_loss(model, ids, mask, labels)
    torch.testing.assert_close(loss.nll_sum, from_logits(model, ids, mask, labels), rtol=1e-5, atol=1e-5)


def test_a_model_is_not_kept_alive() -> None:
    model = tiny.llama()
    batch_loss(model, *batch())
    before = len(output_head._FORMS)
    del model
    gc.collect()
    assert len(output_head._FORMS) < before
