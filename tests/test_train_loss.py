"""The loss of a micro-batch without the model's logits, for every head; and of packed examples, each as if alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qdora.adapter.layer import FrozenLinear
from qdora.data.batches import Batching, micro_batches
from qdora.data.tokenize import TokenizedExample
from qdora.errors import UserError
from qdora.model.inject import adapter_parameters, inject, replace_module
from qdora.quant.packed import quantize
from qdora.train import guards as packed_attention
from qdora.train import loss as output_head
from qdora.train.guards import packed_layout
from qdora.train.loss import LogitForm
from qdora.train.passes import batch_loss
from tests import reference, support
from tests.support import examples

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


def of(
    kind: str, sizes: dict[str, Any] = SIZES, attention: str | None = None, loud: bool = False, **fields: Any
) -> Any:
    """A model; a loud one has logits of the order of 1, so that what follows the head shows in the loss."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{"vocab_size": VOCABULARY} | sizes | fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for parameter in model.parameters():
        if loud and parameter.ndim == 2:
            parameter.data *= 5.0
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
    "llama, head of its own": (partial(support.llama, tie_word_embeddings=False), LogitForm()),
    "softcap": (partial(of, "gemma2", loud=True, head_dim=8, final_logit_softcapping=0.5), LogitForm(softcap=0.5)),
    "softcap far above its logits": (partial(of, "gemma2", loud=True, head_dim=8), LogitForm(softcap=30.0)),
    "granite, divided": (partial(of, "granite", loud=True, logits_scaling=4.0), LogitForm(scale=0.25)),
    "cohere, multiplied": (partial(of, "cohere", loud=True, logit_scale=0.0625), LogitForm(scale=0.0625)),
    "multiplied by logits_scaling": (partial(made, Multiplied, logits_scaling=0.25), LogitForm(scale=0.25)),
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


@pytest.mark.parametrize("name", KNOWN)
def test_adapters_get_the_gradient_of_the_full_logits(name: str) -> None:
    make, form = KNOWN[name]
    for chunk in (None, 1, 4):
        model, twin = adapted(make()), adapted(make())
        assert_equal_to_plain(model, twin, chunk)
        assert output_head._FORMS[model] == form  # the chunked loss, not the way back
        assert model(input_ids=batch()[0]).logits.shape == (3, 11, VOCABULARY)  # the selection is gone afterwards
    # Learnt in bf16, too
    half = make().to(torch.bfloat16)
    with torch.no_grad():
        loss = batch_loss(half, *batch()).nll_sum
        assert output_head._FORMS[half] == form
        assert float(loss) == pytest.approx(float(from_logits(half.float(), *batch())), rel=0.02)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        *((name, ["q_proj", "lm_head"]) for name in ("llama, head of its own", "softcap", "granite, divided")),
        ("llama, tied", None),
        ("llama, head of its own", None),
    ],
    ids=str,
)
def test_a_trained_head_gets_its_gradient_a_chunk_at_a_time(name: str, targets: Any) -> None:
    """Also where blocks are computed again."""
    make, form = KNOWN[name]
    model, twin = (adapted(make(), targets=targets) if targets else make() for _ in range(2))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal_to_plain(model.train(), twin)
    assert output_head._FORMS[model] == form
    head = [p for p in model.get_output_embeddings().parameters() if p.requires_grad]
    assert head
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
    assert "memory.loss_chunk has no effect" in record.getMessage()


def test_the_first_batch_may_have_no_labels() -> None:
    model = adapted(KNOWN["softcap"][0]())
    ids, mask, labels = batch()
    empty = batch_loss(model, ids, mask, torch.full_like(labels, -100))
    empty.nll_sum.backward()
    assert float(empty.nll_sum.detach()) == 0.0
    assert empty.example_nll.tolist() == [0.0, 0.0, 0.0]
    assert model not in output_head._FORMS
    loss = batch_loss(model, ids, mask, labels)
    torch.testing.assert_close(loss.nll_sum, from_logits(model, ids, mask, labels), rtol=1e-5, atol=1e-5)


GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}


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
    """Of the example as a batch of one, from the model's own logits in float64."""
    ids = torch.from_numpy(example.input_ids).long()[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double().numpy()
    labels = np.where(example.loss_mask, example.input_ids, -100)
    return reference.token_nll(logits[:-1], labels[1:])[0] if len(labels) > 1 else 0.0


@pytest.mark.parametrize("layout", [None, "rows", "single"])
@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_each_example_alone(name: str, layout: Any) -> None:
    """Padded or packed, also of an example without a label; and the model is found to keep packed examples apart."""
    model, found, seen = MODELS[name](), examples(), {}
    found[3] = TokenizedExample("b", "3", found[3].input_ids, np.zeros_like(found[3].loss_mask))
    batches = micro_batches(found, Batching(75, 0, layout, 25) if layout else Batching(75, 0), ["a", "b"])
    assert (max(len(micro.input_ids) for micro in batches) > 1) == (layout != "single")
    for micro in batches:
        loss = batch_loss(model, micro.input_ids, micro.attention_mask, micro.labels, packing=micro.packing)
        assert float(loss.nll_sum.detach()) == pytest.approx(float(loss.example_nll.sum()), rel=1e-6)
        seen |= dict(zip(micro.example_ids, loss.example_nll.tolist(), strict=True))
    assert len(seen) == len(found)
    for example in found:
        assert seen[example.id] == pytest.approx(nll_alone(model, example), rel=1e-5, abs=1e-5)
    model.to(torch.bfloat16 if layout == "single" else torch.float32).train()
    frozen = next(model.children()).eval()
    before = torch.get_rng_state()
    layout, said = packed_layout(model)
    assert layout == "rows"
    assert f"attention by {'eager' if name in ('eager', 'gemma2') else 'sdpa'})" in said
    assert torch.equal(torch.get_rng_state(), before)
    assert (model.training, frozen.training) == (True, False)


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
    assert shapes == [(1, 22)] * 4


def without_borders(attention: str = "sdpa") -> Any:
    model = of("llama", attention=attention)
    return instead(model, lambda positions: torch.arange(positions.shape[1]).expand(positions.shape))


def counting_on() -> Any:
    """Attention inside each example, but learnt positions that go on through the row."""
    model = of("gpt2", GPT2)
    table = model.transformer.wpe
    table.forward = lambda ids: table.weight[: ids.shape[1]].expand(*ids.shape, -1)
    return model


LEAKS = r"does not keep examples apart: other tokens in one change logits of the next by [\d.]*[1-9]"


@pytest.mark.parametrize(
    "make, message",
    [
        (without_borders, rf"^data.packing: must be false for llama \(attention by sdpa\), which {LEAKS}"),
        (partial(without_borders, "eager"), LEAKS),
        (lambda: instead(support.llama(), lambda p: p[:1].expand(p.shape)), LEAKS),  # the first row only
        (partial(of, "lfm2", layer_types=["conv", "full_attention"]), rf"lfm2 .*{LEAKS}"),
        (counting_on, r"gpt2 .* of the next by \S+ \(rounding: .*, packing by 0\.\d"),
        (partial(of, "bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 4}), "bloom, which takes no position_ids"),
    ],
    ids=["without borders", "eager", "first row only", "lfm2", "counting on", "bloom"],
)
def test_models_that_do_not_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        packed_layout(make())
