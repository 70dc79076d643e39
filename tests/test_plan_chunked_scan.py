"""Plans of linear attention: the bytes of transformers' own code, without its many operations."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from transformers.models.qwen3_5 import modeling_qwen3_5

from qdora.plan import chunked_scan
from qdora.plan.plan_contents import MicroBatchShape, Plan
from tests import tiny_experts
from tests.test_plan_experts import a_recipe, check_bytes, plan_and_operations

DENSE = tiny_experts.SIZES | tiny_experts.LINEAR | {"intermediate_size": 128}


def planned(length: int, monkeypatch: pytest.MonkeyPatch, rows: int = 1) -> tuple[Plan, int]:
    """The plan of a block of linear attention for texts of a length, and the operations that it took."""
    sizes = {"num_hidden_layers": 1, "layer_types": ["linear_attention"], "max_position_embeddings": length}
    config = AutoConfig.for_model("qwen3_5_text", **DENSE | sizes)
    shape = MicroBatchShape(rows, length, rows * (length - 1), masked=False, accumulated=True)
    recipe = a_recipe(adapter__rank=4, memory__loss_chunk=8192)
    options = {"config": config, "device_kind": "cpu", "workload": lambda _recipe: ([shape], 2)}
    return plan_and_operations(monkeypatch, recipe, **options)


@pytest.mark.parametrize(("length", "rows"), [pytest.param(1024, 1, marks=pytest.mark.slow), (950, 2)])
def test_a_long_text_takes_few_operations_and_its_own_bytes(
    length: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, operations = planned(length, monkeypatch, rows)
    monkeypatch.setattr(chunked_scan, "_FEWEST_CHUNKS", 10_000)
    whole, all_operations = planned(length, monkeypatch, rows)
    assert operations < 0.9 * all_operations
    assert found.tensor_bytes == pytest.approx(whole.tensor_bytes, rel=0.01)


def test_operations_do_not_grow_with_the_text_and_no_kernel_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "torch_chunk_gated_delta_rule"
    original = getattr(modeling_qwen3_5, name)

    @functools.wraps(original.__wrapped__)
    def kernel(*_args: Any, **_options: Any) -> Any:
        raise AssertionError("a kernel takes no fake tensors")

    monkeypatch.setattr(modeling_qwen3_5, name, kernel)
    _, few = planned(1024, monkeypatch)
    _, many = planned(4096, monkeypatch)
    assert many < 1.05 * few
    assert getattr(modeling_qwen3_5, name) is kernel


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"memory__checkpointing": False, "adapter__kind": "lora"}])
def test_planned_bytes_are_counted_in_a_real_step(tmp_path: Path, changes: dict[str, Any]) -> None:
    sizes = {"moe_intermediate_size": 256, "num_experts": 16, "max_position_embeddings": 2048}
    check_bytes(tmp_path, "qwen3_next", 1100, sizes, **changes)
