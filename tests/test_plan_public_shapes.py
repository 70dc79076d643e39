"""Plans without the Hub: stored shapes have the published numbers of parameters, and stand in only for plans."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub.errors import GatedRepoError
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

import qdora
from qdora.errors import HubFailure, UserError
from qdora.model import source as model_source
from qdora.plan import memory_plan, public_shapes
from qdora.plan.plan_view import plan_run
from qdora.recipe.recipe_file import load_recipe, recipe_names
from qdora.run.train import train_run
from tests import tiny_run

# Published numbers of parameters: the totals that the Hub shows for the safetensors files, which count a tied embedding
# once and no buffers. DeepSeek-V3 is published as 671 billion and Qwen3-Next as 80 billion.
PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "Qwen/Qwen3-Next-80B-A3B-Instruct": 80_000_000_000,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "google/gemma-3-1b-it": 999_885_952,
    "google/gemma-3-4b-it": 4_300_079_472,
    "google/gemma-3-12b-it": 12_187_325_040,
    "google/gemma-3-27b-it": 27_432_406_640,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Instruct-2407": 12_247_782_400,
    "mistralai/Mistral-Small-24B-Base-2501": 23_572_403_200,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-3.5-mini-instruct": 3_821_079_552,
    "microsoft/Phi-3-medium-4k-instruct": 13_960_238_080,
    "microsoft/phi-4": 14_659_507_200,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "openai/gpt-oss-20b": 20_914_757_184,
    "openai/gpt-oss-120b": 116_829_156_672,
    "zai-org/GLM-4-9B-0414": 9_400_279_040,
    "deepseek-ai/DeepSeek-V2-Lite": 15_706_484_224,
    "deepseek-ai/DeepSeek-V3": 671_000_000_000,
    "allenai/OLMo-2-0425-1B": 1_484_916_736,
    "allenai/OLMo-2-1124-7B": 7_298_617_344,
    "allenai/OLMo-2-1124-13B": 13_716_198_400,
    "allenai/OLMo-2-0325-32B": 32_234_279_936,
    "allenai/Olmo-3-1025-7B": 7_298_011_136,
    "allenai/Olmo-3-1125-32B": 32_233_522_176,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
}
ROUNDED = dict.fromkeys(["deepseek-ai/DeepSeek-V3", "Qwen/Qwen3-Next-80B-A3B-Instruct"], 1_000_000_000)
GATED = "meta-llama/Llama-3.2-1B-Instruct"
# Keys that configs take although their defaults do not have them, in all releases of transformers or in older ones.
OPTIONAL = {"partial_rotary_factor", "head_dim", "vision_use_head"}


def test_every_shape_has_the_published_number_of_parameters() -> None:
    shapes = public_shapes.public_shapes()
    wrong = {}
    for name, published in PUBLISHED.items():
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(shapes[name].config())
        count = sum(parameter.numel() for parameter in model.parameters())
        unit = ROUNDED.get(name, 1)
        if round(count / unit) * unit != published:
            wrong[name] = (count, published)
    assert not wrong
    counted = {id(shapes[name]) for name in PUBLISHED}
    assert {id(shape) for shape in shapes.values()} == counted


def test_the_file_names_each_model_once_and_only_keys_that_its_config_has() -> None:
    path = Path(public_shapes.__file__).with_suffix(".yaml")
    models = yaml.safe_load(path.read_text())["models"]
    names = [name for model in models for name in model["names"]]
    assert f"For {len(models)} public models" in (Path(qdora.__file__).parent / "guide/memory.md").read_text()
    assert len(names) == len({name.lower() for name in names})
    assert all(name.count("/") == 1 for name in names)
    assert all(shape.source.startswith("https://") for shape in public_shapes.public_shapes().values())
    for model in models:
        config = model["config"]
        parts = [config, *(value for value in config.values() if isinstance(value, dict))]
        for part in parts:
            known = AutoConfig.for_model(part["model_type"])
            assert not [key for key in part.keys() - OPTIONAL if not hasattr(known, key)], model["names"]


def test_windows_and_rotary_shares_arrive_in_the_config() -> None:
    """Sizes that no number of parameters shows."""
    config = {name: public_shapes.public_shapes()[name].config().get_text_config() for name in PUBLISHED}
    assert config["google/gemma-3-4b-it"].layer_types[:7] == [
        *["sliding_attention"] * 5,
        "full_attention",
        "sliding_attention",
    ]
    assert config["google/gemma-2-9b"].layer_types[:3] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert config["openai/gpt-oss-20b"].layer_types[:2] == ["sliding_attention", "full_attention"]
    assert config["allenai/Olmo-3-1025-7B"].layer_types[:4] == [*["sliding_attention"] * 3, "full_attention"]
    assert config["mistralai/Mistral-7B-v0.1"].sliding_window == 4096
    assert config["mistralai/Mistral-7B-v0.3"].sliding_window is None
    assert config["microsoft/Phi-4-mini-instruct"].rope_parameters["partial_rotary_factor"] == 0.75
    assert config["zai-org/GLM-4-9B-0414"].rope_parameters["partial_rotary_factor"] == 0.5


def gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub answers as for a gated model without access."""

    def refuse(*_: Any, **__: Any) -> str:
        answer: Any = SimpleNamespace(headers={}, request=None)
        raise GatedRepoError("403", response=answer)

    monkeypatch.setattr(model_source, "snapshot_download", refuse)


