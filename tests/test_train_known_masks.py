"""Masks that nobody reads from a GPU: the logits of real tokens are those with transformers' own masks, bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from qdora.data.batching import Packing
from qdora.train.known_masks import known_masks, packed_mask_is_known
from tests import tiny
from tests.false_gpu import FalseGpu, on_false_gpu

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from tiny_families import FAMILIES, spread_

LENGTHS = (14, 9, 11)
# Full attention, windows shorter than the text, both, another position code, and one that reads its mask elsewhere.
FAST = ["Llama 3", "Mistral", "Gemma 3 (text)", "OPT", "LFM2"]
# The false GPU does not compute them.
LEFT_OUT = {"Falcon 7B", "Falcon 40B"}
# Layers of convolutions and of linear attention ask transformers whether anything is padded.
ASKED = "transformers/masking_utils.py: if not is_tracing(attention_mask) and torch.all(attention_mask == 1):"
# A number that the model copies to the device in every layer.
CONSTANTS = "gpt_neo/modeling_gpt_neo.py: mask_value = torch.tensor("


def family(name: str) -> Any:
    kind, settings = FAMILIES[name]
    torch.manual_seed(0)
    ids = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(ids | settings)), dtype=torch.float32)
    spread_(model)
    return model.eval()


def padded() -> tuple[Tensor, Tensor]:
    """(rows, length) ids and mask."""
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return torch.randint(3, 90, mask.shape, generator=torch.Generator().manual_seed(0)) * mask, mask


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in {*FAST, *LEFT_OUT}]


@pytest.mark.parametrize("name", [*FAST, *SLOW])
@on_false_gpu
@torch.no_grad()
def test_padding_needs_no_mask(gpu: FalseGpu, name: str) -> None:
    model, (ids, mask) = family(name), padded()
    model.to(gpu.device)
    inputs = {"input_ids": ids.to(gpu.device), "attention_mask": mask.to(gpu.device), "use_cache": False}
    expected = model(**inputs).logits.cpu()
    gpu.clear()
    with known_masks(model, None, gpu.device):
        found = model(**inputs).logits
    assert all(line == ASKED or line.startswith(CONSTANTS) for line in gpu.lines("wait"))
    assert torch.equal(found.cpu()[mask.bool()], expected[mask.bool()])


def packed() -> tuple[Tensor, Packing]:
    """Two rows of two examples each, the first row with padding behind them."""
    lengths = [(5, 7, 2), (9, 5)]
    positions = torch.stack([torch.cat([torch.arange(each) for each in row]) for row in lengths])
    owners = torch.tensor([[0] * 5 + [1] * 7 + [-1] * 2, [2] * 9 + [3] * 5])
    ids = torch.randint(3, 90, positions.shape, generator=torch.Generator().manual_seed(0))
    return ids, Packing(positions, owners)


@pytest.mark.parametrize("name", FAST[:3])
@on_false_gpu
@torch.no_grad()
def test_packed_examples_see_themselves(gpu: FalseGpu, name: str) -> None:
    model, (ids, packing) = family(name), packed()
    model.to(gpu.device)
    inputs = {"input_ids": ids.to(gpu.device), "position_ids": packing.position_ids.to(gpu.device)}
    expected = model(**inputs, use_cache=False).logits.cpu()
    assert gpu.lines("wait")
    given = torch.ones_like(ids).to(gpu.device, non_blocking=True)
    gpu.clear()
    with known_masks(model, packing, gpu.device):
        assert packed_mask_is_known()
        found = model(**inputs, attention_mask=given, use_cache=False).logits
    assert gpu.lines("wait") == []
    assert not packed_mask_is_known()
    assert torch.equal(found.cpu(), expected)


def test_on_a_cpu_and_after_the_block_masks_are_those_of_transformers() -> None:
    model, (ids, mask) = tiny.llama(), padded()
    seen: list[Any] = []
    model.model.layers[0].register_forward_pre_hook(  # type: ignore[union-attr, operator]
        lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with known_masks(model, None, torch.device("cpu")):
        model(input_ids=ids, attention_mask=mask)
    with known_masks(model, None, torch.device("meta")):
        model(input_ids=ids, attention_mask=mask)
    model(input_ids=ids, attention_mask=mask)
    assert [each is None for each in seen] == [False, True, False]
