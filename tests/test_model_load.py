"""Loading: the weights are those of transformers, quantised where asked, and every fault of a checkpoint is named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FalconConfig,
    FalconForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPTNeoXJapaneseConfig,
    Lfm2Config,
    PreTrainedModel,
)
from transformers.core_model_loading import Transpose, WeightConverter

from qdora.errors import UserError
from qdora.export.checkpoints import check_foldable
from qdora.model.inject import frozen_layers, inject
from qdora.quant.packed import dequantize, quantize
from tests.support import (
    CHECKPOINT_CONFIGS,
    assert_refused,
    checkpoint,
    checkpoint_logits,
    load_checkpoint,
    one_file_checkpoint,
)

UP = "model.layers.0.mlp.up_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ROTARY = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.fixture(scope="module", params=CHECKPOINT_CONFIGS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp(request.param), CHECKPOINT_CONFIGS[request.param])


def of_transformers(directory: Path, model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same model as transformers loads it."""
    attention = model.config._attn_implementation
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=attention)


def change_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_model_is_that_of_transformers(saved, dtype):
    assert len(list(saved.glob("*.safetensors"))) > 1
    model = load_checkpoint(saved, compute_dtype=dtype)
    assert model.config._attn_implementation == ("eager" if model.config.model_type == "gemma2" else "sdpa")
    reference = of_transformers(saved, model, dtype)
    assert torch.equal(checkpoint_logits(model), checkpoint_logits(reference))
    ours, theirs = ({n: t.dtype for n, t in [*m.named_parameters(), *m.named_buffers()]} for m in (model, reference))
    assert ours == theirs
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_quantised_logits_equal_transformers_on_dequantised_weights(saved, quant):
    model = load_checkpoint(saved, quant=quant)
    reference = of_transformers(saved, model)
    linear = {n: m for n, m in reference.named_modules() if type(m) is nn.Linear and n != "lm_head"}
    for module in linear.values():
        module.weight.data = dequantize(quantize(module.weight.data, quant, 64, True))
    assert len(linear) == 14
    assert frozen_layers(model).keys() == linear.keys()
    torch.testing.assert_close(checkpoint_logits(model), checkpoint_logits(reference), rtol=1e-5, atol=1e-5)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings


def test_weights_are_quantised_from_the_dtype_of_the_file(tmp_path):
    weight = one_file_checkpoint(tmp_path)[1][UP]
    model = load_checkpoint(tmp_path, quant="nf4", double_quant=False, compute_dtype=torch.bfloat16)
    layer, expected = model.model.layers[0].mlp.up_proj, quantize(weight, "nf4", 64, False)
    assert torch.equal(layer.packed, expected.packed)
    assert torch.equal(layer.absmax, expected.absmax)
    assert not torch.equal(expected.absmax, quantize(weight.bfloat16(), "nf4", 64, False).absmax)


def test_loaded_model_does_not_depend_on_the_file_and_counts_its_tensors(tmp_path):
    seen: list[tuple[int, int]] = []
    one_file_checkpoint(tmp_path)
    GenerationConfig(do_sample=True, temperature=0.25).save_pretrained(tmp_path)
    model = load_checkpoint(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 21) for done in range(1, 22)]  # 2 layers of 9, embedding, norm, head
    assert model.generation_config.temperature == 0.25
    before, file = checkpoint_logits(model), tmp_path / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as stream:  # in place: a mapped view would see it
        stream.seek(size - 40000)
        stream.write(b"\x7f" * 40000)
    assert torch.equal(checkpoint_logits(model), before)


def test_skip_takes_last_parts_and_patterns(tmp_path):
    directory = checkpoint(tmp_path, CHECKPOINT_CONFIGS["llama"])
    model = load_checkpoint(directory, quant="nf4", skip=["lm_head", "up_proj", "model.layers.1.self_attn.*"])
    expected = {f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"}
    expected |= {f"model.layers.{layer}.mlp.{part}_proj" for layer in (0, 1) for part in ("gate", "down")}
    assert set(frozen_layers(model)) == expected
    assert "lm_head" in frozen_layers(load_checkpoint(directory, quant="nf4", skip=[]))


def test_other_architectures(tmp_path, caplog):
    """A head of another name stays dense; a convolution is not called an expert; GPT-2 loads if it is dense."""
    sizes = {"vocab_size": 97, "hidden_size": 64, "num_attention_heads": 4, "tie_word_embeddings": False}
    neox = GPTNeoXJapaneseConfig(**sizes, intermediate_multiple_size=2, num_hidden_layers=1, max_position_embeddings=64)
    packed = frozen_layers(load_checkpoint(checkpoint(tmp_path / "1", neox), quant="nf4"))
    names = {name.rpartition(".")[2] for name in packed}
    assert names == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    layers: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    lfm = Lfm2Config(**sizes, **layers, intermediate_size=64, num_key_value_heads=1)
    model = load_checkpoint(checkpoint(tmp_path / "2", lfm), quant="nf4")
    assert any(isinstance(module, nn.Conv1d) for module in model.modules())
    assert "expert" not in caplog.text
    gpt2 = checkpoint(tmp_path / "3", GPT2)
    theirs = AutoModelForCausalLM.from_pretrained(gpt2, dtype=torch.float32)
    assert torch.equal(checkpoint_logits(load_checkpoint(gpt2)), checkpoint_logits(theirs))


def test_layers_of_a_class_of_their_own_are_quantised_and_adapted_but_not_as_bitsandbytes_layers(tmp_path):
    torch.manual_seed(0)
    config = FalconConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=False)
    dense = FalconForCausalLM(config).eval()
    dense.save_pretrained(tmp_path)
    model = load_checkpoint(tmp_path, quant="nf4")
    packed = [path for path, layer in frozen_layers(model).items() if layer.packed_form is not None]
    leaves = [path.rpartition(".")[2] for path in packed]
    assert sorted(leaves) == sorted(["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"] * 2)
    assert list(inject(model, rank=2)) == packed
    before = checkpoint_logits(dense)
    assert len(inject(dense, rank=2)) == 8
    torch.testing.assert_close(checkpoint_logits(dense), before, rtol=1e-5, atol=1e-5)
    said = "transformers does not load 8 layers in 4 bits .*FalconLinear.*--format merged"
    with pytest.raises(UserError, match=f"--format nf4-lora: {said}"):
        check_foldable(model, torch.float32)


