"""The loss of a micro-batch without the model's logits: that of the plain formula, for every head and what follows."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig, LlamaForCausalLM

from qdora.adapter.adapted_linear import AdaptedLinear
from qdora.adapter.frozen_linear import FrozenLinear
from qdora.model.inject import adapter_parameters, inject, replace_module
from qdora.quant.packed import quantize
from qdora.train import output_head
from qdora.train.output_head import LogitForm
from qdora.train.passes import batch_loss
from tests import reference, support

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
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def batch(seed: int = 0) -> Batch:
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
    support.move_all_parameters_(model)
    return model


def liar() -> nn.Module:
    """A config that names a softcap and a scale to which the model pays no heed."""
    model = support.llama()
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


def made(kind: Any, **fields: Any) -> Any:
    config = LlamaConfig(**SIZES)
    for name, value in fields.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return kind(config).eval()


def quantised_head() -> nn.Module:
    model = support.llama(tie_word_embeddings=False, hidden_size=64)
    replace_module(model, "lm_head", FrozenLinear(quantize(model.lm_head.weight.detach(), "nf4", 64)))
    return model


KNOWN: dict[str, tuple[Callable[[], nn.Module], LogitForm]] = {
    "llama, tied": (support.llama, LogitForm()),
    "llama, head of its own": (lambda: support.llama(tie_word_embeddings=False), LogitForm()),
    "gemma2, softcap": (
        lambda: of(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5)),
        LogitForm(softcap=0.5),
    ),
    "gemma2, a softcap far above its logits": (lambda: of(Gemma2Config(**SIZES, head_dim=8)), LogitForm(softcap=30.0)),
    "granite, divided": (lambda: of(GraniteConfig(**SIZES, logits_scaling=4.0)), LogitForm(scale=0.25)),
    "cohere, multiplied": (lambda: of(CohereConfig(**SIZES, logit_scale=0.0625)), LogitForm(scale=0.0625)),
    "multiplied by logits_scaling": (lambda: made(Multiplied, logits_scaling=0.25), LogitForm(scale=0.25)),
    "a config that is not followed": (liar, LogitForm()),
    "quantised head": (quantised_head, LogitForm()),
}


def from_logits(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum of the plain formula, over all logits of the model."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].reshape(-1, VOCABULARY)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum")


def assert_equal_to_plain(model: nn.Module, twin: nn.Module, chunk: int | None = 4) -> None:
    """Sum and gradients of every trainable parameter over two batches: the first one is the one that is learnt from."""
    for seed in (0, 1):
        ids, mask, labels = batch(seed)
        loss = batch_loss(model, ids, mask, labels, chunk=chunk).nll_sum
        expected = from_logits(twin, ids, mask, labels)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        loss.backward()
        expected.backward()
    gradients = {name: p.grad for name, p in adapter_parameters(twin).items()}
    assert gradients
    for name, parameter in adapter_parameters(model).items():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("chunk", [None, 1, 4])
@pytest.mark.parametrize("name", KNOWN)
def test_adapters_get_the_gradient_of_the_full_logits(name: str, chunk: int | None) -> None:
    make, form = KNOWN[name]
    model, twin = adapted(make()), adapted(make())
    assert_equal_to_plain(model, twin, chunk)
    assert output_head._FORMS[model] == form  # the chunked loss, not the way back
    assert model(input_ids=batch()[0]).logits.shape == (3, 11, VOCABULARY)  # the selection is gone afterwards


@pytest.mark.parametrize("name", KNOWN)
def test_the_form_is_learnt_in_bf16_too(name: str) -> None:
    make, form = KNOWN[name]
    model = make().to(torch.bfloat16)
    with torch.no_grad():
        loss = batch_loss(model, *batch()).nll_sum
        assert output_head._FORMS[model] == form
        assert float(loss) == pytest.approx(float(from_logits(model.float(), *batch())), rel=0.02)


@pytest.mark.parametrize("name", ["llama, tied", "gemma2, softcap"])
def test_losses_are_those_of_each_sequence_alone_in_float64(name: str) -> None:
    model = KNOWN[name][0]()
    ids, mask, labels = batch()
    loss = batch_loss(model, ids, mask, labels)
    for row, length in enumerate((11, 7, 11)):
        with torch.no_grad():
            logits = model(input_ids=ids[row : row + 1, :length]).logits[0].double().numpy()
        nll, count = reference.token_nll(logits[:-1], labels[row, 1:length].numpy())
        assert float(loss.example_nll[row]) == pytest.approx(nll, rel=1e-5)
        assert int(loss.example_tokens[row]) == count == (5, 1, 0)[row]
    assert float(loss.nll_sum.detach()) == pytest.approx(float(loss.example_nll.sum()), rel=1e-6)


def adapted_head(name: str) -> Any:
    model = adapted(KNOWN[name][0](), targets=["q_proj", "lm_head"])
    assert isinstance(model.get_output_embeddings(), AdaptedLinear)
    return model


def recomputed() -> Any:
    model = adapted(support.llama()).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: adapted_head("gemma2, softcap"),
        lambda: adapted_head("granite, divided"),
        lambda: adapted_head("llama, head of its own"),
        lambda: support.llama(tie_word_embeddings=True),
        lambda: support.llama(tie_word_embeddings=False),
        recomputed,
    ],
    ids=["adapted, capped", "adapted, divided", "adapted", "trained, tied", "trained", "recomputed blocks"],
)
def test_a_trained_head_gets_its_gradient_a_chunk_at_a_time(make: Callable[[], Any]) -> None:
    model = make()
    assert_equal_to_plain(model, make())
    assert output_head._FORMS[model] is not None
    head = [p for p in model.get_output_embeddings().parameters() if p.requires_grad]
    assert all(p.grad is not None for p in head)


def test_an_adapted_head_under_dropout_repeats_its_mask_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for kept in (False, True):
        model = adapted(support.llama(tie_word_embeddings=False), targets=["lm_head"], dropout=0.5).train()
        if kept:  # no recompute
            monkeypatch.setattr(output_head, "checkpoint", lambda function, *args, use_reentrant: function(*args))
        torch.manual_seed(3)
        batch_loss(model, *batch(), chunk=4).nll_sum.backward()
        assert output_head._FORMS[model] is not None  # learnt through the mask
        gradients.append(model.lm_head.lora_A.grad)
    assert torch.equal(*gradients)


def test_the_models_head_sees_a_dozen_rows_once_and_then_one() -> None:
    model: Any = KNOWN["gemma2, softcap"][0]()
    model.requires_grad_(False)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, _a, out: rows.append(out.shape[1]))
    for seed in (0, 1, 2):
        batch_loss(model, *batch(seed))
    assert rows == [12, 1, 1]


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]], ids=["frozen head", "adapted head"])
def test_what_is_not_known_is_said_once_and_done_by_the_model(targets: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, twin = (adapted(made(Odd), targets=targets) for _ in range(2))
    torch.manual_seed(5)
    torch.rand(3)
    after_one_forward = torch.get_rng_state()
    torch.manual_seed(5)
    with caplog.at_level(logging.WARNING):
        batch_loss(model, *batch(7))
        assert torch.equal(torch.get_rng_state(), after_one_forward)
        assert model.num_calls == 2
        assert_equal_to_plain(model, twin)
    assert model.num_calls == 4
    (record,) = caplog.records
    for words in ("llama: ", "memory.loss_chunk has no effect", "about 0.00 GiB for the 6 of this micro-batch"):
        assert words in record.getMessage()


def test_a_head_that_does_not_do_what_its_weight_says_is_left_to_the_model(caplog: pytest.LogCaptureFixture) -> None:
    model, twin = adapted(support.llama()), adapted(support.llama())
    for each in (model, twin):
        each.lm_head.register_forward_hook(lambda _m, _a, out: out + 5.0 * torch.arange(VOCABULARY) / VOCABULARY)
    assert_equal_to_plain(model, twin)
    assert len(caplog.records) == 1


def test_the_first_batch_may_have_no_labels_and_a_model_is_not_kept_alive() -> None:
    model = adapted(KNOWN["gemma2, softcap"][0]())
    ids, mask, labels = batch()
    empty = batch_loss(model, ids, mask, torch.full_like(labels, -100))
    empty.nll_sum.backward()
    assert float(empty.nll_sum.detach()) == 0.0
    assert empty.example_nll.tolist() == [0.0, 0.0, 0.0]
    assert model not in output_head._FORMS
    loss = batch_loss(model, ids, mask, labels)
    torch.testing.assert_close(loss.nll_sum, from_logits(model, ids, mask, labels), rtol=1e-5, atol=1e-5)
    before = len(output_head._FORMS)
    del model, empty, loss
    gc.collect()
    assert len(output_head._FORMS) < before
