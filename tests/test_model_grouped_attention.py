"""Grouped heads: keys are repeated where torch has only its math kernel for them, in a run and in its plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig
from transformers.integrations import sdpa_attention

from qdora.evaluation.forward_path import scoring
from qdora.model.grouped_attention import fast_grouped_attention
from qdora.model.known_masks import known_masks
from qdora.ops.planned_device import planned_on
from qdora.plan import memory_plan
from qdora.plan.memory_plan import plan
from qdora.recipe.recipe_file import recipe_from
from tests import tiny

MODULE = torch.nn.Module()
MODULE.num_key_value_groups = 4


def num_key_heads(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, mask: Tensor | None = None) -> int:
    """Heads of the keys that transformers gives to torch for 8 heads of queries and 2 of keys."""
    seen: list[int] = []

    def attention(query: Tensor, key: Tensor, *_: Any, enable_gqa: bool = False, **__: Any) -> Tensor:
        assert enable_gqa == (key.shape[1] < query.shape[1])
        seen.append(key.shape[1])
        return query

    query, key = (torch.zeros(1, heads, 6, 16, dtype=dtype) for heads in (8, 2))
    with monkeypatch.context() as patched:
        patched.setattr(functional, "scaled_dot_product_attention", attention)
        sdpa_attention.sdpa_attention_forward(MODULE, query, key, key, mask)
    return seen[0]


@pytest.fixture(params=[None, (7, 0), (7, 5), (8, 0), (9, 0)], ids=str)
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int] | None]:
    """The GPU of this machine; None: there is none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_keys_are_repeated_where_there_is_no_flash_kernel(monkeypatch, capability, dtype):
    has_flash = dtype != torch.float32 and capability not in ((7, 0), (7, 5))
    with planned_on("cuda"), fast_grouped_attention():
        assert num_key_heads(monkeypatch, dtype) == (2 if has_flash else 8)
        assert num_key_heads(monkeypatch, dtype, torch.ones(1, 1, 6, 6, dtype=torch.bool)) == 8
    with fast_grouped_attention():  # on a CPU
        assert num_key_heads(monkeypatch, dtype) == 2
    with planned_on("cuda"):
        assert num_key_heads(monkeypatch, dtype) == 2


@pytest.mark.parametrize("block", [lambda model: known_masks(model, None, torch.device("meta")), scoring])
def test_training_and_scoring_repeat_keys(monkeypatch, block):
    with planned_on("cuda"), block(tiny.llama()):
        assert num_key_heads(monkeypatch, torch.float32) == 8


def test_a_plan_counts_the_repeated_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass of one block keeps keys and values of 8 heads in place of 2."""
    sizes = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, intermediate_size=16, vocab_size=16)
    document = {
        "model": {"source": "org/model", "dtype": "float32"},
        "adapter": {"rank": 1, "targets": ["q_proj", "k_proj", "v_proj"]},
        "data": {"mix": [{"source": "org/data"}], "max_length": 256},
        "train": {"steps": 1, "batch": 1, "micro_batch_tokens": 256},
        "memory": {"checkpointing": False},
    }
    recipe = recipe_from(document)
    found = {}
    for repeats in (True, False):
        memory_plan._latest.clear()
        if not repeats:
            leave = lambda ask, dtypes, *rest: ask(*rest)  # noqa: E731
            monkeypatch.setattr("qdora.model.grouped_attention._leaves_to_torch", leave)
        found[repeats] = max(each.num_bytes for each in plan(recipe, config=config).moments if each.phase == "forward")
    memory_plan._latest.clear()
    assert found[True] - found[False] >= 2 * (8 - 2) * 256 * 16 * 4
