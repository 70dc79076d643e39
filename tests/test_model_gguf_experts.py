"""GGUF files with experts: names, halves and settings of llama.cpp undone, experts read one by one."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qdora.errors import UserError
from qdora.model.experts import stacks
from qdora.model.load import load_model
from qdora.model.source import resolve
from qdora.nn.expert_linear import FrozenExperts
from qdora.ops.packed import dequantize, quantize
from tests import tiny_experts, tiny_tokenizer

gguf = pytest.importorskip("gguf")

from tests.fake_converter import Values, convert, finish  # noqa: E402

IDS = torch.randint(3, 400, (2, 12), generator=torch.Generator().manual_seed(7))
FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "minimax_m2"]
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


def test_the_codes_are_those_of_the_whole_stack(tmp_path: Path) -> None:
    path = written(tmp_path, "qwen3_moe", "q8_0")
    dense, model = load(path), load(path, quant="nf4")
    for place, stack in stacks(model).items():
        assert isinstance(stack, FrozenExperts)
        weight = dense.get_submodule(place).weight.detach()
        assert torch.equal(stack.dequantized(), dequantize(quantize(weight, "nf4")))


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

    with pytest.raises(
        UserError, match=r"'blk\.1\.ffn_gate_exps\.weight' \[4, 64, 64\], the config asks for .* 128 rows"
    ):
        load(with_changed_tensors(path, without_up))

    def three(tensors: dict[str, Values]) -> None:
        tensors["blk.0.ffn_down_exps.weight"] = tensors["blk.0.ffn_down_exps.weight"][:3]

    with pytest.raises(UserError, match=r"ffn_down_exps.weight' \[3, 64, 64\], the config asks for 4 experts"):
        load(with_changed_tensors(path, three))


@pytest.mark.parametrize("architecture", ["deepseek2", "gpt-oss", "qwen35moe"])
def test_an_architecture_that_is_not_read_is_refused_in_one_line(tmp_path: Path, architecture: str) -> None:
    path = tmp_path / "file.gguf"
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(2)
    writer.add_tensor("blk.0.ffn_gate_exps.weight", np.zeros((4, 64, 64), dtype=np.float32))
    finish(writer)
    with pytest.raises(UserError, match=f"'{architecture}' in GGUF files is not known") as raised:
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
