"""Which layers get adapters, how these start, and models that write into their outputs or read their weights."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
)

from qdora.errors import UserError
from qdora.model.adapter_file import load_adapter, save_adapter
from qdora.model.attention import weights_unread
from qdora.model.build_model import nearest_low_rank, recompute_activations, start_from_error_
from qdora.model.inject import adapted_layers, adapter_parameters, frozen_layers, inject, matches
from qdora.model.source import resolve
from qdora.recipe.settings import BaseWeightsConfig, PruneConfig
from tests import support

BLOCK = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_all_linear_is_every_linear_layer_but_the_head_and_changes_nothing():
    model, ids = support.llama(), torch.arange(20).reshape(2, 10)
    before = model(ids).logits
    layers = inject(model, rank=2)
    assert {layer.lora_A.dtype for layer in layers.values()} == {torch.float32}  # else a plain optimizer loses updates
    assert [name.rpartition(".")[2] for name in layers] == list(BLOCK) * 2
    assert layers == adapted_layers(model)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert list(frozen_layers(model)) == [f"{name}.base" for name in layers]
    trainable = adapter_parameters(model)
    assert len(trainable) == 3 * 14
    assert {name.rpartition(".")[2] for name in trainable} == {"lora_A", "lora_B", "magnitude"}
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-6, atol=1e-6)


def test_targets_by_last_part_path_and_pattern_and_a_head_of_another_name():
    layers = inject(support.llama(), rank=2, targets=["q_proj", "model.layers.1.mlp.up_proj", "*.0.*.down_proj"])
    assert list(layers) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert not matches("model.layers.0.self_attn.q_proj", "proj")
    assert inject(support.llama(), rank=2, targets="lm_head", kind="lora").keys() == {"lm_head"}
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(**HEADS | {"num_hidden_layers": 1}, intermediate_size=48))
    head = next(name for name, module in neox.named_modules() if module is neox.get_output_embeddings())
    assert head not in inject(neox, rank=2)
    assert len(adapted_layers(neox)) == 4


@pytest.mark.parametrize("stabilized", [False, True])
def test_the_longest_matching_rank_wins_and_scalings_are_alpha_by_rank_or_its_root(stabilized):
    pattern = {"q_proj": 3, "model.layers.1.self_attn.q_proj": 5, "*.mlp.*": 1}
    options: dict[str, Any] = {"rank": 4, "alpha": 8.0, "rank_pattern": pattern, "rank_stabilized": stabilized}
    layers = inject(support.llama(), **options)
    ranks = {name.removeprefix("model.layers."): layer.rank for name, layer in layers.items()}
    assert ranks["0.self_attn.q_proj"] == 3
    assert ranks["1.self_attn.q_proj"] == 5
    assert ranks["1.mlp.up_proj"] == 1
    assert ranks["1.self_attn.v_proj"] == 4
    for layer in layers.values():
        assert layer.scaling == pytest.approx(8.0 / (layer.rank**0.5 if stabilized else layer.rank))
    same = inject(support.llama(), same_scaling=True, **options)
    assert {layer.rank for layer in same.values()} == {1, 3, 4, 5}
    assert [layer.scaling for layer in same.values()] == pytest.approx([4.0 if stabilized else 2.0] * len(same))


def test_starts_of_the_factors():
    def start(**options: Any) -> list[Any]:
        model = support.llama(hidden_size=64, intermediate_size=96)
        return list(inject(model, rank=16, dtype=torch.float32, **options).values())

    values = torch.cat([layer.lora_A.detach().flatten() for layer in start(init="gaussian")])
    assert values.std() == pytest.approx(0.01, rel=0.05)
    assert values.abs().max() > 0.03
    for layer in start():
        assert 0.95 * layer.in_features**-0.5 < layer.lora_A.abs().max() <= layer.in_features**-0.5
        assert not layer.lora_B.any()
    first, second = (start(generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert all(torch.equal(one.lora_A, two.lora_A) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("is_loaded", [False, True])
def test_data_parallel_training_does_not_send_the_base(is_loaded, tmp_path):
    """DistributedDataParallel broadcasts buffers before each forward pass: the packed base is not among them."""
    model = support.llama()
    inject(model, rank=2)
    if is_loaded:
        save_adapter(model, tmp_path / "adapter", base_name_or_path="base", revision=None, base_quant={})
        model = support.llama()
        load_adapter(model, tmp_path / "adapter")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        sent = {id(buffer) for buffer in torch.nn.parallel.DistributedDataParallel(model).modules_buffers}
    finally:
        torch.distributed.destroy_process_group()
    held = {id(buffer) for layer in adapted_layers(model).values() for buffer in layer.buffers()}
    assert held
    assert not sent & held


def test_patterns_that_match_nothing_and_ranks_that_are_too_large_are_refused():
    with pytest.raises(UserError, match=r"'q_porj' matches no linear layer; .* q_proj") as caught:
        inject(support.llama(), targets=["q_porj", "v_proj", "nothing_like_it"])
    assert len(caught.value.faults) == 2
    for options, words in (
        ({"rank_pattern": {"up_porj": 2}}, "rank_pattern: 'up_porj' matches no adapted layer"),
        ({"rank": 40}, r"adapter\.rank: must be at most 16 for model\.layers\.0\.self_attn\.k_proj \(got 40\)"),
        ({"rank_pattern": {"down_proj": 33}}, "must be at most 32 for model"),
    ):
        with pytest.raises(UserError, match=words):
            inject(support.llama(), **options)
    with pytest.raises(UserError, match="has no linear layer"):
        inject(nn.Sequential(nn.ReLU()))


# --- LoftQ: adapters that start from the error of the base


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), rank=st.integers(1, 12), seed=st.integers(0, 9))
def test_nearest_low_rank(rows, columns, rank, seed):
    rank = min(rank, rows, columns)
    matrix = np.random.default_rng(seed).standard_normal((rows, columns))
    u, s, v = np.linalg.svd(matrix)
    left, right = nearest_low_rank(torch.from_numpy(matrix), rank)
    assert left.shape == (rows, rank)
    assert right.shape == (rank, columns)
    np.testing.assert_allclose((left @ right).numpy(), (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-7)
    np.testing.assert_allclose(left.norm(dim=0).numpy(), right.norm(dim=1).numpy(), rtol=1e-6, atol=1e-9)
    assert not nearest_low_rank(torch.zeros(rows, columns), rank)[0].any()


@pytest.mark.parametrize(
    ("name", "masked", "kind"),
    [("llama-tied-biased", True, "dora"), ("llama-tied-biased", False, "lora"), ("gpt_oss", False, "dora")],
)
def test_the_start_is_nearer_to_the_source(tmp_path, name, masked, kind):
    """Each expert has a start of its own."""
    if name == "gpt_oss":
        support.write_mixture(tmp_path, name)
    else:
        support.checkpoint(tmp_path, support.CHECKPOINT_CONFIGS[name])
    base = BaseWeightsConfig(prune=PruneConfig(method="magnitude", pattern="2:4"))
    model: Any = support.load_checkpoint(tmp_path, quant="nf2")
    if masked:
        model, _ = support.compressed(tmp_path, base, quant="nf2")
    original = support.load_checkpoint(tmp_path)
    targets: Any = "experts" if name == "gpt_oss" else "all-linear"
    options: dict[str, Any] = {"rank": 3, "alpha": 6.0, "dtype": torch.float32, "masked": masked}
    layers = inject(model, kind=kind, targets=targets, **options)
    start_from_error_(model, resolve(str(tmp_path)))
    for path, layer in layers.items():
        weight, base = original.get_submodule(path).weight.double().numpy(), layer.base.dequantized().double().numpy()
        keep = layer.base.keep_mask().numpy() if masked else 1.0
        error = (weight - base) * keep
        parts = support.parts_of_experts(torch.from_numpy(error), 4 if name == "gpt_oss" else 1)
        squares = [np.linalg.svd(part.numpy(), compute_uv=False)[3:] ** 2 for part in parts]
        update = 2.0 * (layer.lora_B @ layer.lora_A).detach().numpy().reshape(base.shape)
        assert np.linalg.norm(error - update) ** 2 == pytest.approx(np.sum(squares), rel=1e-3)
        rest = np.linalg.norm(error - update * keep) / np.linalg.norm(error)
        assert rest < 1
        merged = layer.merged_weight(torch.float64).detach().numpy()
        np.testing.assert_allclose(merged, base + update * keep, atol=2e-5)


def test_a_tied_head_has_no_error(tmp_path):
    """The checkpoint holds the weight of the head once, by the name of the embedding; the base has it dense."""
    recipe = support.tiny_recipe(tmp_path, base__quant="nf3", adapter__init="loftq")
    source = resolve(recipe.model.source)
    model = support.load_checkpoint(source.path, quant="nf4")
    inject(model, rank=2, targets=["lm_head", "q_proj"], dtype=torch.float32)
    start_from_error_(model, source)
    assert [bool(layer.lora_B.any()) for layer in adapted_layers(model).values()] == [True, True, False]


# --- models that do not treat linear layers as functions: the gradient of the magnitude is still the true one

IDS = torch.tensor([[5, 9, 2, 7, 1, 3]])
HEADS: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MIXER: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4, "expand": 2}
# clip_qkv is applied in place, and most values are beyond it.
OLMO = OlmoConfig(**HEADS, intermediate_size=48, clip_qkv=0.05, max_position_embeddings=32, pad_token_id=0)
# The output of the attention is added into that of the MLP.
FALCON = FalconConfig(**HEADS, multi_query=True, parallel_attn=True, alibi=False)
WRITTEN: dict[str, Any] = {"olmo": lambda: OlmoForCausalLM(OLMO), "falcon": lambda: FalconForCausalLM(FALCON)}


def adapted(make: Any, kind: Any = "dora") -> Any:
    torch.manual_seed(0)
    model = make().eval()
    inject(model, kind=kind, rank=2, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    support.move_all_parameters_(model)
    return model


class Plain(nn.Module):
    """W' = m (W + s B A) / ||W + s B A||, the norm held constant."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.weight, self.scaling = layer.base.dequantized().double(), layer.scaling
        values = {name: getattr(layer, name).detach().double() for name in ("lora_A", "lora_B", "magnitude")}
        self.parts = nn.ParameterDict(values)

    def forward(self, x: Tensor) -> Tensor:
        total = self.weight + self.scaling * self.parts["lora_B"] @ self.parts["lora_A"]
        gain = self.parts["magnitude"] / total.detach().square().sum(dim=1).sqrt()
        return x @ (gain.unsqueeze(1) * total).T


