"""Adapters that plain PEFT wrote on bitsandbytes' 4-bit base: exported, evaluated and used like a run."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from typer.testing import CliRunner

from qdora.cli import app
from qdora.errors import UserError
from qdora.export.export import export_run
from qdora.recipe.options import EvalOptions, ExportOptions, GenerateOptions, Sampling, WhichOrBase
from qdora.run.load_run import load_target
from qdora.run.verbs import evaluate_target, generate_from
from tests import reference, support

IDS = torch.arange(5, 45).reshape(2, 20)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def bnb_base(model: Path, **settings: Any) -> Any:
    """A model that bitsandbytes quantises, computing in float32."""
    quant = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **settings)
    return support.in_float32(
        AutoModelForCausalLM.from_pretrained(model, quantization_config=quant, dtype=torch.float32)
    )


ADAPTERS: dict[str, dict[str, Any]] = {
    "dora": {
        "settings": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "peft": {"use_dora": True, "r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"},
        "quant": None,
        "dtype": torch.float32,
    },
    "lora": {
        "settings": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
        "peft": {"use_rslora": True, "r": 2, "lora_alpha": 3, "rank_pattern": {"layers.1.mlp.up_proj": 5}},
        "quant": "fp4-single",
        "dtype": torch.bfloat16,
    },
}


def trained(model: Path, out: Path, case: dict[str, Any]) -> Path:
    """PEFT's adapter with all its tensors moved off their start, saved; and what trainers leave beside it."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**case["peft"], target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    adapted = peft.get_peft_model(bnb_base(model, **case["settings"]), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name:
                parameter *= 0.9 + 0.2 * torch.rand_like(parameter)
            elif "lora_" in name:
                parameter.copy_((0.2 * torch.randn_like(parameter)).to(case["dtype"]))
    adapted.save_pretrained(str(out))
    tensors = load_file(out / WEIGHTS)
    save_file({n: t if "magnitude" in n else t.to(case["dtype"]) for n, t in tensors.items()}, out / WEIGHTS)
    (out / "optimizer.pt").write_bytes(b"not read")
    return out


def expected_logits(model: Path, adapter: Path, case: dict[str, Any]) -> Tensor:
    """Logits in float64: each layer g (W + s B A) by the plain loops, W what bitsandbytes dequantises."""
    packed = bnb_base(model, **case["settings"])
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    factors = {n: t.double().numpy() for n, t in load_file(adapter / WEIGHTS).items()}
    for path, module in packed.named_modules():
        if type(module).__name__ != "Linear4bit":
            continue
        weight = dequantize_4bit(module.weight.data, module.weight.quant_state).double().numpy()
        names = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        a, b, m = (factors.get(f"base_model.model.{path}.{name}") for name in names)
        if a is not None and b is not None:
            divisor = np.sqrt(len(a)) if case["peft"].get("use_rslora") else len(a)
            weight = reference.merged_weight(weight, a, b, case["peft"]["lora_alpha"] / divisor, m)
        dense.get_submodule(path).weight.data = torch.from_numpy(weight)
    return logits(dense)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS).logits
    return found.double()


def content(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


@pytest.fixture(scope="module")
def model(root: Path) -> Path:
    return support.write_llama(root / "model", intermediate_size=128)


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    """The DoRA adapter, for what does not depend on the kind."""
    return trained(model, model.parent / "dora", ADAPTERS["dora"])


@pytest.mark.parametrize("kind", ADAPTERS)
def test_exports_of_an_adapter(model, tmp_path, caplog, kind):
    case = ADAPTERS[kind]
    if kind == "lora":  # on a base in float16
        half = shutil.copytree(model, tmp_path / "half")
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16).save_pretrained(half)
        model = half
    adapter = trained(model, tmp_path / "theirs", case)
    before, expected = content(adapter), expected_logits(model, adapter, case)
    # The adapter does something, and PEFT agrees with the float64 formula.
    assert (expected - logits(bnb_base(model, **case["settings"]))).abs().max() > 0.1
    loaders: dict[str, Callable[[Path], Any]] = {
        "merged": AutoModelForCausalLM.from_pretrained,
        "nf4-lora": lambda out: peft.PeftModel.from_pretrained(
            support.in_float32(AutoModelForCausalLM.from_pretrained(out)), str(out / "adapter")
        ),
        "peft": lambda out: peft.PeftModel.from_pretrained(bnb_base(model, **case["settings"]), str(out)),
    }
    torch.testing.assert_close(logits(loaders["peft"](adapter)), expected, rtol=0, atol=2e-5)
    caplog.set_level("INFO", "qdora")
    for form, load in loaders.items():
        dtype = None if form == "peft" else "float32"
        written = export_run(adapter, tmp_path / form, ExportOptions(format=form, dtype=dtype, quant=case["quant"]))
        torch.testing.assert_close(logits(load(tmp_path / form)), expected, rtol=0, atol=2e-5)
        assert form == "peft" or written["verification"]["passed"]
        assert (written["run"], written["state"]) == ("theirs", "final")
        card = (tmp_path / form / "README.md").read_text()
        assert ", exported with qdora" in card
        assert not [word for word in ("learning rate", "demo/", "## Data\n", str(tmp_path)) if word in card]
        assert ("assumed" if case["quant"] is None else "--quant") in card
    known = {"quant": None, "known": None} | written["adopted"]
    assert (known["base"], known["quant"].split(",")[0]) == (None, case["settings"]["bnb_4bit_quant_type"])
    assert f"taken as trained on {model}, held in {known['quant']}" in caplog.text
    stored, copied = load_file(adapter / WEIGHTS), load_file(tmp_path / "peft" / WEIGHTS)
    assert all(torch.equal(copied[n], t) and copied[n].dtype == t.dtype for n, t in stored.items())
    assert content(adapter) == before


