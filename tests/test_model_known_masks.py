"""Masks that nobody reads from a GPU: the logits of real tokens are those with transformers' own masks, bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, modeling_flash_attention_utils

from qdora.data.batching import Packing
from qdora.model.known_masks import known_masks, packed_mask_is_known, takes_flash_lengths
from qdora.train.passes import batch_loss
from qdora.train.sent_batch import send_labels
from tests.false_gpu import FalseGpu, on_false_gpu
from tests.support import needs_division

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from tiny_families import FAMILIES, spread_

LENGTHS = (14, 9, 11)
# Full attention, windows shorter than the text, both, another position code, and one that reads its mask elsewhere.
FAST = ["Llama 3", "Mistral", "Gemma 3 (text)", "OPT", "LFM2"]
# The false GPU does not compute them.
LEFT_OUT = {"Falcon 7B", "Falcon 40B"}
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
def test_padding_needs_no_mask(gpu, name):
    model, (ids, mask) = family(name), padded()
    model.to(gpu.device)
    inputs = {"input_ids": ids.to(gpu.device), "attention_mask": mask.to(gpu.device), "use_cache": False}
    expected = model(**inputs).logits.cpu()
    gpu.clear()
    with known_masks(model, None, gpu.device):
        found = model(**inputs).logits
    assert all(line.startswith(CONSTANTS) for line in gpu.lines("wait"))
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
def test_packed_examples_see_themselves(gpu, name):
    model, (ids, packing) = family(name), packed()
    model.to(gpu.device)
    inputs = {"input_ids": ids.to(gpu.device), "position_ids": packing.position_ids.to(gpu.device)}
    expected = model(**inputs, use_cache=False).logits.cpu()
    assert gpu.lines("wait")
    given = torch.ones_like(ids).to(gpu.device, non_blocking=True)
    there = Packing(packing.position_ids.to(gpu.device), packing.example_index.to(gpu.device))
    gpu.clear()
    with known_masks(model, there, gpu.device):
        assert packed_mask_is_known()
        found = model(**inputs, attention_mask=given, use_cache=False).logits
    assert gpu.lines("wait") == []
    assert not packed_mask_is_known()
    assert torch.equal(found.cpu(), expected)


def flash_on(gpu: FalseGpu, seen: list[Any]) -> Any:
    """transformers' table of flash attention's functions, by sdpa: packed examples see themselves."""

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **lengths: Any
    ) -> Tensor:
        seen.append((cu_seqlens_q, cu_seqlens_k, lengths))
        place = torch.arange(len(q), device=gpu.device)
        example = (place[:, None] >= cu_seqlens_q[1:]).sum(1)
        mask = (example[:, None] == example) & (place[:, None] >= place)
        k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
        q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)

    def whole(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        seen.append(None)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        options = {"is_causal": True, "enable_gqa": True}
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    class Lengths:
        """transformers calls it; later releases take it from a pair."""

        def __call__(self, max_seqlen_q: Any = None, max_seqlen_k: Any = None, **_: Any) -> dict[str, Any]:
            return {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}

        def __iter__(self) -> Iterator[Any]:
            return iter((self, None))

    return (whole, varlen, None, None, None), Lengths()


@on_false_gpu
@torch.no_grad()
def test_flash_attention_gets_the_lengths_of_packed_examples(gpu):
    """Without them each layer reads the positions from the GPU."""
    model, (lengths, seen) = family("Llama 3"), ((5, 7, 4), [])
    positions = torch.cat([torch.arange(each) for each in lengths])[None]
    ids = torch.randint(3, 90, positions.shape, generator=torch.Generator().manual_seed(0))
    alone = [model(input_ids=part, use_cache=False).logits[0] for part in ids.split(list(lengths), dim=1)]
    model.to(gpu.device)
    model.config._attn_implementation_internal = "flash_attention_2"
    assert takes_flash_lengths(model)
    labels = torch.where(positions == 0, -100, ids)
    owner = torch.tensor([[0] * 5 + [1] * 7 + [2] * 4])
    gpu.clear()
    sent = send_labels(labels, Packing(positions, owner), None, gpu.device)
    mask, there = torch.ones_like(sent.packing.position_ids), ids.pin_memory().to(gpu.device, non_blocking=True)
    with (
        patch.object(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda _name: flash_on(gpu, seen)),
        known_masks(model, sent.packing, gpu.device),
    ):
        loss = batch_loss(model, there, mask, labels, packing=Packing(positions, owner), sent=sent)
    waits = [line for line in gpu.lines("wait") if not line.startswith("train/output_head.py")]
    assert waits == []
    assert len(seen) % len(model.model.layers) == 0
    for starts, same, longest in seen:
        assert starts.dtype == torch.int32
        assert starts.tolist() == same.tolist() == [0, 5, 12, 16]
        assert longest == {"max_seqlen_q": 7, "max_seqlen_k": 7}
    parts = zip(alone, ids[0].split(list(lengths)), strict=True)
    wanted = sum(float(cross_entropy(logits[:-1], part[1:], reduction="sum")) for logits, part in parts)
    assert float(loss.nll_sum) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("num_rows", [1, 2])
@on_false_gpu
@torch.no_grad()
def test_flash_attention_of_rows_that_are_not_packed_reads_no_positions(gpu, num_rows):
    """transformers looks for packed examples in each layer where there is a single row."""
    model, ids, seen = family("Llama 3"), padded()[0][:num_rows], []
    expected = model(input_ids=ids, use_cache=False).logits
    model.to(gpu.device)
    model.config._attn_implementation_internal = "flash_attention_2"
    inputs = {
        name: each.to(gpu.device) for name, each in (("input_ids", ids), ("attention_mask", torch.ones_like(ids)))
    }
    gpu.clear()
    with (
        patch.object(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda _name: flash_on(gpu, seen)),
        known_masks(model, None, gpu.device),
    ):
        found = model(**inputs, use_cache=False).logits
    assert gpu.lines("wait") == []
    assert seen == [None] * len(model.model.layers)
    torch.testing.assert_close(found.cpu(), expected)


@needs_division
@torch.no_grad()
def test_on_a_cpu_and_after_the_block_masks_are_those_of_transformers_of_a_divided_model_too():
    """Of attention and of a state. torch gives a sharded module a class of its own, in a module of torch."""
    model, (ids, mask) = family("LFM2"), padded()
    seen: list[bool] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["attention_mask"] is None), with_kwargs=True
        )

    def are_left_out() -> list[bool]:
        seen.clear()
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        return seen[:]

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for divide in (lambda: None, lambda: fully_shard(model, mesh=init_device_mesh("cpu", (1,)))):
            divide()
            num = len(model.model.layers)
            assert are_left_out() == [False] * num
            for device in ("cpu", "meta"):
                with known_masks(model, None, torch.device(device)):
                    assert are_left_out() == [device == "meta"] * num
            assert are_left_out() == [False] * num
    finally:
        dist.destroy_process_group()
