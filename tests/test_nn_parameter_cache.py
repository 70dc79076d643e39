"""The norm of a DoRA layer: computed once for each state of its parameters, and never that of another state."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from qdora.nn import adapted_linear as module
from qdora.nn.adapted_linear import AdaptedLinear
from qdora.nn.prepared_gains import prepare_gains
from qdora.train.optimizer import AdapterOptimizer
from tests import reference, tiny
from tests.test_ops_adapted_product import arrays, to_numpy

X = torch.randn(6, 40, generator=torch.Generator().manual_seed(9))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each norm that is computed."""
    calls: list[int] = []
    compute = module.row_norm

    def counting(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        return compute(*args, **options)

    monkeypatch.setattr(module, "row_norm", counting)
    return calls


def dora(dtype: torch.dtype = torch.float32, **options: Any) -> AdaptedLinear:
    layer = tiny.adapted_linear(dtype=dtype, **options)
    tiny.move_all_parameters_(layer)
    return layer


def assert_fresh(layer: AdaptedLinear) -> None:
    """The output is that of the parameters as they are now."""
    expected = reference.forward(to_numpy(X), **arrays(layer))
    error = reference.relative_error(to_numpy(layer(X.to(layer.lora_A.dtype))), expected)
    assert error < (1e-6 if layer.lora_A.dtype == torch.float32 else 2e-2)


def backward(layer: AdaptedLinear) -> None:
    layer(X.to(layer.lora_A.dtype)).square().sum().backward()


def in_place(layer: AdaptedLinear) -> None:
    with torch.no_grad():
        layer.lora_B.mul_(-1.5)


def only_the_magnitude(layer: AdaptedLinear) -> None:
    with torch.no_grad():
        layer.magnitude.mul_(1.5)  # type: ignore[union-attr]


def load_state(layer: AdaptedLinear) -> None:
    state = {name: value + 0.3 for name, value in layer.state_dict().items() if name in ("lora_A", "lora_B")}
    layer.load_state_dict(layer.state_dict() | state)


def load_another_base(layer: AdaptedLinear) -> None:
    """The base is in the state, what follows from it is not."""
    other = dora(layer.lora_A.dtype, seed=1)
    other.base.get_buffer("weight").mul_(3.0)
    layer.load_state_dict(other.state_dict())


def load_into_an_empty_layer(layer: AdaptedLinear) -> None:
    state = {name: value.clone() * 1.5 for name, value in layer.state_dict().items()}
    layer.to("meta").to_empty(device="cpu")
    layer.load_state_dict(state)


def assign_another_base(layer: AdaptedLinear) -> None:
    layer.load_state_dict({name: value * 1.5 for name, value in layer.state_dict().items()}, assign=True)


def another_alpha(layer: AdaptedLinear) -> None:
    layer.alpha *= 4.0


def new_rank(layer: AdaptedLinear) -> None:
    """As after pruning rank components: other parameters under the old names."""
    layer.lora_A = torch.nn.Parameter(layer.lora_A.detach()[:2] * 1.3)
    layer.lora_B = torch.nn.Parameter(layer.lora_B.detach()[:, :2] * 1.3)
    layer.rank, layer.alpha = 2, layer.alpha / 3 * 2


def another_tensor_of_the_same_shape(layer: AdaptedLinear) -> None:
    values = layer.lora_B.detach() * -2
    del layer.lora_B
    layer.lora_B = torch.nn.Parameter(values)


def data_assigned(layer: AdaptedLinear) -> None:
    layer.lora_B.data = layer.lora_B.data * -2.0


def data_written_and_mode_changed(layer: AdaptedLinear) -> None:
    layer.lora_B.data.mul_(-2.0)
    layer.train(not layer.training).train(not layer.training)


def data_written_and_cleared(layer: AdaptedLinear) -> None:
    layer.lora_B.data.mul_(-2.0)
    layer.parameters_changed()


def torch_adamw(layer: AdaptedLinear) -> None:
    backward(layer)
    torch.optim.AdamW(layer.parameters(), lr=0.3).step()


def bnb_adamw(layer: AdaptedLinear) -> None:
    """Its kernels write through raw pointers and raise no version counter."""
    backward(layer)
    bnb.optim.AdamW(layer.parameters(), lr=0.3).step()


class DataSGD(torch.optim.Optimizer):
    """The old idiom: writes through .data."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.data.add_(parameter.grad.data, alpha=-0.1)


def data_sgd(layer: AdaptedLinear) -> None:
    backward(layer)
    DataSGD(layer.parameters()).step()


def own_optimizer(layer: AdaptedLinear) -> None:
    optimizer = AdapterOptimizer(dict(layer.named_parameters()), name="paged_adamw_32bit")
    backward(layer)
    optimizer.step(0.3)


CHANGES = [
    in_place,
    only_the_magnitude,
    load_state,
    load_another_base,
    load_into_an_empty_layer,
    assign_another_base,
    another_alpha,
    new_rank,
    another_tensor_of_the_same_shape,
    data_assigned,
    data_written_and_mode_changed,
    data_written_and_cleared,
    torch_adamw,
    bnb_adamw,
    data_sgd,
    own_optimizer,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_after_every_kind_of_change_the_norm_is_the_new_one(change: Callable[[AdaptedLinear], None], dtype):
    layer = dora(dtype)
    layer(X.to(dtype))
    before = to_numpy(layer(X.to(dtype)))
    change(layer)
    assert_fresh(layer)
    assert np.abs(to_numpy(layer(X.to(dtype))) - before).max() > 1e-2


def test_micro_batches_and_the_recompute_of_a_checkpoint_share_one_norm(counted):
    layer = dora()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    for step in range(3):
        for _ in range(4):
            x = X.clone().requires_grad_()
            checkpoint(layer, x, use_reentrant=False).square().sum().backward()
        assert len(counted) == step + 1
        optimizer.step()
        optimizer.zero_grad()
    assert_fresh(layer)


def test_a_new_magnitude_alone_costs_no_norm(counted):
    layer = dora()
    layer(X)
    only_the_magnitude(layer)
    assert_fresh(layer)
    assert len(counted) == 1


def test_evaluation_computes_one_norm_and_inference_mode_leaves_one_that_training_can_use(counted):
    layer = dora().eval()
    with torch.inference_mode():
        for _ in range(5):
            layer(X)
    assert len(counted) == 1
    layer(X.clone().requires_grad_()).sum().backward()
    assert len(counted) == 1
    assert layer.lora_A.grad is not None


def test_a_copy_and_a_pickle_start_without_the_norm_of_the_original(counted):
    layer = dora()
    layer(X)
    twin = copy.deepcopy(layer)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (twin, loaded):
        in_place(other)
        assert_fresh(other)
    assert_fresh(layer)


def test_a_cast_drops_the_norm():
    layer = dora()
    layer(X)
    layer.to(torch.bfloat16)
    assert_fresh(layer)


def test_another_compute_dtype_gets_a_norm_of_its_own(counted):
    layer = dora()
    layer(X)
    layer(X.bfloat16())
    assert len(counted) == 2


def test_fake_tensors_leave_nothing_behind():
    layer = dora()
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(getattr(layer, name)) for name in ("lora_A", "lora_B", "magnitude")}
        norm = mode.from_tensor(torch.ones(24))
        factors = (fakes["lora_A"], fakes["lora_B"])
        kept = layer._cache.get("row_norm", factors, (torch.float32, 1.0), lambda: norm)
        assert isinstance(kept, FakeTensor)
    assert not layer._cache._entries
    assert_fresh(layer)


class HostWaits(TorchDispatchMode):
    """Counts what would make a GPU's host wait: values that become Python's, shapes that depend on values, and tensors
    that are made from Python's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in ("_local_scalar_dense", "nonzero", "lift_fresh", "masked_select", "equal", "is_nonzero"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def three_layers(dtype: torch.dtype = torch.bfloat16) -> list[AdaptedLinear]:
    return [dora(dtype, rank=rank, quant="nf4", in_=64) for rank in (1, 2, 3)]


def test_a_layer_asks_the_gpu_once_for_a_norm_and_never_after_that():
    layer, x = three_layers()[2], torch.randn(6, 64).bfloat16().requires_grad_()
    with HostWaits() as first:
        layer(x).sum().backward()
    assert first.names == ["_local_scalar_dense"]
    with HostWaits() as later:
        layer(x).sum().backward()
    assert later.names == []


def test_with_dropout_only_the_host_is_asked():
    layer, x = three_layers()[2], torch.randn(6, 64).bfloat16().requires_grad_()
    layer.dropout = 0.5
    layer(x)
    with HostWaits() as waits:
        layer(x).sum().backward()
    # The seed, and in each direction the number of zeros: from CPU generators, whatever the layer's device.
    assert waits.names.count("_local_scalar_dense") == 3
    assert set(waits.names) <= {"_local_scalar_dense", "lift_fresh"}


def test_prepared_gains_are_those_of_the_parameters_and_wait_once_for_all_layers(counted):
    layers, x = three_layers(), torch.randn(6, 64).bfloat16()
    assert prepare_gains(layers) == 0  # none has run: in which dtype is not known
    for layer in layers:
        layer(x)
    assert prepare_gains(layers) == 0
    del counted[:]
    for layer in layers:
        in_place(layer)
    # One row of one layer is nearly taken away: its sum cancels.
    row = layers[1].base.dequantized()[3]
    with torch.no_grad():
        layers[1].lora_A[0] = row.bfloat16()
        layers[1].lora_B[3] = torch.tensor([-0.95 / layers[1].scaling, 0.0])
    with HostWaits() as waits:
        assert prepare_gains(layers) == 3
    assert waits.names == ["nonzero"]  # of the layer whose row has cancelled; reading a whole tensor is not seen here
    with HostWaits() as waits:
        for layer in layers:
            layer(x)
    assert waits.names == []
    assert counted == []
    for layer in layers:
        norms = reference.row_norm(*(arrays(layer)[name] for name in ("weight", "lora_a", "lora_b", "scaling")))
        gains = layer.gain(torch.bfloat16).value  # type: ignore[union-attr]
        np.testing.assert_allclose(to_numpy(gains) * norms, to_numpy(layer.magnitude), rtol=2e-2)


def test_lora_layers_have_nothing_to_prepare():
    layer = dora(kind="lora")
    layer(X)
    in_place(layer)
    assert prepare_gains([layer]) == 0