def changed(adapter: Path, out: Path, **settings: Any) -> Path:
    """The adapter with other settings; without magnitudes if `magnitudes` is False."""
    shutil.copytree(adapter, out)
    if not settings.pop("magnitudes", True):
        tensors = load_file(out / WEIGHTS)
        save_file({name: tensor for name, tensor in tensors.items() if "magnitude" not in name}, out / WEIGHTS)
    config = json.loads((out / CONFIG).read_text())
    (out / CONFIG).write_text(json.dumps(config | settings))
    return out


@pytest.mark.parametrize(
    "settings, options, words",
    [
        ({"task_type": "SEQ_CLS"}, {}, "task_type: 'SEQ_CLS' is not supported"),
        ({"magnitudes": False}, {}, "magnitude_vector must hold finite numbers"),
        ({"base_model_name_or_path": None}, {}, "is not set.*--base-model"),
        ({"base_model_name_or_path": "/x/llama"}, {}, "/x/llama is not on this machine.*--base-model"),
        ({}, {"base_model": "./nothing"}, "--base-model: must be a directory, .*nothing"),
        ({}, {"quant": "nf8"}, "--quant: got 'nf8'"),
        ({}, {"step": 2}, "--step.*used only with a run"),
    ],
)
def test_what_is_refused(model, adapter, tmp_path, settings, options, words):
    given, target = changed(adapter, tmp_path / "given", **settings), tmp_path / "out"
    with pytest.raises(UserError, match=words):
        export_run(given, target, ExportOptions(**options))
    with pytest.raises(UserError, match=words):
        evaluate_target(str(given), EvalOptions(tasks=["demo/facts"], **options))
    for call, fault in (
        (lambda: export_run(model, target, ExportOptions(base_model=str(model))), "--base-model: used only with an"),
        (
            lambda: load_target(str(model), WhichOrBase(base_model=str(model)), verb="eval"),
            "--base-model: .* only with an adapter",
        ),
        (lambda: evaluate_target(str(adapter)), "eval: .* has no data"),
    ):
        with pytest.raises(UserError, match=fault):
            call()
    assert not target.exists()


def test_a_base_that_is_stored_in_4_bits_stays_so(model, adapter, tmp_path):
    """No double quantisation there, so the default would be another base; with a tokenizer beside the adapter alone."""
    bnb_base(model, bnb_4bit_quant_type="nf4").save_pretrained(tmp_path / "base")
    given = changed(adapter, tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    support.tokenizer().save_pretrained(given)
    with pytest.raises(UserError, match=r"--quant: .* is quantised already"):
        export_run(given, tmp_path / "out", ExportOptions(quant="nf4"))
    written = export_run(given, tmp_path / "out", ExportOptions(dtype="float32"))
    assert written["adopted"]["known"] == "as the base is stored"
    case = ADAPTERS["dora"] | {"settings": {"bnb_4bit_quant_type": "nf4"}}
    exported = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(exported, expected_logits(model, adapter, case), rtol=0, atol=2e-5)


def test_eval_and_generate(model, adapter, tmp_path):
    moved = changed(adapter, tmp_path / "moved", base_model_name_or_path="/x/llama")
    before, text = content(moved), tmp_path / "text"
    text.write_text("Question: is the sky blue?\nAnswer: yes no yes no")
    command = ["eval", str(moved), "--base-model", str(model), "--text", str(text), "--json"]
    shown = CliRunner().invoke(app, command)
    found = json.loads(shown.stdout)["perplexity"]
    assert f"taken as trained on {model}" in shown.stderr
    loaded = load_target(str(moved), WhichOrBase(base_model=str(model)), verb="eval")
    ids = loaded.tokenizer(text.read_text(), return_tensors="pt")["input_ids"]
    theirs = peft.PeftModel.from_pretrained(bnb_base(model, **ADAPTERS["dora"]["settings"]), str(adapter)).eval()
    with torch.no_grad():
        nll = float(theirs(input_ids=ids, labels=ids).loss)
        answer = theirs.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert np.log(found["perplexity"]) == pytest.approx(nll, abs=1e-4)
    options = GenerateOptions(prompt=text.read_text(), raw=True, base_model=str(model))
    said = generate_from(str(moved), options, Sampling(max_new_tokens=5))
    assert said["text"] == loaded.tokenizer.decode(answer, skip_special_tokens=True)
    assert content(moved) == before
