"""Which attention a model gets, keys repeated where that is faster, and masks that nobody reads from a GPU."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoConfig,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    modeling_flash_attention_utils,
)
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssPreTrainedModel

from qdora.data.batches import Packing
from qdora.errors import UserError
from qdora.evaluate.spans import scoring
from qdora.model.attention import (
    fast_grouped_attention,
    known_masks,
    packed_mask_is_known,
    takes_flash_lengths,
    with_attention,
)
from qdora.quant.kernels import planned_on
from qdora.train.passes import batch_loss
from tests import support
from tests.false_gpu import on_false_gpu
from tests.support import (
    CHECKPOINT_CONFIGS,
    CHECKPOINT_SIZES,
    checkpoint,
    checkpoint_logits,
    load_checkpoint,
    needs_division,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from tiny_families import FAMILIES, spread_

CONFIGS = copy.deepcopy(CHECKPOINT_CONFIGS)  # building with an attention writes its name into them
SINKS = GptOssConfig(**CHECKPOINT_SIZES, num_local_experts=2, num_experts_per_tok=1, sliding_window=8)
NEEDS_MORE_THAN_SDPA: dict[str, tuple[Any, Any, str]] = {
    "a soft-cap": (CONFIGS["gemma2"], Gemma2PreTrainedModel, "attn_logit_softcapping"),
    "sinks": (SINKS, GptOssPreTrainedModel, r"model\.layers\.0\.self_attn\.sinks"),
}


@pytest.mark.parametrize("need", NEEDS_MORE_THAN_SDPA)
def test_attention_is_chosen_by_what_the_model_needs(need, monkeypatch):
    """transformers 5.0 to 5.18 say that Gemma 2 can have sdpa, which drops its soft-cap; later ones do not."""
    config, family, what = NEEDS_MORE_THAN_SDPA[need]

    def build(choice: str | None) -> PreTrainedModel:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=choice)
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                torch.nn.init.normal_(parameter)
        return model.eval()

    eager = build("eager")
    monkeypatch.setattr(family, "_supports_sdpa", True)
    where: dict[str, Any] = {"name": "it", "device": torch.device("cpu"), "dtype": torch.float32}
    model = with_attention(build, config, "auto", **where)
    assert torch.equal(checkpoint_logits(model), checkpoint_logits(eager))
    with pytest.raises(UserError, match=rf"model\.attention: must be auto or eager .* {what} \(got sdpa"):
        with_attention(build, config, "sdpa", **where)


def test_other_models_get_sdpa_unless_eager_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    for config in (Gemma2Config(**CHECKPOINT_SIZES, attn_logit_softcapping=None), CONFIGS["llama"]):
        directory = checkpoint(tmp_path / config.model_type, config)
        assert load_checkpoint(directory).config._attn_implementation == "sdpa"
        assert load_checkpoint(directory, attention="eager").config._attn_implementation == "eager"


ON_GPU: dict[str, Any] = {"name": "it", "device": torch.device("cuda"), "dtype": torch.bfloat16}


def building(config: PreTrainedConfig, tried: list[str | None]) -> Any:
    def build(choice: str | None) -> PreTrainedModel:
        tried.append(choice)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)

    return build


@pytest.fixture
def flash_attention(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], None]:
    """Says that it is installed, beside a GPU of a compute capability."""

    def install(capability: tuple[int, int]) -> None:
        monkeypatch.setattr("qdora.model.attention.is_flash_attn_2_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)

    return install


@pytest.mark.parametrize(
    ("capability", "dtype", "fits"),
    [
        ((7, 5), torch.bfloat16, False),
        ((8, 0), torch.float32, False),
        ((8, 0), torch.bfloat16, True),
        ((12, 0), torch.float16, True),
    ],
)
def test_flash_attention_needs_a_gpu_and_dtype_that_have_its_kernels(flash_attention, capability, dtype, fits):
    flash_attention(capability)
    tried: list[str | None] = []
    with_attention(building(CONFIGS["llama"], tried), CONFIGS["llama"], "auto", **ON_GPU | {"dtype": dtype})
    assert tried == ["flash_attention_2" if fits else None]
    if not fits:
        with pytest.raises(UserError, match=r"^model\.attention: flash_attention_2 does not fit"):
            with_attention(
                building(CONFIGS["llama"], []), CONFIGS["llama"], "flash_attention_2", **ON_GPU | {"dtype": dtype}
            )


LOCAL: dict[str, Any] = {"hidden_size": 32, "num_layers": 2, "num_heads": 4}
UNFIT: list[PreTrainedConfig] = [
    GPTNeoConfig(**LOCAL, attention_types=[[["global", "local"], 1]]),
    LlamaConfig(**CHECKPOINT_SIZES | {"head_dim": 320}),
]


@pytest.mark.parametrize("config", UNFIT)
def test_flash_attention_is_not_taken_where_it_fails_or_computes_something_else(flash_attention, config):
    flash_attention((8, 0))
    tried: list[str | None] = []
    with_attention(building(config, tried), config, "auto", **ON_GPU)
    assert tried == ["flash_attention_2", None]
    with pytest.raises(UserError, match=r"^model\.attention: flash_attention_2 does not fit"):
        with_attention(building(config, tried), config, "flash_attention_2", **ON_GPU)


# --- grouped heads: torch has only its math kernel for them in some cases


def num_key_heads(dtype: torch.dtype, mask: Tensor | None = None) -> int:
    """Heads of the keys that transformers gives to torch for 8 heads of queries and 2 of keys."""
    seen: list[int] = []

    def attention(query: Tensor, key: Tensor, *_: Any, enable_gqa: bool = False, **__: Any) -> Tensor:
        assert enable_gqa == (key.shape[1] < query.shape[1])
        seen.append(key.shape[1])
        return query

    module = torch.nn.Module()
    module.num_key_value_groups = 4
    query, key = (torch.zeros(1, heads, 6, 16, dtype=dtype) for heads in (8, 2))
    with patch.object(functional, "scaled_dot_product_attention", attention):
        sdpa_attention.sdpa_attention_forward(module, query, key, key, mask)
    return seen[0]


@pytest.mark.parametrize("capability", [None, (7, 0), (7, 5), (8, 0), (9, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_keys_are_repeated_where_there_is_no_flash_kernel(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    has_flash = dtype != torch.float32 and capability not in ((7, 0), (7, 5))
    with planned_on("cuda"), fast_grouped_attention():
        assert num_key_heads(dtype) == (2 if has_flash else 8)
        assert num_key_heads(dtype, torch.ones(1, 1, 6, 6, dtype=torch.bool)) == 8
    with fast_grouped_attention():  # on a CPU
        assert num_key_heads(dtype) == 2
    with planned_on("cuda"):
        assert num_key_heads(dtype) == 2


@pytest.mark.parametrize("block", [lambda model: known_masks(model, None, torch.device("meta")), scoring])
def test_training_and_scoring_repeat_keys(block):
    with planned_on("cuda"), block(support.llama()):
        assert num_key_heads(torch.float32) == 8


# --- masks that nobody reads from a GPU: real tokens get the logits of transformers' own masks, bit for bit

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


@torch.no_grad()
def test_flash_attention_gets_the_lengths_of_packed_examples():
    """Without them each layer reads the positions from the GPU."""
    model, lengths, seen = support.llama(), (5, 7, 4), []
    positions = torch.cat([torch.arange(each) for each in lengths])[None]
    ids = torch.randint(3, 90, positions.shape, generator=torch.Generator().manual_seed(0))
    parts = ids.split(list(lengths), dim=1)
    alone = [model(input_ids=part, use_cache=False).logits[0] for part in parts]

    def attend(_layer: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, cu_seq_lens_q: Tensor, **options: Any) -> Any:
        """Each example by itself, as flash attention has it."""
        seen.append((mask, cu_seq_lens_q, options))
        cuts = [slice(*each) for each in pairwise(cu_seq_lens_q.tolist())]
        sdpa = partial(functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
        found = [sdpa(*(each[:, :, cut] for each in (q, k, v))) for cut in cuts]
        return torch.cat(found, dim=2).transpose(1, 2), None

    model.config._attn_implementation_internal = "flash_attention_2"
    assert takes_flash_lengths(model)
    packing = Packing(positions, torch.tensor([[0] * 5 + [1] * 7 + [2] * 4]))
    labels, device = torch.where(positions == 0, -100, ids), torch.device("meta")
    with (
        patch.dict(ALL_ATTENTION_FUNCTIONS._global_mapping, flash_attention_2=attend),
        known_masks(model, packing, device),
    ):
        loss = batch_loss(model, ids, torch.ones_like(ids), labels, packing=packing)
    assert len(seen) % len(model.model.layers) == 0
    for mask, starts, options in seen:
        assert mask is None
        assert starts.dtype == torch.int32
        assert starts.tolist() == options["cu_seq_lens_k"].tolist() == [0, 5, 12, 16]
        assert options["max_length_q"] == options["max_length_k"] == 7
    wanted = sum(cross_entropy(out[:-1], part[0, 1:], reduction="sum") for out, part in zip(alone, parts, strict=True))
    assert float(loss.nll_sum) == pytest.approx(float(wanted), rel=1e-5)


def test_flash_attention_of_rows_that_are_not_packed_reads_no_positions():
    """transformers looks for packed examples in each layer where there is a single row."""
    model, positions = support.llama(), torch.tensor([[0, 1, 2, 0, 1]])
    model.config._attn_implementation_internal = "flash_attention_2"
    for _ in range(2):
        assert modeling_flash_attention_utils._is_packed_sequence(positions, 1)
        with known_masks(model, None, torch.device("meta")):
            assert not modeling_flash_attention_utils._is_packed_sequence(positions, 1)


@needs_division
@torch.no_grad()
def test_on_a_cpu_and_after_the_block_masks_are_those_of_transformers_of_a_divided_model_too():
    """Of attention and of a state. torch gives a sharded module a class of its own, in a module of torch."""
    model, (ids, mask), seen = family("LFM2"), padded(), list[bool]()

    def look(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["attention_mask"] is None)

    for layer in model.model.layers:
        layer.register_forward_pre_hook(look, with_kwargs=True)

    def are_left_out() -> set[bool]:
        seen.clear()
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        return set(seen)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for divide in (lambda: None, lambda: fully_shard(model, mesh=init_device_mesh("cpu", (1,)))):
            divide()
            assert are_left_out() == {False}
            for device in ("cpu", "meta"):
                with known_masks(model, None, torch.device(device)):
                    assert are_left_out() == {device == "meta"}
            assert are_left_out() == {False}
    finally:
        dist.destroy_process_group()
