"""Models that write into the outputs of adapted layers: the gradient of the magnitude is still the true one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
)

from qdora.errors import UserError
from qdora.model.build_model import recompute_activations
from qdora.model.inject import adapted_layers, inject
from qdora.model.inplace_outputs import keep_inplace_outputs_, weights_unread
from tests import tiny

IDS = torch.tensor([[5, 9, 2, 7, 1, 3]])
MIXER = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4, "expand": 2}
HEADS = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def olmo() -> Any:
    """clip_qkv is applied in place, and most values are beyond it."""
    config = OlmoConfig(**HEADS, intermediate_size=48, clip_qkv=0.05, max_position_embeddings=32, pad_token_id=0)
    return OlmoForCausalLM(config)


def falcon() -> Any:
    """The output of the attention is added into that of the MLP."""
    return FalconForCausalLM(FalconConfig(**HEADS, multi_query=True, parallel_attn=True, alibi=False))


WRITTEN = {
    "olmo": (olmo, {"q_proj", "k_proj", "v_proj"}),
    "falcon": (falcon, {"dense_4h_to_h"}),
    "llama": (tiny.llama, set()),
}


def adapted(make: Any, kind: Any = "dora") -> Any:
    torch.manual_seed(0)
    model = make().eval()
    inject(model, kind=kind, rank=2, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    tiny.move_all_parameters_(model)
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


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("keeps_copy", [False, True], ids=["computed again", "copied"])
@pytest.mark.parametrize("name", ["olmo", "falcon"])
def test_gradients_are_those_of_the_plain_formula(name: str, keeps_copy: bool, checkpointing: bool) -> None:
    model = adapted(WRITTEN[name][0])
    reference = copy.deepcopy(model).double()
    for path, layer in adapted_layers(model).items():
        parent, _, leaf = path.rpartition(".")
        setattr(reference.get_submodule(parent), leaf, Plain(layer))
    loss_of(reference).backward()  # type: ignore[no-untyped-call]

    if keeps_copy:
        keep_inplace_outputs_(model)
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


@pytest.mark.parametrize("name", WRITTEN)
def test_only_the_written_layers_keep_a_copy(name: str) -> None:
    make, leaves = WRITTEN[name]
    model = adapted(make)
    written = keep_inplace_outputs_(model)
    assert {path.rpartition(".")[2] for path in written} == leaves
    assert len(written) == 2 * len(leaves)
    assert {path for path, layer in adapted_layers(model).items() if layer.keeps_copy} == set(written)


def test_lora_needs_no_copy() -> None:
    assert keep_inplace_outputs_(adapted(olmo, "lora")) == []


READS_ITSELF = r"this model reads the weight of {0} itself.*Fix: name {1} in base\.skip"


def reading(*, in_training_alone: bool) -> Any:
    """A Llama whose first MLP multiplies by the weight of its down_proj instead of calling the layer."""
    model = tiny.llama()
    mlp = model.model.layers[0].mlp

    def forward(x: Tensor) -> Tensor:
        hidden = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        return mlp.down_proj(hidden) if in_training_alone and not mlp.training else hidden @ mlp.down_proj.weight.T

    mlp.forward = forward
    return model


def test_a_model_that_reads_the_weight_of_a_layer_is_refused_in_one_line() -> None:
    model = reading(in_training_alone=False)
    inject(model, rank=2)
    fault = READS_ITSELF.format(r"model\.layers\.0\.mlp\.down_proj", "down_proj")
    with pytest.raises(UserError, match=fault):
        keep_inplace_outputs_(model)
    others = reading(in_training_alone=False)
    inject(others, targets=["gate_proj", "up_proj"], rank=2)
    keep_inplace_outputs_(others)  # as the advice says


def test_a_weight_that_is_read_in_training_alone_is_told_in_the_same_line() -> None:
    model = reading(in_training_alone=True)
    inject(model, rank=2)
    keep_inplace_outputs_(model)
    fault = READS_ITSELF.format(r"model\.layers\.0\.mlp\.down_proj", "down_proj")
    with pytest.raises(UserError, match=fault), weights_unread(model):
        model.train()(input_ids=IDS, use_cache=False)


def first_step(model: Any) -> None:
    keep_inplace_outputs_(model)
    model.train()(input_ids=IDS, use_cache=False)


def mamba() -> Any:
    return MambaForCausalLM(MambaConfig(**MIXER))


def mamba2() -> Any:
    return Mamba2ForCausalLM(Mamba2Config(**MIXER, num_heads=4, head_dim=16, n_groups=1))


@pytest.mark.parametrize(("make", "read"), [(mamba, "dt_proj"), (mamba2, "out_proj")])
def test_mamba_is_refused_in_its_first_step(make: Any, read: str) -> None:
    model = make()
    inject(model, rank=2)
    fault = READS_ITSELF.format(rf"backbone\.layers\.0\.mixer\.{read}", read)
    with pytest.raises(UserError, match=fault), weights_unread(model):
        first_step(model)