def loss_of(model: Any) -> Tensor:
    logits = model(input_ids=IDS, use_cache=False).logits[0].double()
    return nn.functional.cross_entropy(logits[:-1], IDS[0, 1:])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", WRITTEN)
def test_gradients_are_those_of_the_plain_formula(name, checkpointing):
    model = adapted(WRITTEN[name])
    reference = copy.deepcopy(model).double()
    for path, layer in adapted_layers(model).items():
        parent, _, leaf = path.rpartition(".")
        setattr(reference.get_submodule(parent), leaf, Plain(layer))
    loss_of(reference).backward()  # type: ignore[no-untyped-call]
    if checkpointing:
        recompute_activations(model)
    model.train()
    loss_of(model).backward()  # type: ignore[no-untyped-call]
    for path, layer in adapted_layers(model).items():
        for part, parameter in layer.named_parameters():
            expected = reference.get_submodule(path).parts[part].grad
            assert float(expected.abs().max()) > 0
            error = float((parameter.grad.double() - expected).abs().max() / expected.abs().max())
            assert error < 1e-4, (path, part, error)


def reading(*, in_training_alone: bool) -> Any:
    """A Llama whose first MLP multiplies by the weight of its down_proj instead of calling the layer."""
    model = support.llama()
    mlp = model.model.layers[0].mlp

    def forward(x: Tensor) -> Tensor:
        hidden = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        return mlp.down_proj(hidden) if in_training_alone and not mlp.training else hidden @ mlp.down_proj.weight.T

    mlp.forward = forward
    return model


def first_step(model: Any) -> None:
    model.train()(input_ids=IDS, use_cache=False)


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda: reading(in_training_alone=False), "model.layers.0.mlp.down_proj"),
        (lambda: reading(in_training_alone=True), "model.layers.0.mlp.down_proj"),
        (lambda: MambaForCausalLM(MambaConfig(**MIXER)), "backbone.layers.0.mixer.x_proj"),
    ],
    ids=["llama", "llama in training", "mamba"],
)
def test_a_model_that_reads_the_weight_of_a_layer_is_refused_in_its_first_step(make, path):
    model, leaf = make(), path.rpartition(".")[2]
    inject(model, rank=2)
    fault = rf"reads the weight of {path} itself.*Fix: name {leaf} in base\.skip"
    with pytest.raises(UserError, match=fault), weights_unread(model):
        first_step(model)
    if leaf == "down_proj":
        others = make()
        inject(others, targets=["gate_proj", "up_proj"], rank=2)
        first_step(others)  # as the advice says
