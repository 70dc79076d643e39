"""QDORA_KERNELS: which kernels decode packed weights, and what is said of a wrong choice."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from qdora.errors import UserError
from qdora.model.build_model import choose_compute
from qdora.ops import bnb_kernels, fused_product, kernel_choice
from qdora.ops.kernel_choice import check_kernels, chosen_kernels, runs_triton
from qdora.ops.packed import choose_backend, dequantize, quantize
from qdora.ops.planned_device import planned_on
from qdora.ops.tiles import own_scales, with_scales

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def read_again() -> Iterator[None]:
    """The choice is read once in a process."""
    chosen_kernels.cache_clear()
    yield
    chosen_kernels.cache_clear()


@pytest.fixture
def triton_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDORA_KERNELS", "triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


@pytest.mark.parametrize("value", [None, "", "bitsandbytes"])
def test_bitsandbytes_is_the_default(monkeypatch, value):
    monkeypatch.delenv("QDORA_KERNELS", raising=False)
    if value is not None:
        monkeypatch.setenv("QDORA_KERNELS", value)
    assert chosen_kernels() == "bitsandbytes"
    assert not runs_triton(CUDA)


def test_a_wrong_name_is_one_clear_line_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setenv("QDORA_KERNELS", "trition")
    with pytest.raises(UserError) as error:
        choose_compute("float32")
    assert str(error.value) == (
        "QDORA_KERNELS: got 'trition', must be one of bitsandbytes, triton, torch. Did you mean 'triton'?"
    )


def test_triton_that_is_not_installed_is_one_clear_line(monkeypatch):
    monkeypatch.setenv("QDORA_KERNELS", "triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        chosen_kernels()
    (line,) = str(error.value).splitlines()
    assert line == (
        "QDORA_KERNELS: got 'triton', but the package triton is not installed. Fix: pip install \"qdora[triton]\", or "
        "unset QDORA_KERNELS."
    )


def test_torch_switches_bitsandbytes_off_and_gives_the_same_bits(monkeypatch):
    weight = quantize(torch.randn(8, 128, generator=torch.Generator().manual_seed(1)), "nf4")
    found = {}
    for name in ("bitsandbytes", "torch"):
        monkeypatch.setenv("QDORA_KERNELS", name)
        chosen_kernels.cache_clear()
        backend = choose_backend("nf4", CPU, block_size=64, in_features=128, dtype=torch.float32)
        assert backend == ("bnb" if name == "bitsandbytes" else "torch")
        found[name] = dequantize(weight)
    assert torch.equal(found["torch"], found["bitsandbytes"])


def test_torch_decodes_without_the_fused_product_of_bitsandbytes(monkeypatch):
    """A GPU's product of few tokens with codes, too, is bitsandbytes'."""
    weight = quantize(torch.randn(8, 128, generator=torch.Generator().manual_seed(1)), "nf4")
    x = torch.ones(1, 128, dtype=torch.bfloat16)
    called = []
    monkeypatch.setattr(fused_product, "device_kind", lambda _device: "cuda")
    monkeypatch.setattr(bnb_kernels, "has_product", lambda _kind: True)
    monkeypatch.setattr(bnb_kernels, "product_4bit", lambda *_args, **_options: called.append(1))
    plain = with_scales(weight, own_scales(weight))
    for name, count in (("bitsandbytes", 1), ("triton", 2), ("torch", 2)):
        monkeypatch.setattr(fused_product, "chosen_kernels", lambda name=name: name, raising=False)
        fused_product.fused_product(x, plain)
        assert len(called) == count


@pytest.mark.usefixtures("triton_installed")
def test_triton_runs_on_a_gpu_and_in_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert runs_triton(CUDA)
    assert not runs_triton(CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert runs_triton(CPU)


@pytest.mark.usefixtures("triton_installed")
def test_triton_without_a_gpu_is_one_clear_line(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    check_kernels(CUDA)
    with pytest.raises(UserError) as error:
        check_kernels(CPU)
    assert str(error.value) == (
        "QDORA_KERNELS: got 'triton', whose kernels run on CUDA devices; the device is cpu. Fix: unset QDORA_KERNELS."
    )


@pytest.mark.usefixtures("triton_installed")
def test_the_fake_tensors_of_a_plan_meet_no_triton(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with planned_on("cuda"):
        assert not runs_triton(CPU)
    assert runs_triton(CPU)


def test_the_variable_is_in_the_record_of_a_run(monkeypatch):
    from qdora.files.environment import environment

    monkeypatch.setenv(kernel_choice.VARIABLE, "torch")
    assert environment()["variables"]["QDORA_KERNELS"] == "torch"
