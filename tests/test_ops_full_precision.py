"""Norms and merges use float32 in full, whatever the caller lets torch round products to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qdora.nn.adapted_linear import AdaptedLinear
from qdora.ops import expert_product
from tests import reference, test_nn_expert_linear, test_nn_masked_adapter, tiny
from tests.test_ops_adapted_product import arrays, to_numpy


def settings() -> tuple[str, ...]:
    backends = torch.backends
    found = [backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision, backends.fp32_precision]
    try:
        found.append(torch.get_float32_matmul_precision())
    except RuntimeError:  # the older flags and torch.backends disagree
        found.append("mixed")
    return tuple(found)


class Products(TorchDispatchMode):
    """The precision that each float32 product would have, on a GPU and on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.precisions: list[tuple[str, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().partition(".")[0] in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm"):
            self.precisions.append((settings()[0], settings()[1], settings()[3]))
        return func(*args, **(kwargs or {}))


def by_name(precision: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(precision)


def allow_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def new_settings() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


CALLERS = {
    "untouched": lambda: None,
    "high": by_name("high"),
    "medium": by_name("medium"),
    "allow_tf32": allow_tf32,
    "backends": new_settings,
}


@pytest.fixture(params=CALLERS)
def caller(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    CALLERS[request.param]()
    yield request.param
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = before


def moved(**options: Any) -> AdaptedLinear:
    layer = tiny.adapted_linear(dtype=torch.float32, in_=512, **options)
    tiny.move_all_parameters_(layer)
    return layer


def test_norms_and_merges_of_a_layer(caller: str) -> None:
    layer, before = moved(), settings()
    with Products() as products:
        norm, merged = layer.row_norm(), layer.merged_weight()
        gain = layer.merged_gain()
    assert gain is not None
    assert len(products.precisions) == 5  # W A^T, A A^T and their sum, and twice B A
    assert all(each[:2] == ("ieee", "ieee") and each[2] == "highest" for each in products.precisions), products
    assert settings() == before
    numbers = arrays(layer)
    expected = reference.row_norm(*(numbers[name] for name in ("weight", "lora_a", "lora_b", "scaling")))
    assert reference.relative_error(to_numpy(norm), expected) < 1e-6
    assert reference.relative_error(to_numpy(merged), reference.merged_weight(**numbers)) < 1e-6


def test_norms_of_a_masked_layer_and_of_experts(caller: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_product, "device_kind", lambda _device: "cuda")  # several experts a run
    layers = [test_nn_masked_adapter.layer_of(), test_nn_expert_linear.layer_of()]
    before = settings()
    for layer in layers:
        with Products() as products:
            layer.row_norm()
            layer.merged_weight()
        assert products.precisions
        assert all(each[:2] == ("ieee", "ieee") for each in products.precisions)
    assert settings() == before
