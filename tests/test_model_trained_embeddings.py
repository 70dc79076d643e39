"""New tokens, and embeddings and heads that are trained whole or in some rows, against float64 formulas and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast

from qdora.adapter.rows import RowEmbedding, RowHead, TrainedRows
from qdora.errors import UserError
from qdora.model.adapter_file import load_adapter, save_adapter
from qdora.model.inject import adapter_parameters, inject
from qdora.model.tokens import (
    add_tokens,
    extend_vocabulary,
    new_token_ids,
    train_embeddings,
    trained_matrices,
    untrained_rows,
)
from qdora.train.passes import batch_loss
from tests import reference, support

BOTH = ("embed_tokens", "lm_head")
NEW = (336, 337, 338)
ARCHITECTURES = ("llama", "qwen2", "gemma2")  # tied, untied, tied with scaled embeddings
IDS = torch.tensor([[1, 337, 17, 336, 337, 5, 338, 260]])


class Bag(nn.Module):
    """h_t = E[x_t], z_t = h_t V^T: the smallest causal LM, whose gradients are two sums."""

    def __init__(self, tied: bool, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(11, 6, dtype=dtype)
        self.head = nn.Linear(6, 11, bias=False, dtype=dtype)
        for module in (self.embed, self.head):
            module.weight.data = torch.randn(11, 6, generator=generator, dtype=torch.float64).to(dtype)
            module.weight.requires_grad_(False)
        self.all_tied_weights_keys = {"head.weight": "embed.weight"} if tied else {}
        if tied:
            self.head.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_rows_that_the_base_never_trained():
    model: Any = Bag(tied=False)
    model.embed.weight.data[[2, 5]] = 0.0
    model.head.weight.data[[5, 7]] = -1e-17
    model.head.weight.data[8] = 1e-15
    everything = list(range(11))
    assert untrained_rows(model, everything, everything) == [2, 5, 7]
    assert untrained_rows(model, [0, 5], [8]) == [5]
    assert untrained_rows(model, [0], []) == []
    model.head = RowHead(model.head, TrainedRows([1], torch.ones(1, 6)))
    assert untrained_rows(model, everything, everything) == [2, 5, 7]
    model.head.base.weight.requires_grad_(True)
    assert untrained_rows(model, everything, everything) == [2, 5]
    model.head = nn.Identity()
    assert untrained_rows(model, everything, everything) == [2, 5]


@pytest.mark.parametrize("rows", [(3, 4, 9), None])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_gradients_are_those_of_the_formula(tied, rows):
    model: Any = Bag(tied)
    train_embeddings(model, BOTH if not tied else BOTH[:1], rows)
    support.move_all_parameters_(model)
    ids = torch.tensor([[3, 0, 9, 3, 10, 4, 3]])
    gradient = torch.randn(1, 7, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = model.head(model.embed(ids))
    logits.backward(gradient)
    matrices = [found.values.detach().double().numpy() for found in trained_matrices(model).values()]
    start, chosen = Bag(tied), list(range(11)) if rows is None else list(rows)
    weights = [start.embed.weight.numpy().copy(), start.head.weight.numpy().copy()]
    for weight, matrix in zip(weights, matrices * (2 if tied else 1), strict=True):
        weight[chosen] = matrix
    expected, of_embedding, of_head = reference.bag_of_tokens(ids[0].numpy(), *weights, gradient[0].numpy())
    np.testing.assert_allclose(logits[0].detach().numpy(), expected, rtol=1e-6)
    found = [parameter.grad.double().numpy() for parameter in adapter_parameters(model).values()]
    wanted = [of_embedding + of_head] if tied else [of_embedding, of_head]
    for got, each in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, each[chosen], rtol=1e-5, atol=1e-6)


def grown(architecture: str = "llama", *, quant: str | None = "nf4", ids: tuple[int, ...] = NEW, **options: Any) -> Any:
    model = support.base_model(architecture, quant=quant, **options)
    extend_vocabulary(model, ids)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_new_rows_start_at_the_mean_and_old_rows_stay(architecture):
    before, model = support.base_model(architecture), grown(architecture, quant=None, ids=(334, 335, 336, 337))
    for old, new in zip(*((m.get_input_embeddings(), m.get_output_embeddings()) for m in (before, model)), strict=True):
        assert new.weight.shape == (338, 32)
        assert torch.equal(new.weight[:334], old.weight[:334])
        mean = old.weight[:334].double().mean(0).expand(4, -1)
        torch.testing.assert_close(new.weight[334:].double(), mean, rtol=1e-5, atol=1e-7)
    assert model.config.vocab_size == model.vocab_size == 338
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (architecture != "qwen2")
    assert support.logits_of(model).shape[-1] == 338


@pytest.mark.parametrize("rows", [NEW, None])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_step_of_the_whole_model_has_the_gradients_of_a_plain_twin(architecture, rows):
    model, twin = (grown(architecture, quant=None) for _ in range(2))
    inject(model, dtype=torch.float32, rank=2)
    train_embeddings(model, BOTH, rows)
    twin.requires_grad_(False)
    both = twin.get_input_embeddings(), twin.get_output_embeddings()
    for module in both:
        module.weight.requires_grad_(True)
    for each in (model, twin):
        each.train()
        first, again = (batch_loss(each, IDS, torch.ones_like(IDS), IDS.clone()).nll_sum for _ in range(2))
        torch.testing.assert_close(first, again)  # the logits' form is known in the second
        again.backward()
    chosen = slice(None) if rows is None else list(rows)
    found = list(trained_matrices(model).values())
    assert len(found) == (2 if architecture == "qwen2" else 1)
    for matrix, module in zip(found, both, strict=False):
        assert matrix.values.grad is not None
        torch.testing.assert_close(matrix.values.grad, module.weight.grad[chosen], rtol=1e-4, atol=1e-6)
    others = [p for name, p in model.named_parameters() if p.grad is None and "lora" not in name]
    assert others
    assert not any(p.requires_grad for p in others)


def saved(model: Any, directory: Path) -> Path:
    save_adapter(model, directory, base_name_or_path=None, revision=None, base_quant={"quant": "none"})
    return directory


def trained(architecture: str, rows: tuple[int, ...] | None, **options: Any) -> Any:
    model = grown(architecture, quant=None, **options)
    support.move_adapters_(inject(model, dtype=torch.float32, rank=3, alpha=6.0))
    train_embeddings(model, BOTH, rows)
    generator = torch.Generator().manual_seed(3)
    for found in trained_matrices(model).values():
        found.values.data += 0.02 * torch.randn(found.values.shape, generator=generator).to(found.values.dtype)
    return model


@pytest.mark.parametrize(("architecture", "rows"), [("llama", NEW), ("qwen2", None), ("qwen2", NEW), ("gemma2", None)])
def test_saved_and_loaded_is_the_same_model_here_and_in_peft(tmp_path, architecture, rows):
    model = trained(architecture, rows)
    expected = support.logits_of(model, IDS)
    directory = saved(model, tmp_path / "adapter")
    again = grown(architecture, quant=None)
    load_adapter(again, directory)
    assert torch.equal(support.logits_of(again, IDS), expected)
    files = [folder / "adapter_model.safetensors" for folder in (directory, saved(again, tmp_path / "again"))]
    assert files[0].read_bytes() == files[1].read_bytes()
    base = support.base_model(architecture)
    base.resize_token_embeddings(339)
    theirs = peft.PeftModel.from_pretrained(base, str(directory)).eval()
    torch.testing.assert_close(support.logits_of(theirs, IDS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("architecture", "rows"), [("llama", (338, 336, 337)), ("qwen2", NEW), ("llama", None)])
def test_an_adapter_of_peft_loads(tmp_path, architecture, rows):
    names = ["embed_tokens"] if architecture == "llama" else list(BOTH)
    how: dict[str, Any] = {"modules_to_save": names, "ensure_weight_tying": True}
    if rows is not None:
        how = {"trainable_token_indices": {name: list(rows) for name in names}}
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM", **how)
    theirs = peft.get_peft_model(grown(architecture, quant=None), config)
    support.move_all_parameters_(theirs)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = grown(architecture, quant=None)
    load_adapter(ours, tmp_path)
    wanted = support.logits_of(theirs.eval(), IDS)
    torch.testing.assert_close(support.logits_of(ours, IDS), wanted, rtol=1e-4, atol=1e-4)


DENSE_HEAD = r"the head must be dense, .* \(got AdaptedLinear\)"

BOTH_OF_QWEN = "must have embed_tokens and lm_head for this model"


@pytest.mark.parametrize(
    ("architecture", "targets", "names", "rows", "options", "fault"),
    [
        ("llama", [], BOTH[1:], None, {}, "must have embed_tokens for this model"),
        ("qwen2", [], BOTH[:1], NEW, {}, BOTH_OF_QWEN),
        ("qwen2", [], BOTH[1:], NEW, {}, BOTH_OF_QWEN),
        ("qwen2", [], BOTH[:1], None, {"has_new": True}, BOTH_OF_QWEN),
        ("qwen2", ["lm_head"], BOTH, NEW, {}, DENSE_HEAD),
        ("llama", ["lm_head"], BOTH[:1], None, {}, DENSE_HEAD),
    ],
)
def test_what_cannot_be_trained_is_refused(architecture, targets, names, rows, options, fault):
    model = grown(architecture, quant=None if targets else "nf4")
    if targets:
        inject(model, targets=targets, rank=2)
    with pytest.raises(UserError, match=fault):
        train_embeddings(model, names, rows, **options)


def test_adapters_that_do_not_fit_are_refused_and_one_with_the_head_fits(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", modules_to_save=["embed_tokens"])
    theirs = peft.get_peft_model(support.base_model(), config)
    theirs.save_pretrained(tmp_path / "untied", save_embedding_layers=False)
    saved(trained("llama", NEW), tmp_path / "rows")
    for name, fault in (
        ("untied", "the adapter unties the model's head"),
        ("rows", r"trainable_token_indices: must be below 336"),
    ):
        with pytest.raises(UserError, match=fault):
            load_adapter(support.base_model(), tmp_path / name)
    model, again = support.base_model("qwen2"), support.base_model("qwen2")
    inject(model, targets=["q_proj", "lm_head"], rank=2)
    train_embeddings(model, BOTH[:1], None)
    support.move_all_parameters_(model)
    load_adapter(again, saved(model, tmp_path / "head"))
    assert torch.equal(support.logits_of(again), support.logits_of(model))


def test_rows_are_float32_and_no_bfloat16_update_is_lost():
    model = grown("qwen2", dtype=torch.bfloat16)
    inject(model, dtype=torch.bfloat16, rank=2)
    train_embeddings(model, BOTH, NEW)
    modules = model.get_input_embeddings(), model.get_output_embeddings()
    assert [type(each) for each in modules] == [RowEmbedding, RowHead]
    assert all(each.trained.rows.dtype == torch.float32 for each in modules)
    assert model.dtype == torch.bfloat16
    # Mamba casts its hidden states to the dtype of the head's weight, and the base computes in bfloat16.
    assert all(each.weight.dtype == torch.bfloat16 and each.weight.shape == (339, 32) for each in modules)
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16
    trained = TrainedRows([1, 3], rows := torch.randn(2, 4))
    assert torch.equal(trained.to(torch.bfloat16).rows, rows)  # not narrowed by a cast of the model
    assert trained.double().rows.dtype == torch.float64


def test_added_tokens_get_the_next_ids_and_are_never_split():
    tokenizer = support.tokenizer()
    size, tokens = len(tokenizer), ("<tool>", "ab cd", "</tool>")
    add_tokens(tokenizer, tokens)
    assert new_token_ids(tokenizer, tokens) == (size, size + 1, size + 2)
    ids = tokenizer("x<tool>ab cd</tool>y", add_special_tokens=False)["input_ids"]
    assert ids[1:4] == [size, size + 1, size + 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "x<tool>ab cd</tool>y"
    fault = rf"add_tokens: '<tool>' is token {size} of this tokenizer already"
    with pytest.raises(UserError, match=fault):
        add_tokens(tokenizer, ("<new>", "<tool>"))
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "c": 5, "?": 6}, unk_token="?"))
    with pytest.raises(UserError, match="one after the other"):  # else a new token would share the row of c
        add_tokens(PreTrainedTokenizerFast(tokenizer_object=words), ("<x>", "<y>"))
