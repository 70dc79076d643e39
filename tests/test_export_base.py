"""qdora quantize: a base alone, as bitsandbytes stores it, for every program that loads such a checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from typer.testing import CliRunner

from qdora.cli import app
from qdora.export import export, write
from qdora.model.store import BaseWriter
from tests import support

IDS = torch.tensor([[1, 17, 30, 5, 44, 26, 9, 120, 3, 3, 77]])
STATE = ".quant_state."


def quantize(model: Path, out: Path, *options: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["quantize", str(model), str(out), "--json", *options])
    assert done.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["verification"]["passed"]
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = support.write_llama(tmp_path_factory.mktemp("base") / "model", intermediate_size=128)
    AutoModelForCausalLM.from_pretrained(path).bfloat16().save_pretrained(path)
    return path


@pytest.mark.parametrize("quant, double_quant", [("nf4", True), ("fp4", False), ("int8", False)])
def test_the_files_are_those_of_transformers_and_its_logits_those_of_qdora(model, tmp_path, quant, double_quant):
    of_blocks = quant != "int8"
    options = [f"--set=base.double_quant={str(double_quant).lower()}"] * of_blocks
    result = quantize(model, tmp_path / "out", "--quant", quant, *options)
    four: Any = {"load_in_4bit": True, "bnb_4bit_quant_type": quant, "bnb_4bit_use_double_quant": double_quant}
    settings = BitsAndBytesConfig(**(four if of_blocks else {"load_in_8bit": True}))
    theirs = AutoModelForCausalLM.from_pretrained(model, quantization_config=settings, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype, name
        if STATE in name:
            one, two = (json.loads(bytes(each.tolist())) for each in (ours[name], tensor))
            assert one == two | {key: pytest.approx(two[key], rel=1e-6) for key in ("nested_offset",) if key in two}
        elif "nested_absmax" in name:  # less the offset, a float32 mean whose last bits depend on the threads there
            torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=0)
        else:
            assert torch.equal(ours[name], tensor), name
    running = support.load_checkpoint(model, quant=quant, **({"double_quant": double_quant} if of_blocks else {}))
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    gap = support.logits_of(support.in_float32(written), IDS) - support.logits_of(running, IDS)
    assert gap.abs().max() < (1e-5 if of_blocks else 0.05)  # bitsandbytes rounds the inputs of int8 layers, too
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a b").input_ids
    card = (tmp_path / "out/README.md").read_text()
    assert all(each in card for each in ("Quantised from `model`", f"| format | {quant}", result["base"]["format"]))
    texts = [path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix in (".json", ".md")]
    assert not [text for text in texts if str(model.parent) in text]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "theirs"]


def test_what_is_refused_leaves_nothing(model, tmp_path):
    experts, packed, full = support.write_mixture(tmp_path / "experts", "mixtral"), tmp_path / "packed", tmp_path / "a"
    quantize(experts, packed, "-s", "base.skip=[lm_head,experts]")
    full.mkdir()
    (full / "file").touch()
    place = "Fix: set base.cache in a recipe, which keeps such a base."
    kinds = "base.quant: must be nf4, fp4, int8 in a checkpoint of bitsandbytes, got nf3."
    refused = [
        (model, "--quant=nf3", "out", f"{kinds} {place}"),
        (model, "--quant=nf5", "out", "quantize: base.quant: Input should be "),
        (model, "--set=train.lr=1", "out", "-s train.lr=1: must be a setting of model or base."),
        (model, "--set=base.block_size=63", "out", "-s: base.block_size: Input should be 16, "),
        (
            model,
            "--set=base.block_size=128",
            "out",
            "block_size: must divide the inputs of model.layers.0.mlp.gate_proj",
        ),
        (experts, "-q", "out", "base.quant: transformers does not load 4 layers in 4 bits (such as "),
        (packed, "-q", "out", "packed is quantised already, in nf4."),
        (model, "-q", "a", "a: must be a new or empty directory"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for source, option, out, words in refused:
        done = CliRunner().invoke(app, ["quantize", str(source), str(tmp_path / out), option])
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert words in done.stderr
        assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_without_room_is_refused_before_anything_is_quantised(model, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(" ".join(support.CORPUS) * 20)
    by_gptq = ["--method=gptq", "--calibration", str(tmp_path / "text.txt"), "--set=base.calibration.length=16"]
    quantize(model, tmp_path / "out")
    sizes = {name: each.nbytes for name, each in load_file(tmp_path / "out/model.safetensors").items()}
    whole, packed = sum(sizes.values()), sum(size for name, size in sizes.items() if "proj.weight" in name)
    monkeypatch.setattr(write.shutil, "disk_usage", lambda _: SimpleNamespace(free=1024))
    for name in ("compress_base", "load_run"):
        monkeypatch.setattr(export, name, None)
    for options, expected in (([], whole), (by_gptq, whole + packed)):
        done = CliRunner().invoke(app, ["quantize", str(model), str(tmp_path / "full"), *options])
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.stderr
        (size,) = re.findall(r"needs (\d+) KiB, and its disk has 1 KiB free", done.stderr)
        assert 1024 * int(size) == pytest.approx(expected, rel=0.06)  # without the JSON beside each weight
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]


def test_codes_by_gptq_load_alike_and_an_interrupted_command_goes_on(model, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(support.CORPUS) * 20)
    options = ["--method=gptq", "--calibration", str(text)]
    options += ["--set=base.calibration.length=16", "--set=base.calibration.sequences=4"]
    quantize(model, tmp_path / "rounded")
    result = quantize(model, tmp_path / "whole", *options)
    rounded, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("rounded", "whole"))
    differing = {name for name, tensor in rounded.items() if not torch.equal(tensor, whole[name])}
    assert differing == {name for name in rounded if name.endswith("proj.weight")}  # the codes alone
    assert "by GPTQ" in result["base"]["format"]
    assert "| calibration | 4 pieces of 16 tokens of text.txt |" in (tmp_path / "whole/README.md").read_text()
    write = BaseWriter.write

    def stopped(self: BaseWriter, block: int, *rest: Any) -> None:
        if block == 1:
            raise KeyboardInterrupt
        write(self, block, *rest)

    command = ["quantize", str(model), str(tmp_path / "again")]
    with monkeypatch.context() as patch:
        patch.setattr(BaseWriter, "write", stopped)
        assert CliRunner().invoke(app, [*command, *options]).exit_code == 130
    assert (tmp_path / ".again.quantize").is_dir()
    quantize(model, tmp_path / "again", *options)
    support.same_tensors(tmp_path / "again/model.safetensors", tmp_path / "whole/model.safetensors")
    assert not list(tmp_path.glob(".*"))
    refused = CliRunner().invoke(app, [*command, "--method=gptq"])
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "quantize: base.calibration.text: " in refused.stderr
