"""Which layers get adapters, at which rank, and what is said when a name is wrong."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import nn

from qdora.errors import UserError
from qdora.model.adapter_file import load_adapter, save_adapter
from qdora.model.build_model import put_adapters
from qdora.model.inject import adapted_layers, adapter_parameters, frozen_layers, inject, matches
from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops.packed import quantize
from qdora.recipe.settings import AdapterConfig
from tests import tiny, tiny_run

BLOCK = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_all_linear_is_every_linear_layer_but_the_head() -> None:
    model = tiny.llama()
    layers = inject(model, rank=2)
    assert [name.rpartition(".")[2] for name in layers] == list(BLOCK) * 2
    assert layers == adapted_layers(model)
    assert type(model.lm_head) is nn.Linear
    assert list(frozen_layers(model)) == [f"{name}.base" for name in layers]
    trainable = adapter_parameters(model)
    assert len(trainable) == 3 * 14
    assert {name.rpartition(".")[2] for name in trainable} == {"lora_A", "lora_B", "magnitude"}


def test_a_fresh_adapter_changes_nothing_and_the_embedding_stays_tied() -> None:
    model = tiny.llama()
    ids = torch.arange(20).reshape(2, 10)
    before = model(ids).logits
    inject(model, rank=2)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-6, atol=1e-6)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_head_is_skipped_under_any_name() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=97, **sizes))
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    assert head not in inject(model, rank=2)
    assert len(adapted_layers(model)) == 4


def test_targets_by_last_part_path_and_pattern() -> None:
    layers = inject(tiny.llama(), rank=2, targets=["q_proj", "model.layers.1.mlp.up_proj", "*.0.*.down_proj"])
    assert list(layers) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert not matches("model.layers.0.self_attn.q_proj", "proj")
    assert inject(tiny.llama(), rank=2, targets="lm_head", kind="lora").keys() == {"lm_head"}


def test_the_longest_matching_rank_wins_and_stabilised_scaling_divides_by_the_root() -> None:
    pattern = {"q_proj": 3, "model.layers.1.self_attn.q_proj": 5, "*.mlp.*": 1}
    layers = inject(tiny.llama(), rank=4, alpha=8.0, rank_stabilized=True, rank_pattern=pattern)
    ranks = {name: layer.rank for name, layer in layers.items()}
    assert ranks["model.layers.0.self_attn.q_proj"] == 3
    assert ranks["model.layers.1.self_attn.q_proj"] == 5
    assert ranks["model.layers.1.mlp.up_proj"] == 1
    assert ranks["model.layers.1.self_attn.v_proj"] == 4
    assert layers["model.layers.0.self_attn.v_proj"].scaling == 8.0 / 2.0


@pytest.mark.parametrize("how", ["injected", "loaded"])
def test_data_parallel_training_does_not_send_the_base(how: str, tmp_path: Path) -> None:
    """DistributedDataParallel broadcasts buffers before each forward pass: the packed base is not among them."""
    model = tiny.llama()
    inject(model, rank=2)
    if how == "loaded":
        save_adapter(model, tmp_path / "adapter", base_name_or_path="base", revision=None, base_quant={})
        model = tiny.llama()
        load_adapter(model, tmp_path / "adapter")
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1
    )
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        sent = {id(buffer) for buffer in wrapped.modules_buffers}
    finally:
        torch.distributed.destroy_process_group()
    held = [buffer for layer in adapted_layers(model).values() for buffer in layer.buffers()]
    assert held
    assert not sent & {id(buffer) for buffer in held}


def test_a_moved_base_leaves_nothing_where_it_was() -> None:
    layer = FrozenLinear(quantize(torch.randn(8, 64), "nf4"))
    layer(torch.randn(2, 64))
    held = weakref.ref(layer.get_buffer("packed"))
    layer.to("meta")
    assert held() is None


@pytest.mark.parametrize("stabilized", [False, True])
def test_the_same_scaling_at_every_rank(stabilized: bool) -> None:
    pattern = {"q_proj": 3, "*.mlp.*": 1}
    settings = {"rank": 4, "alpha": 8.0, "rank_pattern": pattern, "rank_stabilized": stabilized}
    layers = inject(tiny.llama(), same_scaling=True, **settings)
    assert {layer.rank for layer in layers.values()} == {1, 3, 4}
    assert [layer.scaling for layer in layers.values()] == pytest.approx([4.0 if stabilized else 2.0] * len(layers))


def test_inits() -> None:
    gaussian = inject(tiny.llama(hidden_size=64, intermediate_size=96), rank=16, init="gaussian", dtype=torch.float32)
    values = torch.cat([layer.lora_A.detach().flatten() for layer in gaussian.values()])
    assert values.std() == pytest.approx(0.01, rel=0.05)
    assert values.abs().max() > 0.03
    kaiming = inject(tiny.llama(hidden_size=64, intermediate_size=96), rank=16, dtype=torch.float32)
    for layer in kaiming.values():
        assert layer.lora_A.abs().max() <= layer.in_features**-0.5
        assert layer.lora_A.abs().max() > 0.95 * layer.in_features**-0.5
        assert not layer.lora_B.any()


def test_a_plain_optimizer_loses_no_update_of_the_factors_that_it_gets_by_default() -> None:
    """At 1e-6 every Adam step moves a factor by about the rate: nothing in bf16, every entry in float32."""
    layers = inject(tiny.llama(), rank=2, generator=torch.Generator().manual_seed(0))
    factors = [layer.lora_A for layer in layers.values()]
    start = [factor.detach().clone() for factor in factors]
    optimizer = torch.optim.AdamW(factors, lr=1e-6, weight_decay=0.0)
    for factor in factors:
        factor.grad = torch.ones_like(factor)
    for _ in range(3):
        optimizer.step()
    for factor, before in zip(factors, start, strict=True):
        moved = (before.double() - factor.detach().double())[before.abs() < 0.5]
        torch.testing.assert_close(moved, torch.full_like(moved, 3e-6), rtol=0.05, atol=0)


@pytest.mark.parametrize("changes", [{}, {"dtype": "float32"}, {"kind": "lora"}, {"kind": "magnitude"}], ids=str)
def test_a_run_stores_the_factors_as_its_recipe_says(tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe, model = tiny_run.recipe(tmp_path), tiny.llama()
    put_adapters(model, recipe.model_copy(update={"adapter": AdapterConfig(**changes)}))
    layers = adapted_layers(model).values()
    assert {str(layer.lora_A.dtype) for layer in layers} == {f"torch.{changes.get('dtype', 'bfloat16')}"}


def test_the_same_generator_gives_the_same_start() -> None:
    first, second = (inject(tiny.llama(), rank=2, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    for one, two in zip(first.values(), second.values(), strict=True):
        assert torch.equal(one.lora_A, two.lora_A)


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        inject(tiny.llama(), targets=["q_porj", "v_proj", "nothing_like_it"])
    assert len(caught.value.faults) == 2
    assert "Did you mean 'q_proj'?" in caught.value.faults[0]
    with pytest.raises(UserError) as caught:
        inject(tiny.llama(), rank=40, rank_pattern={"up_porj": 2, "down_proj": 33})
    text = str(caught.value)
    assert "rank_pattern: 'up_porj' matches no adapted layer" in text
    # The smallest of the 12 other layers: 2 blocks of q, k, v, o, gate and up, of which k and v have 16 rows.
    assert "adapter.rank: must be at most 16 for layer model.layers.0.self_attn.k_proj (got 40); 12 layers are" in text
    ranks = "q_proj: 32, k_proj: 16, v_proj: 16, o_proj: 32, gate_proj: 32, up_proj: 32"
    assert f"Fix: lower it, or add adapter.rank_pattern: {{{ranks}}}." in text
    assert "adapter.rank_pattern['down_proj']: must be at most 32 for layer model.layers.0.mlp.down_proj (got" in text
    with pytest.raises(UserError, match="finds no linear layer"):
        inject(nn.Sequential(nn.ReLU()))
