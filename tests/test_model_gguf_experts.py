"""GGUF files with experts: names, halves and settings of llama.cpp undone, experts read one by one."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qdora.errors import UserError
from qdora.model.experts import stacks
from qdora.model.load import load_model
from qdora.model.source import load_tokenizer, resolve
from qdora.nn.expert_linear import FrozenExperts
from qdora.ops.packed import dequantize, quantize
from tests import tiny_experts, tiny_tokenizer

gguf = pytest.importorskip("gguf")

from tests.fake_converter import NAMES, TOP, Values, add_settings, convert, finish  # noqa: E402

IDS = torch.randint(3, 400, (2, 12), generator=torch.Generator().manual_seed(7))
FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "minimax_m2"]
# What llama.cpp does whatever the file says, or what the converter does not write.
FIXED: dict[str, dict[str, Any]] = {"qwen3_moe": {"norm_topk_prob": True}, "mixtral": {"num_experts_per_tok": 3}}
DEFAULT_WIDTHS = {
    "qwen2_moe": {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    "qwen3_moe": {"moe_intermediate_size": 768},
}


def written(folder: Path, name: str, type_: str = "f32", *, fused: bool = False, **changes: Any) -> Path:
    """file.gguf in `folder`, made from the checkpoint beside it."""
    model = tiny_experts.make(name, **(FIXED.get(name, {}) | changes))
    model.save_pretrained(folder / "model")
    tiny_tokenizer.make().save_pretrained(folder / "model")
    convert(folder / "model", folder / "file.gguf", type_, fused=fused)
    return folder / "file.gguf"


def load(path: Path, **settings: Any) -> Any:
    return load_model(resolve(str(path)), **{"quant": "none", "compute_dtype": torch.float32, **settings})


def library(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.std()))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_gives_the_model_that_it_was_made_from(tmp_path: Path, name: str) -> None:
    model = load(written(tmp_path, name))
    assert len(stacks(model)) == 4
    wanted = library(tmp_path / "model")
    assert_close(logits(model), logits(wanted))
    assert model.config.model_type == wanted.config.model_type


@pytest.mark.parametrize("name", DEFAULT_WIDTHS)
def test_transformers_reads_the_same_where_it_knows_the_widths(tmp_path: Path, name: str) -> None:
    """It takes the defaults of the family for the widths of experts."""
    path = written(tmp_path, name, "q4_0", **DEFAULT_WIDTHS[name])
    assert_close(logits(load(path)), logits(library(tmp_path, gguf_file=path.name)))


def test_gate_and_up_may_be_one_tensor(tmp_path: Path) -> None:
    model = load(written(tmp_path, "qwen3_moe", fused=True))
    assert_close(logits(model), logits(library(tmp_path / "model")))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_the_codes_are_those_of_the_whole_stack(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name, "q8_0")
    dense, model = load(path), load(path, quant="nf4")
    for place, stack in stacks(model).items():
        assert isinstance(stack, FrozenExperts)
        weight = dense.get_submodule(place).weight.detach()
        assert torch.equal(stack.dequantized(), dequantize(quantize(weight, "nf4")))


def test_mxfp4_is_kept_bit_for_bit_or_quantised_again(tmp_path: Path) -> None:
    path = written(tmp_path, "gpt_oss", "mxfp4")
    kept, again, dense = load(path, quant="mxfp4"), load(path, quant="nf4"), load(path)
    file = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for block in range(2):
        gate, up, down = (
            torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
            for tensor in (file[f"blk.{block}.ffn_{part}_exps.weight"] for part in ("gate", "up", "down"))
        )
        alternating = torch.stack([gate, up], dim=2).flatten(0, 2)
        for part, weight in (("gate_up_proj", alternating), ("down_proj", down.flatten(0, 1))):
            place = f"model.layers.{block}.mlp.experts.{part}"
            assert kept.get_submodule(place).kind == "mxfp4"
            assert torch.equal(kept.get_submodule(place).dequantized(), weight)
            assert torch.equal(dense.get_submodule(place).weight, weight)
            assert torch.equal(again.get_submodule(place).dequantized(), dequantize(quantize(weight, "nf4")))
    assert_close(logits(kept), logits(dense))


QWEN35 = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
}


def qwen35_tensor(name: str, values: Values) -> dict[str, Values]:
    """Tensors of a file, of the right shapes: what is in them is compared by reading them twice."""
    module, _, leaf = name.rpartition(".")
    if module in TOP:
        return {f"{TOP[module]}.{leaf}": values}
    block = f"blk.{name.split('.')[2]}"
    inner = module.split(".", 3)[3]
    if name.endswith("experts.gate_up_proj"):
        gate, up = np.split(values, 2, axis=1)
        return {f"{block}.ffn_gate_exps.weight": gate.copy(), f"{block}.ffn_up_exps.weight": up.copy()}
    if name.endswith("experts.down_proj"):
        return {f"{block}.ffn_down_exps.weight": values}
    if leaf in ("A_log", "dt_bias"):
        return {f"{block}.ssm_a": -np.exp(values)} if leaf == "A_log" else {f"{block}.ssm_dt.bias": values}
    if leaf == "weight" and inner.endswith(("conv1d", "shared_expert_gate")):
        values = values.squeeze()
    return {f"{block}.{(NAMES | QWEN35)[inner]}.{leaf}": values}


@pytest.mark.parametrize("architecture", ["qwen35moe", pytest.param("qwen35", marks=pytest.mark.slow)])
def test_conversions_of_newer_releases_are_used(tmp_path: Path, architecture: str) -> None:
    """Qwen3.5: linear attention with its value heads in another order, norms of 1 + w."""
    library_module = pytest.importorskip("transformers.integrations.gguf.utils")
    if architecture not in library_module.GGUF_ARCHS:
        pytest.skip("this release of transformers does not read Qwen3.5 from GGUF")
    sizes = {"head_dim": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2}
    if architecture == "qwen35moe":
        model = tiny_experts.make("qwen3_5_moe_text", **sizes)
    else:
        dense = tiny_experts.SIZES | tiny_experts.LINEAR | {"intermediate_size": 64} | sizes
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_5_text", **dense), dtype=torch.float32)
    writer = gguf.GGUFWriter(str(tmp_path / "file.gguf"), architecture)
    add_settings(writer, {**model.config.to_dict(), "intermediate_size": 64})
    writer.add_token_list([f"word{index}" for index in range(400)])
    for key, value in {
        "full_attention_interval": 2,
        "expert_feed_forward_length": 64,
        "expert_shared_feed_forward_length": 64,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 16,
        "ssm.group_count": 2,
        "ssm.time_step_rank": 4,
        "ssm.inner_size": 64,
        "rope.dimension_count": 8,
    }.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_array(f"{architecture}.rope.dimension_sections", [2, 1, 1, 0])
    for name, tensor in model.state_dict().items():
        for key, values in qwen35_tensor(name, tensor.numpy()).items():
            writer.add_tensor(key, values)
    finish(writer)
    found = load(tmp_path / "file.gguf")
    assert len(stacks(found)) == (4 if architecture == "qwen35moe" else 0)
    assert_close(logits(found), logits(library(tmp_path, gguf_file="file.gguf")))


# --- what is refused


def with_changed_tensors(path: Path, change: Callable[[dict[str, Values]], None]) -> Path:
    """A copy of a file in float32 whose tensors `change` changes."""
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor.data.copy() for tensor in reader.tensors}
    change(tensors)
    architecture = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(str(path.with_name("changed.gguf")), architecture)
    for field in reader.fields.values():
        if field.name.startswith(f"{architecture}.") or field.name == "tokenizer.ggml.tokens":
            writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1])
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    finish(writer)
    return path.with_name("changed.gguf")


def test_experts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = written(tmp_path, "qwen3_moe")

    def without_up(tensors: dict[str, Values]) -> None:
        del tensors["blk.1.ffn_up_exps.weight"]

    with pytest.raises(UserError, match=r"blk\.1\.ffn_gate_exps\.weight hold 64 rows of each expert, .* asks for 128"):
        load(with_changed_tensors(path, without_up))

    def three(tensors: dict[str, Values]) -> None:
        tensors["blk.0.ffn_down_exps.weight"] = tensors["blk.0.ffn_down_exps.weight"][:3]

    with pytest.raises(UserError, match=r"ffn_down_exps.weight' has shape \[3, 64, 64\], the config asks for \[4,"):
        load(with_changed_tensors(path, three))

    def unknown(tensors: dict[str, Values]) -> None:
        tensors["blk.0.ffn_norm_exps.weight"] = tensors.pop("blk.0.ffn_up_exps.weight")

    with pytest.raises(UserError) as raised:
        load(with_changed_tensors(path, unknown))
    (fault,) = raised.value.faults
    assert "'blk.0.ffn_norm_exps.weight' holds experts, which are not read from GGUF files of qwen3moe." in fault
    assert fault.endswith("Fix: use the safetensors checkpoint of the model.")


def test_an_architecture_that_transformers_does_not_know_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "file.gguf"
    writer = gguf.GGUFWriter(str(path), "deepseek2")
    writer.add_block_count(2)
    writer.add_tensor("blk.0.ffn_gate_exps.weight", np.zeros((4, 64, 64), dtype=np.float32))
    finish(writer)
    with pytest.raises(UserError, match=r"cannot be used: .*architecture deepseek2 is not supported") as raised:
        load(path)
    assert len(str(raised.value).splitlines()) == 1


# --- memory


def peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    pytest.skip("this system does not tell the peak of memory")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_no_stack_is_dense_in_memory(tmp_path: Path) -> None:
    """64 experts of 512 x 256 and 256 x 256: stacks of 32 and 16 MiB in float32, 4.5 and 2.3 in NF4."""
    wide = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 64, "num_hidden_layers": 1}
    path = written(tmp_path, "qwen3_moe", "q8_0", **wide)
    load(path, quant="nf4")  # imports, and buffers that stay
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_bytes()
    load(path, quant="nf4")
    assert peak_bytes() - before < 16 * 2**20


def test_the_tokenizer_of_gpt_oss_is_in_its_file(tmp_path: Path) -> None:
    """transformers cannot read it, since it fails on the config before; nor does qdora with releases before 5.2x."""
    if not hasattr(pytest.importorskip("transformers.integrations.gguf"), "convert_gguf_tokenizer"):
        pytest.skip("this release of transformers does not read the tokenizer of gpt-oss from GGUF")
    source = resolve(str(written(tmp_path, "gpt_oss")))
    text = "Question: is the sky blue?<|im_end|>"
    wanted = tiny_tokenizer.make()(text)["input_ids"]
    for _ in range(2):  # as read, and as kept
        tokenizer = load_tokenizer(source)
        assert tokenizer(text)["input_ids"] == wanted
        assert tokenizer.eos_token == "<|im_end|>"