GPT2 = GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1)
NF4 = {"quant": "nf4"}
QUANTO = {"quantization_config": {"quant_method": "quanto"}}
MISSPELT = [r"base\.skip: 'upproj' matches no linear layer.* up_proj"]
# Model, changes of its config.json, settings, and words of each fault.
REFUSED: dict[str, tuple[Any, dict[str, Any], dict[str, Any], list[str]]] = {
    "skip": ("llama", {}, NF4 | {"skip": ["lm_head", "upproj"]}, MISSPELT),
    "tied head": ("qwen2", {}, NF4 | {"skip": []}, ["lm_head, which shares its weight with the embedding"]),
    "transposed": (GPT2, {}, NF4, [r"base\.quant: must be none for a model of Conv1D"]),
    "method": ("llama", QUANTO, {}, ["checkpoints of .quanto. cannot be read"]),
    "model type": ("llama", {"model_type": "lama"}, {}, ["its config cannot be used"]),
    "vocabulary": ("llama", {"vocab_size": 10**13}, {}, ["config cannot be used: .*can't allocate memory"]),
    "dtype": ("llama", {"dtype": "x" * 1000}, {}, ["config cannot be used: .*module 'torch' has no attribute 'xxx"]),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_one_line_for_each_fault(tmp_path, case):
    config, damage, settings, words = REFUSED[case]
    checkpoint(tmp_path, CHECKPOINT_CONFIGS.get(config) if isinstance(config, str) else config)
    change_config(tmp_path, **damage)
    assert_refused(words, load_checkpoint, tmp_path, **settings)


def test_a_conversion_that_turns_a_weight_is_transformers_own(tmp_path, monkeypatch):
    checkpoint(tmp_path, CHECKPOINT_CONFIGS["llama"])
    name = "self_attn.o_proj.weight"
    turned = WeightConverter(name, name, [Transpose(0, 1)])
    path = "model.layers.0.self_attn.o_proj"
    plain = load_checkpoint(tmp_path).get_submodule(path).weight
    monkeypatch.setattr("qdora.model.checkpoint.get_model_conversion_mapping", lambda model: [turned])
    assert torch.equal(load_checkpoint(tmp_path).get_submodule(path).weight, plain.T)


Tensors = dict[str, Tensor]


def rewritten(directory: Path, change: Callable[[Tensors], Tensors], config: Any = None) -> Path:
    """A checkpoint of one file whose tensors `change` has changed."""
    file, tensors = one_file_checkpoint(directory, config)
    save_file({name: each.clone() for name, each in change(tensors).items()}, file, metadata={"format": "pt"})
    return directory


def misfit(tensors: Tensors) -> Tensors:
    del tensors[UP], tensors["model.norm.weight"]
    return tensors | {UP.replace("up_proj", "upp_proj"): torch.zeros(96, 64), HEAD: torch.zeros(98, 64)}


# Changes of the tensors, settings, and words of the faults.
DAMAGED: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], list[str]]] = {
    "missing, unexpected, misshapen": (
        misfit,
        {},
        [
            r"no tensor 'model\.layers\.0\.mlp\.up_proj\.weight'",
            r"no tensor 'model\.norm\.weight'",
            r"'model\.layers\.0\.mlp\.upp_proj\.weight' has no place in the model",
            r"'lm_head\.weight' has shape \[98, 64\], must have \[97, 64\]",
        ],
    ),
    "integers": (lambda t: t | {UP: t[UP].int()}, {}, [rf"tensor '{UP}' has dtype I32, must be of floating point"]),
    "not finite": (
        lambda t: t | {UP: t[UP].index_fill(1, torch.tensor([0]), math.nan)},
        NF4,
        [r"^model\.layers\.0\.mlp\.up_proj\.weight: .*not finite"],
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_tensors_that_do_not_fit_are_gathered(tmp_path, case):
    change, settings, words = DAMAGED[case]
    assert_refused(words, load_checkpoint, rewritten(tmp_path, change), **settings)


FORMS: dict[str, Callable[[Tensors], Tensors]] = {
    "a repeated head": lambda t: t | {HEAD: t[EMBEDDING], ROTARY: torch.ones(8)},
    "only the head of a tied pair": lambda t: {HEAD if name == EMBEDDING else name: each for name, each in t.items()},
    "no prefix": lambda t: {name.removeprefix("model."): each for name, each in t.items()},
    "another head": lambda t: t | {HEAD: 2 * t[EMBEDDING]},
}


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_of_a_tied_model(tmp_path, form):
    model = load_checkpoint(rewritten(tmp_path / "form", FORMS[form], CHECKPOINT_CONFIGS["qwen2"]))
    reference = load_checkpoint(rewritten(tmp_path / "plain", dict, CHECKPOINT_CONFIGS["qwen2"]))
    is_tied = form != "another head"
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings == is_tied
    wanted = checkpoint_logits(reference)
    assert torch.equal(checkpoint_logits(model), wanted if is_tied else 2 * wanted)


def dequantised_by_hand(packed, parts, block_size, offset):
    """Not bitsandbytes' own function: on a CPU it is wrong where a block crosses a row (96 columns, blocks of 64)."""
    codes = np.stack([packed.numpy() >> 4, packed.numpy() & 15], axis=-1).reshape(-1)
    scales = parts["absmax"].numpy()
    if "nested_absmax" in parts:
        outer = parts["nested_absmax"].numpy().repeat(256)[: len(scales)]
        scales = parts["nested_quant_map"].numpy()[scales] * outer + np.float32(offset)
    return torch.from_numpy(parts["quant_map"].numpy()[codes] * scales.repeat(block_size)[: len(codes)])


@pytest.mark.parametrize(("kind", "nested"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_a_checkpoint_in_4_bits_loads_as_it_is(tmp_path, caplog, kind, nested):
    """As transformers saves it."""
    options = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested}
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **options)
    saved = AutoModelForCausalLM.from_pretrained(
        checkpoint(tmp_path / "dense", CHECKPOINT_CONFIGS["llama"]),
        quantization_config=settings,
        dtype=torch.float32,
        device_map="cpu",
    )
    saved.save_pretrained(tmp_path / "m")
    model = load_checkpoint(tmp_path / "m", quant=kind, double_quant=nested)
    stored = load_file(tmp_path / "m/model.safetensors")
    layers, reference = frozen_layers(model), load_checkpoint(tmp_path / "dense")
    assert len(layers) == 14
    for name, layer in layers.items():
        state = saved.get_submodule(name).weight.quant_state
        packed, parts = stored[f"{name}.weight"], state.as_dict(packed=True)
        assert torch.equal(layer.stored_weight.packed, packed.reshape(-1))
        expected = dequantised_by_hand(packed, parts, 64, float(state.offset) if nested else 0.0).reshape(state.shape)
        torch.testing.assert_close(layer.dequantized(), expected, rtol=1e-6, atol=1e-7)
        reference.get_submodule(name).weight.data = expected
    torch.testing.assert_close(checkpoint_logits(model), checkpoint_logits(reference), rtol=1e-5, atol=1e-5)
    assert not hasattr(model.config, "quantization_config")
    with pytest.raises(UserError, match=rf"base\.quant: must be auto or {kind}, .* \(got none\)"):
        load_checkpoint(tmp_path / "m", quant="none")
    load_checkpoint(tmp_path / "m", quant=kind)
    assert not caplog.messages  # of defaults nobody knows whether they were chosen
    load_checkpoint(tmp_path / "m", quant=kind, block_size=32, double_quant=False)
    words = ["base.block_size: the checkpoint has 64, which is used (got 32)."]
    words += ["base.double_quant: the checkpoint has True, which is used (got False)."] * nested
    assert caplog.messages == words


def test_a_checkpoint_in_8_bits_loads_as_it_is(tmp_path):
    file, tensors = one_file_checkpoint(tmp_path)
    reference = load_checkpoint(checkpoint(tmp_path / "dense", CHECKPOINT_CONFIGS["llama"]))
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        packed, absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(tensors.pop(name).half())
        tensors |= {name: packed, name.replace(".weight", ".SCB"): absmax}
        tensors[name.replace(".weight", ".weight_format")] = torch.tensor(0, dtype=torch.uint8)
        reference.get_submodule(name.removesuffix(".weight")).weight.data = packed.float() * absmax[:, None] / 127
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)
    change_config(tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    model = load_checkpoint(tmp_path, quant="int8")
    assert len(frozen_layers(model)) == 14
    torch.testing.assert_close(checkpoint_logits(model), checkpoint_logits(reference), rtol=1e-5, atol=1e-5)
