"""Which attention a model gets: the fastest one that computes what it needs, and keys repeated where that is faster."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    GPTNeoConfig,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import sdpa_attention
from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssPreTrainedModel

from qdora.errors import UserError
from qdora.evaluate.forward_path import scoring
from qdora.model.attention import with_attention
from qdora.model.grouped_attention import fast_grouped_attention
from qdora.model.known_masks import known_masks
from qdora.quant.planned_device import planned_on
from tests import support
from tests.support import CHECKPOINT_CONFIGS, CHECKPOINT_SIZES, checkpoint, checkpoint_logits, load_checkpoint

NEEDS_MORE_THAN_SDPA = {
    "a soft-cap": (
        CHECKPOINT_CONFIGS["gemma2"],
        Gemma2PreTrainedModel,
        r"soft-caps its scores \(attn_logit_softcapping 2\)",
    ),
    "sinks": (
        GptOssConfig(**CHECKPOINT_SIZES, num_local_experts=2, num_experts_per_tok=1, sliding_window=8),
        GptOssPreTrainedModel,
        r"has sinks \(model\.layers\.0\.self_attn\.sinks\)",
    ),
}


@pytest.mark.parametrize("need", NEEDS_MORE_THAN_SDPA)
def test_attention_is_chosen_by_what_the_model_needs(need, monkeypatch, caplog):
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
    with caplog.at_level(logging.INFO, "qdora"):
        model = with_attention(build, config, "auto", **where)
    assert re.search(rf"Attention of it: eager, since its attention {what}", caplog.text)
    assert torch.equal(checkpoint_logits(model), checkpoint_logits(eager))
    with pytest.raises(UserError, match=rf"model\.attention: got sdpa, but .* {what}.* must be auto or eager"):
        with_attention(build, config, "sdpa", **where)


def test_other_models_get_sdpa_unless_eager_is_asked_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    for config in (Gemma2Config(**CHECKPOINT_SIZES, attn_logit_softcapping=None), CHECKPOINT_CONFIGS["llama"]):
        directory = checkpoint(tmp_path / config.model_type, config)
        with caplog.at_level(logging.DEBUG, "qdora"):
            assert load_checkpoint(directory).config._attn_implementation == "sdpa"
        assert "sdpa" in caplog.text
        assert load_checkpoint(directory, attention="eager").config._attn_implementation == "eager"


# --- flash attention

ON_GPU: dict[str, Any] = {"name": "it", "device": torch.device("cuda"), "dtype": torch.bfloat16}


def building(config: PreTrainedConfig, tried: list[str | None], *fails: str | None) -> Any:
    """Builds a model, and fails as on a damaged config for some kinds of attention."""

    def build(choice: str | None) -> PreTrainedModel:
        tried.append(choice)
        if choice in fails:
            raise KeyError("hidden_act")
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
    ("capability", "dtype", "refused"),
    [
        ((7, 5), torch.bfloat16, r"needs a GPU of compute capability 8\.0 or more, and this one has 7\.5"),
        ((8, 0), torch.float32, r"has no kernels for float32 \(model\.dtype\)"),
        ((8, 0), torch.bfloat16, None),
        ((12, 0), torch.float16, None),
    ],
)
def test_flash_attention_needs_a_gpu_and_dtype_that_have_its_kernels(flash_attention, capability, dtype, refused):
    flash_attention(capability)
    tried: list[str | None] = []
    build, where = building(CHECKPOINT_CONFIGS["llama"], tried), ON_GPU | {"dtype": dtype}
    with_attention(build, CHECKPOINT_CONFIGS["llama"], "auto", **where)
    assert tried == [None if refused else "flash_attention_2"]
    if refused:
        with pytest.raises(
            UserError, match=rf"^model\.attention: got flash_attention_2, which {refused}; must be auto"
        ):
            with_attention(build, CHECKPOINT_CONFIGS["llama"], "flash_attention_2", **where)
        assert len(tried) == 1


OWN_CLASSES = "has a class of its own for each attention"
UNFIT: list[tuple[PreTrainedConfig, str]] = [
    (
        GPTNeoConfig(hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
        OWN_CLASSES,
    ),
    (FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True), OWN_CLASSES),
    (LlamaConfig(**CHECKPOINT_SIZES | {"head_dim": 320}), "has heads of 320 features, more than the 256 of flash-attn"),
]


@pytest.mark.parametrize(("config", "reason"), UNFIT)
def test_flash_attention_is_not_taken_where_it_fails_or_computes_something_else(
    flash_attention, config, reason, caplog
):
    flash_attention((8, 0))
    tried: list[str | None] = []
    with caplog.at_level(logging.INFO, "qdora"):
        with_attention(building(config, tried), config, "auto", **ON_GPU)
    assert tried == ["flash_attention_2", None]
    assert f"it is not run with flash_attention_2: it {reason}." in caplog.text
    with pytest.raises(UserError, match=rf"got flash_attention_2, but it {reason}; must be auto or eager"):
        with_attention(building(config, tried), config, "flash_attention_2", **ON_GPU)


def test_a_model_that_cannot_be_built_is_not_said_to_lack_an_attention(flash_attention, monkeypatch, caplog):
    flash_attention((8, 0))
    llama, (sinks, family, _) = CHECKPOINT_CONFIGS["llama"], NEEDS_MORE_THAN_SDPA["sinks"]
    monkeypatch.setattr(family, "_supports_sdpa", True)
    with caplog.at_level(logging.INFO, "qdora"):
        for config, fails in ((llama, ("flash_attention_2", None)), (sinks, ("eager",))):
            with pytest.raises(UserError, match=r"^model: it: cannot be built: 'hidden_act'$"):
                with_attention(building(config, [], *fails), config, "auto", **ON_GPU)
            assert "has no flash" not in caplog.text
        with_attention(building(llama, [], "flash_attention_2"), llama, "auto", **ON_GPU)
    assert "it has no flash_attention_2 ('hidden_act')." in caplog.text


# --- grouped heads: torch has only its math kernel for them in some cases


def num_key_heads(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, mask: Tensor | None = None) -> int:
    """Heads of the keys that transformers gives to torch for 8 heads of queries and 2 of keys."""
    seen: list[int] = []

    def attention(query: Tensor, key: Tensor, *_: Any, enable_gqa: bool = False, **__: Any) -> Tensor:
        assert enable_gqa == (key.shape[1] < query.shape[1])
        seen.append(key.shape[1])
        return query

    module = torch.nn.Module()
    module.num_key_value_groups = 4
    query, key = (torch.zeros(1, heads, 6, 16, dtype=dtype) for heads in (8, 2))
    with monkeypatch.context() as patched:
        patched.setattr(functional, "scaled_dot_product_attention", attention)
        sdpa_attention.sdpa_attention_forward(module, query, key, key, mask)
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
    with planned_on("cuda"), block(support.llama()):
        assert num_key_heads(monkeypatch, torch.float32) == 8