def a_recipe(tmp_path: Path, name: str) -> Any:
    return tiny_run.one_layer_recipe(tmp_path, model__source=name, model__tokenizer=None, train__steps=1)


def test_a_gated_model_is_planned_and_the_plan_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate(monkeypatch)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 100, "num_hidden_layers": 2, "tie_word_embeddings": True}
    tiny = public_shapes.PublicShape({"model_type": "llama", **sizes}, "https://example.org/tiny")
    monkeypatch.setattr(memory_plan, "public_shapes", lambda: {GATED: tiny})
    shown = io.StringIO()
    found = plan_run(a_recipe(tmp_path, GATED), "r.yaml", console=Console(file=shown, width=200))["memory"]
    assert found["stored_shape"] == "https://example.org/tiny"
    # Embedding, which is the head too, q and o, k and v, the three matrices of the MLP, and the norms
    assert found["num_weights"] == 100 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64) + 64
    assert (
        "Model: the shape stored in qdora, from https://example.org/tiny, because the Hub does not" in shown.getvalue()
    )
    assert f"there is no tokenizer: model.source: {GATED}: the model is gated." in shown.getvalue()


@pytest.mark.slow
def test_the_recipe_for_70b_is_planned_offline() -> None:
    found = plan_run(load_recipe("llama-70b-40gb"), "llama-70b-40gb", console=Console(file=io.StringIO()))["memory"]
    assert found["stored_shape"].startswith("https://")
    assert found["num_weights"] == PUBLISHED["meta-llama/Llama-3.3-70B-Instruct"]
    assert found["fits"]


def test_only_plans_take_a_stored_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate(monkeypatch)
    with pytest.raises(UserError, match=r"the model is gated\. Fix: accept its terms"):
        train_run(a_recipe(tmp_path, GATED), tmp_path / "run")
    with pytest.raises(HubFailure, match="the model is gated"):
        plan_run(a_recipe(tmp_path, "someone/unlisted"), "r.yaml", console=Console(file=io.StringIO()))


def test_a_model_at_hand_is_planned_by_its_own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = next(iter(public_shapes.public_shapes().values()))
    recipe = tiny_run.one_layer_recipe(tmp_path)
    monkeypatch.setattr(memory_plan, "public_shapes", lambda: {recipe.model.source: shape})
    found = memory_plan.plan(recipe, device_kind="cpu")
    assert found.stored_shape is None
    assert found.num_weights < 1_000_000


def test_every_shipped_recipe_of_a_public_model_has_a_shape() -> None:
    sources = {load_recipe(name).model.source for name in recipe_names()}
    on_the_hub = {name for name in sources if name.count("/") == 1}
    assert "meta-llama/Llama-3.3-70B-Instruct" in on_the_hub
    assert on_the_hub <= public_shapes.public_shapes().keys()
